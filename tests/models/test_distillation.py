"""Distillation: chains of few steps, weights that begin at the mean, the energy score, the command, the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lfdm_export import Pipeline, export_bundle, load_model
from lfdm_export.checkpoints.model_folder import load_model_folder, save_model
from lfdm_export.errors import CheckpointError
from lfdm_export.parity.verify import verify_bundle
from lfdm_export.sampling.loop import sample, step_from_denoiser
from lfdm_export.sampling.loop import threshold as numpy_threshold
from lfdm_export.sampling.tuned import TunedSteps
from lfdm_models.lfae import latent_to_flow
from lfdm_models.schedule import cosine_schedule
from lfdm_models.training import recipes
from lfdm_models.training.centering import center, constant_of
from lfdm_models.training.cli import main
from lfdm_models.training.conditions import label_table
from lfdm_models.training.distill import Teacher, distill
from lfdm_models.training.distill_stage import DRAWS, DistillStage, distance, energy_score
from lfdm_models.training.dm import DmStage, new_diffusion
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.few_steps import FewSteps, chosen_times, levels, long_chain, run_chain, threshold
from lfdm_models.training.last_stage import KeptFeatures, LastStage, bytes_kept
from lfdm_models.training.last_views import Score, warped
from lfdm_models.training.lfae import new_lfae
from lfdm_models.training.loop import STATE, Outcome, ReportProgress, no_report, train
from lfdm_models.training.procedural import LABELS
from lfdm_models.training.processes import Processes
from lfdm_models.training.settings import DEFAULT_TIMES, DistillLearn, OptimizerSettings
from lfdm_models.training.teacher import Sampling, TeacherSamples, draw_samples
from tests.models.test_training import (
    CONFIG,
    FRAMES,
    LFAE,
    SIZE,
    Killed,
    assert_same_bits,
    killed_after,
    run_settings,
    train_dm,
    train_lfae,
)

POOL = recipes.DataSettings(image_size=SIZE, frames=FRAMES, pool=4)
OPTIMISER = OptimizerSettings(1e-3, (0.9, 0.99), clip_norm=1.0)
SHAPE = (3, FRAMES, SIZE // 4, SIZE // 4)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Checkpoints of an autoencoder and a DM that were hardly trained."""
    folder = tmp_path_factory.mktemp("teacher")
    train_lfae(folder / "lfae", run_settings(1))
    train_dm(folder / "dm", folder / "lfae" / "lfae.pth", run_settings(1))
    return folder / "lfae" / "lfae.pth", folder / "dm" / "dm.pth"


@pytest.fixture(autouse=True)
def few_kept_features(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lfdm_models.training.distill._KEPT", 6)


def run(
    pair: tuple[Path, Path],
    folder: Path,
    updates: int = 4,
    *,
    steps: int = 2,
    sampling: Sampling | None = None,
    learn: DistillLearn = "all",
    resume: bool = False,
    progress: ReportProgress = no_report,
) -> Outcome:
    return distill(
        Teacher(*pair, CONFIG),
        steps,
        POOL,
        OPTIMISER,
        run_settings(updates),
        folder,
        sampling=sampling,
        learn=learn,
        resume=resume,
        progress=progress,
    )


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- Chains ----------------------------------------------------------------------------------------


def test_thresholding_is_that_of_the_samplers():
    x0 = noise(3, *SHAPE) * torch.tensor([0.1, 1.0, 4.0]).view(-1, 1, 1, 1, 1)
    np.testing.assert_allclose(threshold(x0), numpy_threshold(x0.numpy()), rtol=1e-6)


def test_a_chain_is_that_of_its_table():
    diffusion = new_diffusion(CONFIG, 0).eval()
    table = FewSteps((80, 50, 20), (1.5, 0.8, 1.1))
    feature, embedding = noise(2, 16, 8, 8, seed=1), noise(2, 64, seed=2)
    with torch.no_grad():
        found = run_chain(diffusion, table, feature, embedding, FRAMES, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    start, *fresh = (torch.randn(2, *SHAPE, generator=generator).numpy() for _ in range(3))

    def denoise(latent: Any, timestep: Any) -> Any:
        with torch.no_grad():
            tensors = torch.from_numpy(latent), feature, embedding, torch.from_numpy(timestep)
            return diffusion.denoise_fn(*tensors).numpy()

    plain: Any = table.plain()
    steps = TunedSteps(**{name: tuple(values) for name, values in plain.items()})
    wanted = sample(step_from_denoiser(denoise), steps.table(cosine_schedule(100)), start, fresh)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.0, 2.5])
def test_guidance_is_in_the_teachers_estimate(scale: float):
    diffusion = new_diffusion(CONFIG, 0).eval()
    start, feature, embedding = noise(2, *SHAPE), noise(2, 16, 8, 8, seed=1), noise(2, 64, seed=2)
    generator = torch.Generator().manual_seed(0)
    found = long_chain(diffusion, feature, embedding, start, 1, scale, generator)  # one step, at half of the schedule
    with torch.no_grad():
        conditional, unconditional = (
            diffusion.denoise_fn(start, feature, words, torch.full((2,), 50))
            for words in (embedding, torch.zeros_like(embedding))
        )
    a = float(cosine_schedule(100).alphas_cumprod[50])
    guided = unconditional + scale * (conditional - unconditional)
    torch.testing.assert_close(found, threshold((start - (1 - a) ** 0.5 * guided) / a**0.5), rtol=1e-4, atol=1e-5)
    assert (guided - conditional).abs().max() > 1e-3 or scale == 1


def test_times_of_chains():
    assert chosen_times(2, 1000) == tuple(int(1000 * share) for share in DEFAULT_TIMES[2])
    with pytest.raises(ValueError, match="steps is 3, expected 1, 2, 4"):
        chosen_times(3, 1000)
    with pytest.raises(ValueError, match="a schedule of 3 training steps is too short for 4 steps"):
        chosen_times(4, 3)


# --- Beginning at the mean -------------------------------------------------------------------------


def features_with_a_constant() -> Tensor:
    features = noise(4, 16, 8, 8, seed=5)
    features[:, 3] = 0.5
    return features


def test_the_constant_is_found_in_features():
    features = features_with_a_constant()
    ones = torch.einsum("nchw,c->nhw", features, constant_of(features))
    torch.testing.assert_close(ones, torch.ones_like(ones), rtol=1e-3, atol=1e-3)


def test_one_step_does_with_noise_what_the_teacher_does_at_the_mean():
    teacher, student = new_diffusion(CONFIG, 0).eval(), new_diffusion(CONFIG, 0).eval()
    mean, features, embedding = torch.tensor([0.1, -0.2, 0.9]), features_with_a_constant(), noise(4, 64, seed=2)
    table = center(student, (70,), mean, features)
    a = float(cosine_schedule(100).alphas_cumprod[70])
    with torch.no_grad():
        found = run_chain(student, table, features, embedding, FRAMES, torch.Generator().manual_seed(1))
        start = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(1))
        seen = (1 - a) ** 0.5 * start + a**0.5 * mean.view(1, 3, 1, 1, 1)
        predicted = teacher.denoise_fn(seen, features, embedding, torch.full((4,), 70))
        untouched = teacher.denoise_fn(start, features, embedding, torch.full((4,), 70))
    wanted = threshold((seen - (1 - a) ** 0.5 * predicted) / a**0.5)
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    assert (threshold((start - (1 - a) ** 0.5 * untouched) / a**0.5) - wanted).abs().mean() > 0.05


@pytest.mark.parametrize("times", [(70,), (80, 40), (85, 60, 40, 20)])
def test_chains_keep_the_mean(times: tuple[int, ...]):
    """With a network that knows the mean latent exactly, each step sees it as it must, and the last one gives it."""
    diffusion, mean = new_diffusion(CONFIG, 0), 0.9
    before = {key: value.clone() for key, value in diffusion.denoise_fn.state_dict().items()}
    table = center(diffusion, times, torch.full((3,), mean), features_with_a_constant())
    unet, name = diffusion.denoise_fn, "occlusion_map.1"
    # What `center` did to inputs and outputs: x = scale y + added, and out' = (out - removed) / scale.
    scale = float(unet.init_conv.weight[0, 0, 0, 0, 0].detach() / before["init_conv.weight"][0, 0, 0, 0, 0])
    added = float(cosine_schedule(100).sqrt_alphas_cumprod[times[0]]) * mean
    removed = float(before[f"{name}.bias"][0] - scale * unet.state_dict()[f"{name}.bias"][0])
    schedule, latent = cosine_schedule(100), 0.0
    for index, (time, gain) in enumerate(zip(table.times, table.gains, strict=True)):
        signal = float(schedule.sqrt_alphas_cumprod[time])
        spread = float(schedule.sqrt_one_minus_alphas_cumprod[time])
        seen = scale * latent + added
        assert seen == pytest.approx(signal * mean, rel=1e-3)
        predicted = ((seen - signal * mean) / spread - removed) / scale
        x0 = gain * (latent - spread * predicted) / signal
        if index + 1 < len(times):
            latent = float(schedule.sqrt_alphas_cumprod[times[index + 1]]) * x0
    assert x0 == pytest.approx(mean, rel=1e-3)


# --- The energy score ------------------------------------------------------------------------------


def test_distances_by_hand():
    zeros, ones = torch.zeros(2, 3, 2, 8, 8), torch.ones(2, 3, 2, 8, 8)
    torch.testing.assert_close(distance(zeros, ones), torch.tensor([2.0, 2.0]))  # the whole, and the mean of squares
    small = torch.ones(1, 3, 2, 3, 3)  # too small for squares
    torch.testing.assert_close(distance(small, 3 * small), torch.tensor([2.0]))


def test_the_score_is_smallest_for_the_datas_distribution():
    """Data of two points: their mean is worse than both of them, and so is one of them alone."""
    side = torch.where(torch.arange(4000) % 2 == 0, 1.0, -1.0).view(-1, 1, 1, 1, 1)
    wanted = side[torch.randperm(4000, generator=torch.Generator().manual_seed(0))] * torch.ones(1, 3, 1, 4, 4)

    def score(first: Tensor, second: Tensor) -> float:
        drawn = torch.stack([first.expand_as(wanted), second.expand_as(wanted)], dim=1)
        return float(energy_score(drawn, wanted))

    again = side[torch.randperm(4000, generator=torch.Generator().manual_seed(1))]
    right, collapsed, one = score(side, again), score(0 * side, 0 * side), score(side.abs(), side.abs())
    assert right == pytest.approx(1.0, rel=0.05)  # distances are 4 or 0: half of their mean
    assert collapsed == pytest.approx(2.0, rel=0.01)
    assert one == pytest.approx(2.0, rel=0.05)


def test_labels_and_scatter_are_learned(tmp_path: Path):
    """Latents are one of two levels, which the label tells, and noise; neither is in the teacher, which is new."""
    labels, scatter = torch.arange(64) % 2, 0.2
    latents = labels.view(-1, 1, 1, 1, 1) - 0.5 + scatter * noise(64, *SHAPE, seed=7)
    features = features_with_a_constant()[:1].expand(64, -1, -1, -1).contiguous()
    stage = DistillStage(
        CONFIG,
        new_lfae(LFAE, 0, SIZE),
        new_diffusion(CONFIG, 0),
        label_table(LABELS, 64),
        times=(70,),
        first={"latent": latents, "feature": features},
        examples={},
    )
    scores: list[float] = []
    train(
        stage,
        TeacherSamples(latents, features, labels, 0),
        OptimizerSettings(5e-3, (0.9, 0.99), clip_norm=1.0, cosine=True),
        run_settings(60, batch_size=4),
        tmp_path,
        progress=lambda done, total, losses: scores.append(losses["energy"]),
    )
    # Distances are root mean squares, counted twice (`views`), in deviations of the latents.
    without_scatter = 2 * scatter / float(latents.std())  # 0.74
    without_label = 2**0.5
    assert scores[0] > 0.9 * without_label
    assert float(np.mean(scores[-10:])) < 0.88 * without_scatter  # the distribution itself: 0.71 of it


def test_a_condition_is_drawn_twice_with_noise_of_its_own():
    stage = DistillStage(
        CONFIG,
        new_lfae(LFAE, 0, SIZE),
        new_diffusion(CONFIG, 0),
        label_table(LABELS, 64),
        times=(80, 40),
        first={"latent": noise(4, *SHAPE), "feature": features_with_a_constant()},
        examples={},
    )
    batch = {"latent": noise(1, *SHAPE), "feature": noise(1, 16, 8, 8), "label": torch.tensor([-1])}
    seen: list[int] = []
    stage.network.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    loss = stage.losses(batch, torch.Generator().manual_seed(0))["energy"]
    assert seen == [DRAWS, DRAWS]
    loss.backward()
    missing = [
        name for name, weight in stage.network.named_parameters() if weight.requires_grad and weight.grad is None
    ]
    assert missing == []


# --- The last level ---------------------------------------------------------------------------------


def last_stage(times: tuple[int, ...], latents: Tensor, features: Tensor) -> LastStage:
    return LastStage(
        CONFIG,
        new_lfae(LFAE, 0, SIZE),
        new_diffusion(CONFIG, 0),
        label_table(LABELS, 64),
        times=times,
        first={"latent": latents, "feature": features},
        examples={},
    )


@pytest.mark.parametrize("times", [(70,), (80, 40), (85, 60, 40, 20)])
def test_the_exported_last_level_gives_the_trained_latents(times: tuple[int, ...], monkeypatch: pytest.MonkeyPatch):
    """The checkpoint's chain, from the noise of the kept features, is what the losses see, at each step."""
    latents, features = (
        0.1 * noise(4, *SHAPE) + torch.tensor([0.0, 0.1, 0.8]).view(3, 1, 1, 1),
        features_with_a_constant(),
    )
    stage = last_stage(times, latents, features)
    with torch.no_grad():
        for head in (stage.last_level.final_conv, stage.last_level.occlusion_map):
            assert head.conv.bias is not None
            head.conv.weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
            head.conv.bias.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, -1, 2])
    kept = stage.keep(latents, features, labels, 7, no_report)
    exported = new_diffusion(CONFIG, 0)
    exported.load_state_dict(stage.checkpoint(stage.last_level.state_dict())["diffusion"])
    seen: list[Tensor] = []

    def score(drawn: Tensor, wanted: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(drawn)
        return drawn.sum(), wanted.sum() + feature.sum()

    monkeypatch.setattr(Score, "__call__", lambda self, *given: score(*given))
    generator = torch.Generator().manual_seed(7 * 0x9E3779B97F4A7C15 % 2**63)
    for step, (time, gain) in enumerate(zip(stage.table_of_steps.times, stage.table_of_steps.gains, strict=True)):
        with torch.no_grad():
            stage.losses(batch_of(kept, step), torch.Generator())
            signal, spread = levels(exported, time)
            latent = torch.randn((2 * len(latents), *SHAPE), generator=generator)
            if step:
                before = latents - stage.offsets[step - 1].view(1, 3, 1, 1, 1)
                latent = signal * before.repeat_interleave(2, 0) + spread * latent
            words = stage.embedding_of(labels).repeat_interleave(2, 0)
            shown = features.repeat_interleave(2, 0)
            predicted = exported.denoise_fn(latent, shown, words, torch.full((len(latent),), time))
            found = gain * (latent - spread * predicted) / signal
        leak = gain / signal * latent  # what little of the input is left
        wanted = seen[-1].flatten(0, 1) - stage.offsets[step].view(1, 3, 1, 1, 1)
        assert leak.square().mean().sqrt() < 2e-3 * latent.square().mean().sqrt() / float(spread) + 1e-9
        torch.testing.assert_close(found - leak, wanted, rtol=1e-2, atol=4e-3)


def batch_of(kept: KeptFeatures, step: int) -> dict[str, Tensor]:
    return {
        "inputs": kept.inputs[:, step],
        "first": kept.first[:, step],
        "condition": kept.conditions[:, step],
        "latent": kept.latents,
        "feature": kept.features,
        "step": torch.full((len(kept.latents),), step),
    }


def test_later_steps_see_the_data_with_the_noise_of_their_time():
    """What `center` adds to the first convolution is what the estimate before lacks: the network sees x + noise."""
    latents, features = 0.1 * noise(4, *SHAPE) + 0.8, features_with_a_constant()
    stage = last_stage((80, 40), latents, features)
    (s0, n0), (s1, _) = ([float(level) for level in levels(stage.diffusion, time)] for time in (80, 40))
    given = s1 * (latents - stage.offsets[0].view(1, 3, 1, 1, 1))
    mean = latents.mean(dim=(0, 2, 3, 4)).view(1, 3, 1, 1, 1)
    torch.testing.assert_close(n0 * given + s0 * mean, n0 * s1 * latents)
    assert stage.offsets[1].tolist() == [0, 0, 0]


def test_an_epoch_has_each_picture_at_each_step():
    stage = last_stage((80, 40), noise(3, *SHAPE), features_with_a_constant()[:3])
    kept = stage.keep(noise(3, *SHAPE), features_with_a_constant()[:3], torch.tensor([0, 1, 2]), 0, no_report)
    assert kept.inputs.shape == (3, 2, DRAWS, 2 * CONFIG.dm.width, FRAMES, 8, 8)
    assert kept.inputs.nbytes + kept.first.nbytes == 3 * bytes_kept(CONFIG, 2, SHAPE)
    examples = [kept[number] for number in range(12)]
    shown = [(int(one["step"]), float(one["latent"].sum())) for one in examples]
    assert len(set(shown[:6])) == len(set(shown[6:])) == 6
    assert shown[:6] != shown[6:]
    assert not torch.equal(examples[0]["inputs"][0], examples[0]["inputs"][1])  # two draws


def test_warped_features_are_those_of_the_decoder():
    latents, features = 0.3 * noise(2, *SHAPE), noise(2, 16, 8, 8, seed=1)
    found = warped(latents, features, residual_flow=True)
    flow = latent_to_flow(latents[:, :, 1], residual_flow=True)
    wanted = torch.nn.functional.grid_sample(features, flow.grid, align_corners=False) * flow.occlusion
    torch.testing.assert_close(found[:, :, 1], wanted)


def test_the_last_level_learns_labels_and_scatter(tmp_path: Path):
    """As above, but all other levels are those of a new network."""
    labels, scatter = torch.arange(64) % 2, 0.2
    latents = (labels.view(-1, 1, 1, 1, 1) - 0.5 + scatter * noise(64, 1, 1, 1, 1, seed=7)).expand(-1, *SHAPE)
    latents = latents.contiguous() + 0.01 * noise(64, *SHAPE)
    features = features_with_a_constant()[:1].expand(64, -1, -1, -1).contiguous()
    stage = last_stage((70,), latents, features)
    kept = stage.keep(latents, features, labels, 0, no_report)
    optimizer = OptimizerSettings(1e-2, (0.9, 0.95), clip_norm=2.0, cosine=True)
    outcome = train(
        stage,
        kept,
        optimizer,
        run_settings(100, batch_size=4),
        tmp_path,
    )
    distilled = new_diffusion(CONFIG, 0).eval()
    distilled.load_state_dict(torch.load(outcome.checkpoint, weights_only=True)["diffusion"])
    with torch.no_grad():
        drawn = run_chain(
            distilled,
            stage.table_of_steps,
            features,
            stage.embedding_of(labels),
            FRAMES,
            torch.Generator().manual_seed(9),
        )
    level = drawn.mean(dim=(1, 2, 3, 4))
    assert level[labels == 0].mean() == pytest.approx(-0.5, abs=0.12)
    assert level[labels == 1].mean() == pytest.approx(0.5, abs=0.12)


# --- Runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learn", ["all", "last"])
@pytest.mark.parametrize("sampling", [None, Sampling(5, steps=3, guidance=2.0)], ids=["data", "samples"])
def test_a_killed_run_ends_in_the_same_bits(
    pair: tuple[Path, Path], tmp_path: Path, sampling: Sampling | None, learn: DistillLearn
):
    run(pair, tmp_path / "whole", sampling=sampling, learn=learn)
    with pytest.raises(Killed):
        run(pair, tmp_path / "killed", sampling=sampling, learn=learn, progress=killed_after(3))
    assert torch.load(tmp_path / "killed" / STATE, weights_only=True)["step"] == 2
    run(pair, tmp_path / "killed", sampling=sampling, learn=learn, resume=True)
    assert_same_bits(tmp_path / "killed" / "dm.pth", tmp_path / "whole" / "dm.pth")
    assert_same_bits(tmp_path / "killed" / STATE, tmp_path / "whole" / STATE)


def test_samples_are_drawn_once_and_interrupted_drawing_goes_on(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lfdm_models.training.teacher._BATCH", 2)
    sampling = Sampling(5, steps=2)
    run(pair, tmp_path / "whole", 1, sampling=sampling)

    def killed(done: int, total: int) -> None:
        assert total == 5
        if done == 4:
            raise Killed

    teacher = Teacher(*pair, CONFIG)
    arguments: Any = (teacher, 2, POOL, OPTIMISER, run_settings(1), tmp_path / "killed")
    with pytest.raises(Killed):
        distill(*arguments, sampling=sampling, on_sample=killed)
    drawn: list[int] = []
    distill(*arguments, sampling=sampling, on_sample=lambda done, total: drawn.append(done))
    assert drawn == [5]
    assert_tensors_equal(tmp_path, "samples-0.pt", "latents")
    with pytest.raises(TrainingError, match="samples of another teacher or other settings"):
        distill(*arguments, sampling=Sampling(5, steps=2, guidance=3.0), resume=True)


def assert_tensors_equal(folder: Path, name: str, key: str) -> None:
    first, second = (torch.load(folder / run / name, weights_only=True)[key] for run in ("whole", "killed"))
    assert first.shape == (5, *SHAPE)
    assert torch.equal(first, second)


def test_processes_share_the_drawing(tmp_path: Path):
    """Each draws every second sample, and has all of them afterwards."""
    stage = DmStage(CONFIG, new_lfae(LFAE, 0, SIZE), new_diffusion(CONFIG, 0), label_table(LABELS, 64), examples={})
    picture = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)

    def draw(rank: int) -> TeacherSamples:
        processes = Processes("cpu")
        processes.count, processes.rank = 2, rank
        if rank:  # it waits for the first one's file, which is not there yet
            processes.wait = killed  # type: ignore[method-assign]
        settings = Sampling(5, steps=2)
        return draw_samples(stage, lambda _: picture, FRAMES, settings, tmp_path, processes, no_report)

    def killed() -> None:
        raise Killed

    with pytest.raises(Killed):
        draw(1)
    samples = draw(0)
    parts = [torch.load(tmp_path / f"samples-{rank}.pt", weights_only=True)["latents"] for rank in range(2)]
    assert [len(part) for part in parts] == [3, 2]
    assert torch.equal(samples.latents[[1, 3]], parts[1])
    assert torch.equal(samples.latents[[0, 2, 4]], parts[0])
    assert samples.labels.tolist() == [0, 1, 2, 3, 4]
    assert len({int(samples[number]["label"]) for number in range(5)}) == 5  # an epoch has them all


def test_pictures_alone_are_enough(pair: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "pictures").mkdir()
    for index in range(3):
        Image.new("RGB", (40, 50), (80 * index, 100, 30)).save(tmp_path / "pictures" / f"{index}.png")
    outcome = run(pair, tmp_path / "run", 1, sampling=Sampling(4, tmp_path / "pictures", steps=1))
    told = torch.load(outcome.checkpoint, weights_only=True)
    assert told["labels"] == list(LABELS)
    assert told["training"]["examples"]["data"] == "procedural"  # as the DM that was distilled
    with pytest.raises(TrainingError, match="expected a folder of pictures"):
        run(pair, tmp_path / "other", 1, sampling=Sampling(4, tmp_path / "none", steps=1))


def test_a_teacher_of_safetensors_serves_too(pair: tuple[Path, Path], tmp_path: Path):
    save_model(load_model(*pair), tmp_path / "model")
    files = tmp_path / "model" / "lfae.safetensors", tmp_path / "model" / "dm.safetensors"
    first, second = run(pair, tmp_path / "a", 1), run(files, tmp_path / "b", 1)
    assert_same_bits(first.checkpoint, second.checkpoint)


# --- What comes out --------------------------------------------------------------------------------


@pytest.mark.full  # a minute: graphs of another architecture are traced
def test_a_distilled_model_is_a_bundle_whose_sampler_is_its_own(pair: tuple[Path, Path], tmp_path: Path):
    outcome = run(pair, tmp_path / "run")
    model = load_model(pair[0], outcome.checkpoint)  # strict: the released keys, and no others
    assert model.config == CONFIG
    save_model(model, tmp_path / "model")
    bundle = export_bundle(load_model_folder(tmp_path / "model"), tmp_path / "bundle", drive=False)
    report = verify_bundle(bundle, threads=1)
    assert report.passed
    assert report.sampler == "as distilled, 2 steps"
    assert (bundle.manifest.sampler.sampler, bundle.manifest.sampler.steps) == ("tuned", 2)
    pipeline = Pipeline.open(bundle.path, threads=1)
    image = np.random.default_rng(0).integers(0, 255, (SIZE, SIZE, 3), np.uint8)
    draws = [noise(1, *SHAPE, seed=seed).numpy() for seed in range(2)]
    made = pipeline.generate(image, label="nod", noise=iter(draws))
    told = torch.load(outcome.checkpoint, weights_only=True)["training"]["few_steps"]
    table = FewSteps(tuple(told["times"]), tuple(told["gains"]))
    shown = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    stream = iter(draws)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        feature = model.lfae.generator.encode(shown)[-1]
        embedding = torch.from_numpy(model.label_embeddings["nod"])[None]
        patch.setattr(torch, "randn", lambda *_, **__: torch.from_numpy(next(stream)))
        wanted = run_chain(model.diffusion, table, feature, embedding, FRAMES, torch.Generator())
    assert (made.settings["sampler"], made.settings["steps"]) == ("tuned", 2)
    np.testing.assert_allclose(made.latent, wanted, rtol=1e-3, atol=1e-4)


def test_a_damaged_table_is_refused(pair: tuple[Path, Path], tmp_path: Path):
    outcome = run(pair, tmp_path / "run", 1)
    content = torch.load(outcome.checkpoint, weights_only=True)
    content["training"]["few_steps"]["gains"] = [1.0]
    torch.save(content, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match="the steps that it was distilled for are wrong"):
        load_model(pair[0], tmp_path / "damaged.pth")


# --- The command -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "2"], "--guidance is for samples of the teacher, but the data's clips are used"),
        (["--images", "faces"], "--images is for samples of the teacher, but the data's clips are used"),
        (["--dm", "none.pth"], "none.pth does not exist; give the path of a DM checkpoint"),
        (["--updates", "0", "--guidance", "2"], "guidance is distilled by training, but --updates is 0"),
        (["--synthetic", "0"], "samples and teacher's steps must be 1 or more, not 0 and 25"),
        (["--data", "mug"], "needs its folder"),
    ],
)
def test_errors_are_one_line(
    pair: tuple[Path, Path],
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
):
    common = ["--lfae", str(pair[0]), "--dm", str(pair[1]), "--steps", "2", "--updates", "1"]
    assert main(["distill", *common, "--out", str(tmp_path / "run"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("lfdm-train: error: ")
    assert error.count("\n") == 1


def test_the_command_distils(pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["--lfae", str(pair[0]), "--dm", str(pair[1]), "--image-size", str(SIZE), "--frames", str(FRAMES)]
    options = [*common, "--batch-size", "1", "--device", "cpu", "--preview-every", "1", "--synthetic", "2"]
    options += ["--teacher-steps", "1", "--guidance", "1.5", "--out", str(tmp_path / "run")]
    assert main(["distill", *options, "--steps", "1", "--updates", "1"]) == 0
    assert f"checkpoint  {tmp_path / 'run' / 'dm.pth'}" in capsys.readouterr().out
    told = torch.load(tmp_path / "run" / "dm.pth", weights_only=True)["training"]
    assert told["guidance distilled"] == 1.5
    assert len(told["few_steps"]["times"]) == 1
    assert (tmp_path / "run" / "previews" / "step_0000001.gif").exists()
    assert main(["distill", *options, "--steps", "1", "--updates", "1"]) == 1
    assert "resume it, or choose another folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["distill", *options, "--steps", "3", "--updates", "1"])


def test_the_beginning_alone_is_a_model_too(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    common = ["--lfae", str(pair[0]), "--dm", str(pair[1]), "--image-size", str(SIZE), "--frames", str(FRAMES)]
    options = [*common, "--pool", "4", "--steps", "2", "--updates", "0", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["distill", *options]) == 0
    assert "not trained" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["dm.pth"]
    model = load_model(pair[0], tmp_path / "dm.pth")
    found, teacher = model.diffusion.state_dict(), load_model(*pair).diffusion.state_dict()
    changed = {key for key, value in found.items() if not torch.equal(value, teacher[key])}
    heads = ("final_conv.1", "occlusion_map.1")
    assert changed == {
        "denoise_fn.init_conv.weight",
        *(f"denoise_fn.{head}.{leaf}" for head in heads for leaf in ("weight", "bias")),
    }


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_two_steps_are_trained_unless_told_otherwise(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
):
    monkeypatch.setattr("lfdm_models.training.cli.LAST_UPDATES", 2)
    common = ["--lfae", str(pair[0]), "--dm", str(pair[1]), "--image-size", str(SIZE), "--frames", str(FRAMES)]
    options = ["distill", *common, "--pool", "4", "--steps", str(steps), "--device", "cpu", "--batch-size", "2"]
    assert main([*options, "--out", str(tmp_path / "last")]) == 0
    told = torch.load(tmp_path / "last" / "dm.pth", weights_only=True)
    assert (told["step"], told["training"]["learn"], told["training"]["examples"]["kept"]) == (2, "last", 6)
    found, teacher = load_model(pair[0], tmp_path / "last" / "dm.pth").diffusion, load_model(*pair).diffusion
    weights, before = found.state_dict(), teacher.state_dict()
    changed = {key.split(".")[1] for key in weights if not torch.equal(weights[key], before[key])}
    assert changed == {"init_conv", "ups", "final_conv", "occlusion_map"}
    assert main([*options, "--out", str(tmp_path / "none"), "--learn", "all"]) == 0
    assert torch.load(tmp_path / "none" / "dm.pth", weights_only=True)["step"] == 0


def test_a_dm_of_other_labels_is_refused(pair: tuple[Path, Path], tmp_path: Path):
    content = torch.load(pair[1], weights_only=True)
    content["labels"] = ["jump", *content["labels"][1:]]
    torch.save(content, tmp_path / "dm.pth")
    with pytest.raises(TrainingError, match=r"was trained with the labels jump, .* and the data has 'smile'"):
        run((pair[0], tmp_path / "dm.pth"), tmp_path / "run", 1)
