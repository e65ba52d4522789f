from __future__ import annotations

import dataclasses
import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import BundleError, ExportError, InputError
from lfdm_export.export.bundle_export import geometry_of
from lfdm_export.reference.inputs import BATCH_SIZE, DRAWN, chain_table, draw_inputs
from lfdm_export.reference.pytorch import make_reference
from lfdm_export.reference.stored import MAX_VALUES, Reference, kept_frames, positions, thin
from lfdm_export.sampling.loop import threshold
from lfdm_export.sampling.noise import noise_for
from lfdm_export.stages import BATCH, Geometry, stage_specs
from lfdm_models.config import LfdmConfig
from lfdm_models.demo import CONFIG
from lfdm_models.lfae import latent_to_flow
from lfdm_models.model import LfdmModel
from lfdm_models.schedule import cosine_schedule
from tests.closeness import assert_same_floats

GEOMETRY = geometry_of(CONFIG, 3, 64)
SEED = 5


@pytest.fixture(scope="module")
def reference(small_model: LfdmModel) -> Reference:
    return make_reference(small_model, GEOMETRY, seed=SEED, whole=True)


@pytest.fixture(scope="module")
def stored(small_model: LfdmModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    make_reference(small_model, GEOMETRY, seed=SEED).save(path)
    return path


def load(path: Path, geometry: Geometry = GEOMETRY, config: LfdmConfig = CONFIG) -> Reference:
    return Reference.load(path, config, geometry, stage_specs(geometry), {})


def output(reference: Reference, stage: str, name: str) -> NDArray[np.float32]:
    spec = next(t for t in stage_specs(GEOMETRY)[stage].outputs if t.name == name)
    return reference.outputs[stage][name].reshape(spec.concrete(**{BATCH: BATCH_SIZE}))


# ------------------------------------------------------------------------------------------- inputs


def test_inputs_fit_every_stage(reference: Reference):
    inputs = reference.inputs(CONFIG, GEOMETRY)
    for spec in stage_specs(GEOMETRY).values():
        for tensor in spec.inputs:
            if spec.name == "estimate_motion" and tensor.name == "latent":
                continue
            found = inputs[tensor.name]
            assert found.shape == tensor.concrete(**{BATCH: BATCH_SIZE}), tensor.name
            assert found.dtype == tensor.dtype, tensor.name
            assert np.isfinite(found).all(), tensor.name


def test_inputs_are_those_of_earnest(reference: Reference):
    inputs = reference.inputs(CONFIG, GEOMETRY)
    for name in ("image", "driving"):
        assert 0 <= inputs[name].min() < 0.2 < 0.6 < inputs[name].max() <= 1
        assert np.abs(np.diff(inputs[name], axis=-1)[..., 4:-4]).mean() < 0.05, "smooth"
    early, late = inputs["timestep"]
    assert 0 < early < 300
    assert 500 <= late < 900
    assert np.abs(inputs["latent"]).max() <= 1, "residual flow: offsets, and occlusion"
    assert inputs["noisy_latent"][1].std() > inputs["noisy_latent"][0].std()
    assert inputs["feature"].min() == 0, "behind a ReLU"
    assert (inputs["coefficients"] != 0).all()


def test_the_identity_belongs_to_flow_that_is_not_residual():
    plain = draw_inputs(dataclasses.replace(CONFIG, residual_flow=False), GEOMETRY, SEED)["latent"]
    offset = draw_inputs(CONFIG, GEOMETRY, SEED)["latent"]
    for latent, residual in ((plain, False), (offset, True)):
        frame = torch.from_numpy(latent[:, :, 0])
        np.testing.assert_allclose(
            latent_to_flow(frame, residual_flow=residual).grid,
            latent_to_flow(torch.from_numpy(plain[:, :, 0]), residual_flow=False).grid,
            atol=1e-6,
        )


def test_inputs_depend_on_the_seed_alone():
    np.random.seed(7)  # noqa: NPY002  # the global state, which must be left alone
    expected = np.random.RandomState(7).random_sample()
    first, again, other = (draw_inputs(CONFIG, GEOMETRY, seed) for seed in (1, 1, 2))
    assert sorted(first) == sorted(DRAWN)
    for name in DRAWN:
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any(), name
    assert np.random.random_sample() == expected  # noqa: NPY002


# ------------------------------------------------------------------------------- the networks' outputs


def test_denoising_is_the_untouched_unets(small_model: LfdmModel, reference: Reference):
    inputs = {name: torch.from_numpy(array) for name, array in reference.inputs(CONFIG, GEOMETRY).items()}
    unet = small_model.diffusion.denoise_fn
    scales = inputs["guidance_scale"].tolist()
    for sample in range(BATCH_SIZE):
        names = ("noisy_latent", "feature", "text_embedding", "timestep")
        latent, feature, embedding, timestep = (inputs[name][sample : sample + 1] for name in names)
        for stage, scale in (("denoise", 1.0), ("denoise_guided", scales[sample])):
            found = output(reference, stage, "predicted_noise")[sample]
            np.testing.assert_allclose(found, unet.guided(latent, feature, embedding, timestep, scale)[0], atol=2e-5)


def test_context_is_the_features_share_of_the_first_convolution(small_model: LfdmModel, reference: Reference):
    inputs = {name: torch.from_numpy(array) for name, array in reference.inputs(CONFIG, GEOMETRY).items()}
    frames = GEOMETRY.frames
    latent = inputs["noisy_latent"]
    conv = small_model.diffusion.denoise_fn.init_conv
    feature = inputs["feature"][:, :, None].expand(-1, -1, frames, -1, -1)
    whole = conv(torch.cat([latent, feature], dim=1))
    alone = conv(torch.cat([latent, torch.zeros_like(feature)], dim=1)) - conv.bias.view(1, -1, 1, 1, 1)  # type: ignore[union-attr]
    np.testing.assert_allclose(whole - alone, inputs["context"][:, :, None].expand_as(whole), atol=1e-5)


def test_steps_are_the_samplers_arithmetic(reference: Reference):
    inputs = reference.inputs(CONFIG, GEOMETRY)
    c = inputs["coefficients"].T.reshape(11, -1, 1, 1, 1, 1)
    x, noise, (carry, previous) = inputs["noisy_latent"], inputs["noise"], inputs["history"].swapaxes(0, 1)
    for stage, denoise in (("step", "denoise"), ("step_guided", "denoise_guided")):
        e = output(reference, denoise, "predicted_noise")
        x0 = threshold(c[0] * x + c[1] * e)
        following = c[2] * x + c[3] * x0 + c[4] * e + c[5] * carry + c[6] * previous + c[7] * noise
        np.testing.assert_allclose(output(reference, stage, "next_latent"), following, atol=1e-5)
        np.testing.assert_allclose(output(reference, stage, "next_history")[:, 1], x0, atol=1e-5)


def test_the_chain_ends_in_its_own_frames(small_model: LfdmModel, reference: Reference):
    chain = reference.chain
    assert len(chain.latents) == 10
    source = torch.from_numpy(chain.image.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
    skips = small_model.lfae.generator.encode(source)
    assert chain.kept.tolist() == [0, 1, 2]
    for index in chain.kept:
        flow = latent_to_flow(torch.from_numpy(chain.latents[-1][None, :, index]), residual_flow=True)
        decoded = small_model.lfae.generator.decode(source, skips, flow)
        np.testing.assert_allclose(chain.kept_frames[index], decoded.frame[0], atol=1e-5)
        np.testing.assert_allclose(chain.kept_warped[index], decoded.warped[0], atol=1e-5)
        levels = (np.clip(chain.kept_frames[index], 0, 1) * np.float32(255)).astype(np.uint8)
        np.testing.assert_array_equal(chain.frames[index], levels.transpose(1, 2, 0))


def test_the_chains_first_step(small_model: LfdmModel, reference: Reference):
    chain, table = reference.chain, chain_table(cosine_schedule(1000), {})
    shape = chain.latents.shape[1:]
    start, noise = (noise_for([SEED], step, shape) for step in (-1, 0))
    source = torch.from_numpy(chain.image.transpose(2, 0, 1)[None].astype(np.float32) / np.float32(255))
    feature = small_model.lfae.generator.encode(source)[-1]
    np.testing.assert_array_equal(chain.embedding, next(iter(small_model.label_embeddings.values())))
    e = small_model.diffusion.denoise_fn(
        torch.from_numpy(start), feature, torch.from_numpy(chain.embedding[None]), torch.tensor([table.timesteps[0]])
    ).numpy()
    c = table.coefficients[0]
    expected = c[2] * start + c[3] * threshold(c[0] * start + c[1] * e) + c[4] * e + c[7] * noise
    np.testing.assert_allclose(chain.latents[0], expected[0], atol=1e-5)


def test_without_labels_the_chain_has_an_embedding_of_its_own(small_model: LfdmModel):
    bare = dataclasses.replace(small_model, label_embeddings={})
    geometry = dataclasses.replace(GEOMETRY, frames=1, chunk_frames=1)
    embeddings = [make_reference(bare, geometry, seed=seed).chain.embedding for seed in (1, 2)]
    assert embeddings[0].shape == (GEOMETRY.text_width,)
    assert (embeddings[0] != embeddings[1]).any()


def test_progress_counts_to_the_end(small_model: LfdmModel):
    seen: list[tuple[str, int, int]] = []
    geometry = dataclasses.replace(GEOMETRY, frames=2, chunk_frames=1)
    make_reference(small_model, geometry, seed=SEED, progress=lambda *call: seen.append(call))
    assert {name for name, _, _ in seen} == {"reference"}
    done, totals = [call[1] for call in seen], {call[2] for call in seen}
    assert done[0] == 0
    assert done == sorted(done)
    assert {done[-1]} == totals


def test_networks_that_give_nan_are_refused(small_model: LfdmModel):
    broken = dataclasses.replace(small_model, label_embeddings={"a": np.full(768, np.nan, np.float32)})
    with pytest.raises(ExportError, match="the model itself gives frames that are not finite"):
        make_reference(broken, dataclasses.replace(GEOMETRY, frames=1, chunk_frames=1), seed=SEED)


def test_seeds_out_of_range(small_model: LfdmModel):
    with pytest.raises(InputError, match="seed: found -1"):
        make_reference(small_model, GEOMETRY, seed=-1)


# ----------------------------------------------------------------------------------------- the choice


def test_positions_are_spread_and_the_same_everywhere():
    chosen = positions(3, "decode/frames", 1000, 10)
    np.testing.assert_array_equal(chosen // 100, np.arange(10))
    np.testing.assert_array_equal(chosen, positions(3, "decode/frames", 1000, 10))
    assert (chosen != positions(4, "decode/frames", 1000, 10)).any()
    assert (chosen != positions(3, "decode/warped", 1000, 10)).any()
    np.testing.assert_array_equal(positions(3, "a", 7, 7), np.arange(7))
    uneven = positions(3, "a", 11, 4)
    assert (np.diff(uneven) > 0).all()
    assert uneven.max() < 11
    # The recipe of the docstring, so that it cannot change unseen.
    words = np.random.Philox(key=np.array([3, zlib.crc32(b"decode/frames")], np.uint64)).random_raw(10)
    np.testing.assert_array_equal(chosen, np.arange(10) * 100 + (words % 100).astype(np.int64))


def test_thinning_keeps_the_values_there():
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(thin(1, "x", values, 5), positions(1, "x", 24, 5))
    np.testing.assert_array_equal(thin(1, "x", values, None), np.arange(24))
    np.testing.assert_array_equal(thin(1, "x", values), np.arange(24))


@pytest.mark.parametrize(("frames", "kept"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2]), (40, [0, 20, 39])])
def test_kept_frames(frames: int, kept: list[int]):
    assert kept_frames(frames).tolist() == kept


# ------------------------------------------------------------------------------------------ the file


def test_round_trip(reference: Reference, stored: Path):
    found = load(stored)
    assert found.seed == SEED
    for name, array in reference.inputs(CONFIG, GEOMETRY).items():
        np.testing.assert_array_equal(array, found.inputs(CONFIG, GEOMETRY)[name])
    for stage, outputs in reference.outputs.items():
        for name, values in outputs.items():
            kept = found.outputs[stage][name]
            assert len(kept) == min(values.size, MAX_VALUES)
            chosen = values[positions(SEED, f"{stage}/{name}", values.size, len(kept))]
            assert_same_floats(kept, chosen, roundings=256)  # the networks ran once for either
    assert found.outputs["encode"]["skip_0"].size == MAX_VALUES < reference.outputs["encode"]["skip_0"].size
    for field in dataclasses.fields(reference.chain):
        kept, whole = getattr(found.chain, field.name), getattr(reference.chain, field.name)
        assert (kept.dtype, kept.shape) == (whole.dtype, whole.shape), field.name
        # Floats of two runs of the networks, and the levels that they were cut to.
        np.testing.assert_allclose(kept, whole, rtol=0, atol=1 if kept.dtype == np.uint8 else 1e-4, err_msg=field.name)


def edited(path: Path, target: Path, **changes: NDArray[Any] | None) -> Path:
    """A copy whose arrays are replaced, or left out."""
    with np.load(path) as archive:
        arrays = dict(archive)
    for name, array in changes.items():
        arrays.pop(name)
        if array is not None:
            arrays[name] = array
    np.savez(target, **arrays)
    return target


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain/latents": None}, "is not a reference of a bundle"),
        ({"chain/frames": np.zeros((3, 64, 64, 3), np.float32)}, r"chain/frames is float32 .*expected uint8"),
        ({"units": np.ones(2, np.float32)}, r"units is float32 \(2,\), expected float32 \(3,\)"),
        ({"outputs/decode/frames": np.zeros(5, np.float32)}, "outputs/decode/frames is float32"),
        ({"chain/kept": np.array([0, 0, 9])}, "chain/kept names other frames"),
        ({"chain/embedding": np.zeros(10**8, np.float32)}, "larger than a reference of a bundle needs"),
        ({"chain/image": np.array([{}], object)}, "is not a reference of a bundle"),
    ],
)
def test_damaged_files(stored: Path, tmp_path: Path, changes: dict[str, Any], message: str):
    with pytest.raises(BundleError, match=message):
        load(edited(stored, tmp_path / "reference.npz", **changes))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
def test_no_archive(tmp_path: Path, content: bytes):
    (tmp_path / "reference.npz").write_bytes(content)
    with pytest.raises(BundleError, match="is not a reference of a bundle"):
        load(tmp_path / "reference.npz")


def test_a_member_that_claims_to_be_huge_is_not_unpacked(stored: Path, tmp_path: Path):
    target = tmp_path / "reference.npz"
    target.write_bytes(stored.read_bytes())
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1 << 24,)})
    with zipfile.ZipFile(target, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("more.npy", buffer.getvalue() + bytes(4 << 24))
    with pytest.raises(BundleError, match=r"more\.npy is larger"):
        load(target)


def test_a_reference_of_another_bundle(stored: Path):
    with pytest.raises(BundleError, match="expected"):
        load(stored, geometry_of(CONFIG, 4, 64))
    with pytest.raises(BundleError, match="chain/latents is"):
        load(stored, config=dataclasses.replace(CONFIG, dm=dataclasses.replace(CONFIG.dm, training_steps=8)))


def test_another_numpys_draws_are_noticed(stored: Path, tmp_path: Path):
    probes = np.load(stored)["probes"]
    with pytest.raises(BundleError, match="draws other numbers than the NumPy"):
        load(edited(stored, tmp_path / "r.npz", probes=probes + 1)).inputs(CONFIG, GEOMETRY)


def test_an_export_holds_its_reference(small_bundle: Bundle, small_model: LfdmModel):
    assert small_bundle.reference_path == small_bundle.path / "reference.npz"
    assert "reference.npz" in small_bundle.manifest.files
    manifest = small_bundle.manifest
    found = Reference.load(
        small_bundle.path / "reference.npz",
        manifest.config,
        manifest.geometry,
        small_bundle.stages,
        manifest.provenance,
    )
    np.testing.assert_array_equal(found.chain.embedding, small_bundle.embeddings[0])
