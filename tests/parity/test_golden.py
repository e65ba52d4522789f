"""The networks and the exported bundle against the published program's results, full size, float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lfdm_export import Pipeline, export_bundle, load_model
from lfdm_export.pictures.preprocess import to_float, to_uint8
from lfdm_export.sampling.loop import sample, step_from_denoiser
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.tables import sampler_table
from lfdm_models.lfae import latent_to_flow
from lfdm_models.model import LfdmModel
from lfdm_models.schedule import cosine_schedule

Float32 = NDArray[np.float32]
VARIANTS = ("mug128", "natops128")
LATENT = (1, 3, 40, 32, 32)


class Case(NamedTuple):
    """One variant: its model, its golden arrays, and the errors found so far."""

    variant: str
    model: LfdmModel
    golden: dict[str, NDArray[Any]]
    errors: dict[str, float]

    def error(self, found: NDArray[np.generic] | torch.Tensor, name: str, whose: str = "networks") -> float:
        expected = self.golden[name]
        assert tuple(found.shape) == expected.shape
        error = float(np.abs(np.asarray(found) - expected).max())
        self.errors[f"{self.variant} {whose} {name}"] = error
        return error

    @property
    def image(self) -> torch.Tensor:
        return torch.from_numpy(to_float(self.golden["image_u8"]))

    @property
    def driving(self) -> torch.Tensor:
        return torch.from_numpy(to_float(self.golden["driving_u8"]))

    @property
    def text(self) -> torch.Tensor:
        return torch.from_numpy(np.array(self.golden["cond"]))


@pytest.fixture(scope="module", params=VARIANTS)
def case(
    request: pytest.FixtureRequest,
    shared_dir: Path,
    golden_checkpoints: dict[str, tuple[Path, Path]],
    golden_errors: dict[str, float],
) -> Iterator[Case]:
    with np.load(shared_dir / "golden" / f"cases_{request.param}.npz") as archive:
        golden = dict(archive)
    with torch.inference_mode():
        yield Case(request.param, load_model(*golden_checkpoints[request.param]), golden, golden_errors)


def stream(seed: int) -> Iterator[Float32]:
    """The draws of noise, in the order of the golden cases."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.standard_normal(LATENT, dtype=np.float32)


def test_encoder(case: Case) -> None:
    assert case.error(case.model.lfae.generator.encode(case.image)[-1], "feature") <= 1e-5


def test_lfae_on_its_own(case: Case) -> None:
    lfae, source, driving = case.model.lfae, case.image, case.driving
    for name, image in (("source", source), ("driving", driving)):
        regions = lfae.region_predictor(image)
        for field in ("shift", "covar", "heatmap"):
            assert case.error(getattr(regions, field), f"lfae_{name}_{field}") <= 1e-5
        # A region's axes are known up to one sign.
        expected = np.asarray(case.golden[f"lfae_{name}_affine"])
        sign = np.sign((np.asarray(regions.affine) * expected).sum(axis=(2, 3), keepdims=True))
        assert np.abs(np.asarray(regions.affine) * sign - expected).max() <= 5e-5
    assert case.error(lfae.bg_predictor(source, driving), "lfae_bg_params") <= 1e-5
    flow = lfae.estimate_motion(source, driving)
    assert case.error(flow.grid, "lfae_optical_flow") <= 5e-5
    assert case.error(flow.occlusion, "lfae_occlusion_map") <= 5e-5
    decoded = lfae(source, driving)
    # An error of the grid is amplified some 64 times, in pixels, and again by the picture's contrast.
    assert case.error(decoded.frame, "lfae_prediction") <= 2e-4
    assert case.error(decoded.warped, "lfae_deformed") <= 2e-4


def test_decoder(case: Case) -> None:
    generator, image = case.model.lfae.generator, case.image
    skips, latent = generator.encode(image), torch.from_numpy(np.array(case.golden["ddim10_eta1_scale1"]))
    frames = [
        generator.decode(image, skips, latent_to_flow(latent[:, :, t], residual_flow=False))
        for t in case.golden["frame_index"].tolist()
    ]
    assert case.error(torch.stack([f.frame for f in frames], dim=2), "frames") <= 1e-5
    assert case.error(torch.stack([f.warped for f in frames], dim=2), "warped") <= 1e-5


def test_unet(case: Case) -> None:
    """Once per variant, without and with the condition."""
    timestep, scale = {"mug128": (37, 0), "natops128": (500, 1)}[case.variant]
    assert unet_error(case, timestep, scale) <= 1e-4


@pytest.mark.full
@pytest.mark.parametrize(("timestep", "scale"), [(37, 0), (500, 1), (0, 1), (999, 2.5)])
def test_unet_everywhere(case: Case, timestep: int, scale: float) -> None:
    assert unet_error(case, timestep, scale) <= 1e-4


def unet_error(case: Case, timestep: int, scale: float) -> float:
    feature = torch.from_numpy(np.array(case.golden["feature"]))
    noisy = torch.from_numpy(next(stream(7)))
    unet = case.model.diffusion.denoise_fn
    found = unet.guided(noisy, feature, case.text, torch.tensor([timestep]), scale)
    return case.error(found, f"unet_t{timestep}_scale{scale:g}")


class Chain(NamedTuple):
    """A golden chain: its stream, sampler and guidance, and whether it runs on the 20-step schedule."""

    name: str
    seed: int
    sampler: str
    steps: int | None
    eta: float | None
    guidance_scale: float
    training_steps: int = 1000

    @property
    def table(self) -> SamplerTable:
        return sampler_table(self.sampler, cosine_schedule(self.training_steps), self.steps, self.eta)


CHAINS = (
    Chain("ddim10_eta1_scale1", 11, "ddim", 10, 1.0, 1.0),
    Chain("ddim4_eta0_scale2", 12, "ddim", 4, 0.0, 2.0),
    Chain("ddpm20_schedule20_scale1", 13, "ddpm", None, None, 1.0, training_steps=20),
    Chain("ddim25_eta0.5_scale1", 15, "ddim", 25, 0.5, 1.0),
)


def chains_of(case: Case) -> list[Chain]:
    known = [chain for chain in CHAINS if chain.name in case.golden]
    assert len(known) >= 3
    return known


def one_step(timestep: int) -> SamplerTable:
    """A table with a single DDPM step of the full schedule."""
    table = sampler_table("ddpm", cosine_schedule(1000))
    row = slice(999 - timestep, 1000 - timestep)
    return SamplerTable("ddpm", table.timesteps[row], table.coefficients[row], table.draws_noise[row])


def ddpm_steps(case: Case) -> list[int]:
    known = [t for t in (999, 400, 20, 0) if f"ddpm_step_t{t}" in case.golden]
    assert len(known) >= 3
    return known


@pytest.mark.full
def test_chains_of_the_networks(case: Case) -> None:
    unet, feature = case.model.diffusion.denoise_fn, torch.from_numpy(np.array(case.golden["feature"]))

    def denoiser(scale: float) -> Callable[[Float32, NDArray[np.int64]], Float32]:
        def denoise(noisy: Float32, timestep: NDArray[np.int64]) -> Float32:
            inputs = torch.from_numpy(noisy), feature, case.text, torch.from_numpy(timestep)
            return unet.guided(*inputs, scale).numpy()

        return denoise

    for chain in chains_of(case):
        draws = stream(chain.seed)
        step = step_from_denoiser(denoiser(chain.guidance_scale))
        assert case.error(sample(step, chain.table, next(draws), draws), chain.name) <= 1e-4, chain.name
    for timestep in ddpm_steps(case):
        step = step_from_denoiser(denoiser(1.0))
        found = sample(step, one_step(timestep), next(stream(7)), stream(14))
        assert case.error(found, f"ddpm_step_t{timestep}") <= 1e-4, timestep


@pytest.fixture(scope="module")
def pipeline(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    with torch.inference_mode(mode=False):
        bundle = export_bundle(case.model, tmp_path_factory.mktemp("golden-bundle") / "bundle", reference=False)
    return Pipeline.open(bundle)


@pytest.mark.full
def test_bundle(case: Case, pipeline: Pipeline) -> None:
    golden = case.golden
    encoded = pipeline.encode(golden["image_u8"])
    assert case.error(encoded.skips[-1], "feature", "bundle") <= 1e-5

    for chain in chains_of(case):
        draws = stream(chain.seed)
        if chain.training_steps == 1000:
            clip = pipeline.generate(
                golden["image_u8"], text_embedding=golden["cond"], sampler=chain.sampler, steps=chain.steps,
                eta=chain.eta, guidance_scale=chain.guidance_scale, noise=draws,
            )  # fmt: skip
            latent = clip.latent
        else:
            latent = sample(bundle_step(pipeline, encoded.context, golden["cond"]), chain.table, next(draws), draws)
        assert case.error(latent, chain.name, "bundle") <= 1e-3, chain.name
        assert np.abs(latent - golden[chain.name]).mean() <= 5e-5, chain.name
        if chain.name != "ddim10_eta1_scale1":
            continue
        frames, warped = pipeline.decode(encoded, latent)
        index = golden["frame_index"]
        assert case.error(frames[:, :, index], "frames", "bundle") <= 1e-3
        assert case.error(warped[:, :, index], "warped", "bundle") <= 1e-3
        case.error(clip.frames.astype(np.int16), "video_u8", "bundle")
        levels = np.abs(clip.frames.astype(np.int16) - golden["video_u8"])
        assert (levels <= 1).mean() >= 0.9999
        np.testing.assert_array_equal(clip.frames, to_uint8(frames))
    for timestep in ddpm_steps(case):
        step = bundle_step(pipeline, encoded.context, golden["cond"])
        found = sample(step, one_step(timestep), next(stream(7)), stream(14))
        assert case.error(found, f"ddpm_step_t{timestep}", "bundle") <= 1e-3, timestep


def bundle_step(
    pipeline: Pipeline, context: Float32, text: NDArray[np.generic]
) -> Callable[..., tuple[Float32, Float32]]:
    """The stage `step` in the form of the sampling loop, for schedules that `generate` does not support."""

    def step(
        noisy: Float32, timestep: NDArray[np.int64], history: Float32, noise: Float32, coefficients: Float32
    ) -> tuple[Float32, Float32]:
        latent, next_history = pipeline.stages.run("step", noisy, context, text, timestep, history, noise, coefficients)
        return latent, next_history

    return step


@pytest.mark.full
def test_bundle_estimates_motion(case: Case, pipeline: Pipeline) -> None:
    (latent,) = pipeline.stages.run("estimate_motion", case.image.numpy(), case.driving.numpy())
    assert case.error(latent[:, :2].transpose(0, 2, 3, 1), "lfae_optical_flow", "bundle") <= 5e-5
    assert case.error((latent[:, 2:] + 1) / 2, "lfae_occlusion_map", "bundle") <= 5e-5
    clip = pipeline.transfer_motion(case.golden["image_u8"], np.asarray(case.golden["driving_u8"]))
    expected = to_uint8(np.asarray(case.golden["lfae_prediction"])[:, :, None])
    assert (np.abs(clip.frames.astype(np.int16) - expected) <= 1).mean() >= 0.9999
