from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lfdm_export import load_model
from lfdm_models.config import DmConfig, HourglassConfig, LfaeConfig, LfdmConfig
from lfdm_models.lfae import flow_to_latent
from lfdm_models.training import recipes
from lfdm_models.training.cli import main
from lfdm_models.training.conditions import label_table
from lfdm_models.training.dm import DmStage, new_diffusion
from lfdm_models.training.ema import Ema
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.lfae import LfaeStage, lfae_config, load_lfae, new_lfae, plain
from lfdm_models.training.loop import STATE, Outcome, ReportProgress, no_report
from lfdm_models.training.procedural import LABELS
from lfdm_models.training.settings import DM_OPTIMIZER, LFAE_OPTIMIZER, SMALL, OptimizerSettings, RunSettings

SIZE, FRAMES = 32, 4
LFAE = LfaeConfig(
    regions=3,
    width=8,
    max_width=16,
    bottleneck_blocks=1,
    flow_predictor=HourglassConfig(8, max_width=16, blocks=2),
    region_predictor=HourglassConfig(8, max_width=16, blocks=2),
    bg_predictor=HourglassConfig(8, max_width=16, blocks=2),
)
DM = DmConfig(
    width=8,
    multipliers=(1, 2),
    heads=2,
    head_width=8,
    rotary_width=8,
    feature_channels=16,
    text_width=64,
    training_steps=100,
)
CONFIG = LfdmConfig(LFAE, DM, residual_flow=True)
DATA = recipes.DataSettings(image_size=SIZE, frames=FRAMES)
QUICK = OptimizerSettings(2e-3, (0.5, 0.999), milestones=(0.5,), warm_up=3, clip_norm=20.0)


class Killed(Exception):
    """Stands for the end of a process."""


def run_settings(steps: int, **changes: Any) -> RunSettings:
    settings: dict[str, Any] = {"batch_size": 2, "checkpoint_every": 2, "log_every": 0, "device": "cpu"}
    return RunSettings(steps=steps, **{**settings, **changes})


def train_lfae(
    folder: Path, run: RunSettings, *, resume: bool = False, progress: ReportProgress = no_report
) -> Outcome:
    return recipes.train_lfae(LFAE, DATA, QUICK, run, folder, resume=resume, progress=progress)


def train_dm(
    folder: Path, lfae: Path, run: RunSettings, *, resume: bool = False, progress: ReportProgress = no_report
) -> Outcome:
    return recipes.train_dm(CONFIG, lfae, DATA, QUICK, run, folder, resume=resume, progress=progress)


def tensors(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """All tensors of a nested checkpoint by path."""
    if isinstance(content, Tensor):
        return {prefix: content}
    items = content.items() if isinstance(content, Mapping) else enumerate(content) if isinstance(content, list) else ()
    return {path: tensor for key, value in items for path, tensor in tensors(value, f"{prefix}/{key}").items()}


def assert_same_bits(first: Path, second: Path) -> None:
    found, wanted = (tensors(torch.load(path, weights_only=True)) for path in (first, second))
    assert found.keys() == wanted.keys()
    assert len(found) > 20
    different = [key for key in found if not torch.equal(found[key], wanted[key])]
    assert different == []


@pytest.fixture(scope="module")
def lfae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("lfae")
    outcome = train_lfae(folder, run_settings(6, accumulate=2))
    assert outcome.finished
    return folder


@pytest.fixture(scope="module")
def dm_run(tmp_path_factory: pytest.TempPathFactory, lfae_run: Path) -> Path:
    folder = tmp_path_factory.mktemp("dm")
    assert train_dm(folder, lfae_run / "lfae.pth", run_settings(6)).finished
    return folder


# --- Resuming --------------------------------------------------------------------------------------


def killed_after(step: int) -> ReportProgress:
    def progress(done: int, total: int, losses: Mapping[str, float]) -> None:
        if done == step:
            raise Killed

    return progress


def test_a_killed_lfae_run_ends_in_the_same_bits(lfae_run: Path, tmp_path: Path):
    run = run_settings(6, accumulate=2)
    with pytest.raises(Killed):
        train_lfae(tmp_path, run, progress=killed_after(5))  # the last checkpoint is of step 4
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 4
    steps: list[int] = []
    train_lfae(tmp_path, run, resume=True, progress=lambda done, total, losses: steps.append(done))
    assert steps == [5, 6]
    assert_same_bits(tmp_path / "lfae.pth", lfae_run / "lfae.pth")
    assert_same_bits(tmp_path / STATE, lfae_run / STATE)


def test_a_killed_dm_run_ends_in_the_same_bits(lfae_run: Path, dm_run: Path, tmp_path: Path):
    run = run_settings(6)
    with pytest.raises(Killed):
        train_dm(tmp_path, lfae_run / "lfae.pth", run, progress=killed_after(3))
    train_dm(tmp_path, lfae_run / "lfae.pth", run, resume=True)
    assert_same_bits(tmp_path / "dm.pth", dm_run / "dm.pth")
    assert_same_bits(tmp_path / STATE, dm_run / STATE)


def test_a_process_that_is_killed_leaves_a_run_that_can_be_resumed(lfae_run: Path, tmp_path: Path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch
from pathlib import Path
from tests.models.test_training import run_settings, train_lfae
torch.set_num_threads(1)
def progress(done, total, losses):
    if done == 3:
        os.kill(os.getpid(), signal.SIGKILL)
train_lfae(Path({str(tmp_path)!r}), run_settings(6, accumulate=2), progress=progress)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert torch.load(tmp_path / STATE, weights_only=True)["step"] == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert train_lfae(tmp_path, run_settings(6, accumulate=2), resume=True).finished
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(tmp_path / "lfae.pth", lfae_run / "lfae.pth")
    assert not list(tmp_path.glob(".*.part"))


def test_a_request_to_stop_costs_no_step(lfae_run: Path, tmp_path: Path):
    run = run_settings(6, accumulate=2, checkpoint_every=0)

    def progress(done: int, total: int, losses: Mapping[str, float]) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    outcome = train_lfae(tmp_path, run, progress=progress)
    assert (outcome.step, outcome.finished, outcome.signal) == (3, False, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    assert train_lfae(tmp_path, run, resume=True).finished
    assert_same_bits(tmp_path / "lfae.pth", lfae_run / "lfae.pth")


def test_a_run_is_not_overwritten_nor_resumed_with_other_settings(lfae_run: Path, tmp_path: Path):
    with pytest.raises(TrainingError, match="holds a training run already"):
        train_lfae(lfae_run, run_settings(6, accumulate=2))
    with pytest.raises(TrainingError, match="was trained with seed = 0, this run has 1"):
        train_lfae(lfae_run, run_settings(6, accumulate=2, seed=1), resume=True)
    (tmp_path / STATE).write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="cannot be read as the state of a training run"):
        train_lfae(tmp_path, run_settings(6), resume=True)


def test_the_seed_decides(lfae_run: Path, tmp_path: Path):
    train_lfae(tmp_path, run_settings(6, accumulate=2, seed=5))
    first, second = (load_lfae(path / "lfae.pth")[0].state_dict() for path in (lfae_run, tmp_path))
    assert not torch.equal(first["generator.final.weight"], second["generator.final.weight"])


def test_every_pass_draws_numbers_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    losses, seeds = LfaeStage.losses, []

    def spy(stage: LfaeStage, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        seeds.append(generator.initial_seed())
        return losses(stage, batch, generator)

    monkeypatch.setattr(LfaeStage, "losses", spy)
    for seed in (0, 1):
        train_lfae(tmp_path / str(seed), run_settings(3, accumulate=2, batch_size=1, seed=seed))
    assert len(set(seeds)) == len(seeds) == 2 * 3 * 2


def test_a_loss_that_is_no_number_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LfaeStage, "losses", lambda stage, batch, generator: {"similarity": torch.tensor(torch.nan)})
    with pytest.raises(TrainingError, match="the loss of step 1 is nan: the training diverged"):
        train_lfae(tmp_path, run_settings(3))
    assert not (tmp_path / STATE).exists()


# --- What is learnt --------------------------------------------------------------------------------


def test_losses_fall(tmp_path: Path):
    seen: list[dict[str, float]] = []

    def progress(done: int, total: int, losses: Mapping[str, float]) -> None:
        seen.append(dict(losses))

    def fell(name: str, factor: float) -> None:
        first, last = (np.mean([losses[name] for losses in part]) for part in (seen[:5], seen[-10:]))
        assert last < factor * first, f"{name}: from {first} to {last}"

    outcome = train_lfae(tmp_path / "lfae", run_settings(60, batch_size=4, ema=0.9), progress=progress)
    fell("similarity", 0.95)  # it begins with a copy of the source, which is not bad
    fell("shift", 0.9)
    seen.clear()
    train_dm(tmp_path / "dm", outcome.checkpoint, run_settings(60, batch_size=4, ema=0.9), progress=progress)
    fell("noise", 0.7)


def test_checkpoints_are_of_the_released_layout_and_load(lfae_run: Path, dm_run: Path):
    lfae = torch.load(lfae_run / "lfae.pth", weights_only=True)
    dm = torch.load(dm_run / "dm.pth", weights_only=True)
    assert {"generator", "region_predictor", "bg_predictor", "example", "epoch"} <= lfae.keys()
    assert lfae["example"] == 6 * 2 * 2
    assert {"diffusion", "example"} <= dm.keys()
    model = load_model(lfae_run / "lfae.pth", dm_run / "dm.pth", residual_flow=True, region_pad=3)
    assert model.config.lfae == LFAE
    assert model.config.dm == DM
    assert dm["labels"] == list(LABELS)
    assert dm["label_embeddings"].shape == (len(LABELS), 64)
    state = torch.load(dm_run / STATE, weights_only=True)
    assert torch.equal(model.diffusion.denoise_fn.init_conv.weight.detach(), state["ema"]["init_conv.weight"]), (
        "the checkpoint holds the mean weights"
    )
    assert not torch.equal(state["ema"]["init_conv.weight"], state["network"]["init_conv.weight"])


def test_a_checkpoint_tells_its_architecture(lfae_run: Path, tmp_path: Path):
    lfae, training = load_lfae(lfae_run / "lfae.pth")
    assert lfae.config == LFAE == lfae_config(plain(LFAE))
    assert training["examples"]["data"] == "procedural"
    content = torch.load(lfae_run / "lfae.pth", weights_only=True)
    del content["training"]
    torch.save(content, tmp_path / "released.pth")
    with pytest.raises(TrainingError, match="does not store its architecture"):
        load_lfae(tmp_path / "released.pth")
    assert load_lfae(tmp_path / "released.pth", LFAE)[0].config == LFAE
    with pytest.raises(TrainingError, match="not an LFAE of this architecture"):
        load_lfae(tmp_path / "released.pth", SMALL.lfae)


# --- The parts -------------------------------------------------------------------------------------


def dm_stage(**changes: Any) -> DmStage:
    lfae, diffusion = new_lfae(LFAE, 0, SIZE), new_diffusion(CONFIG, 0)
    return DmStage(CONFIG, lfae, diffusion, label_table(LABELS, 64), examples={}, **changes)


def clip_batch(label: int = 2) -> dict[str, Tensor]:
    frames = torch.rand(2, 3, FRAMES, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    return {"frames": frames, "label": torch.tensor([label, label])}


def noise_loss(stage: DmStage, label: int) -> float:
    return stage.losses(clip_batch(label), torch.Generator().manual_seed(4))["noise"].item()


def test_targets_are_the_flow_of_each_frame_from_the_first():
    stage, frames = dm_stage(), clip_batch()["frames"]
    latent, feature = stage.encode(frames)
    assert latent.shape == (2, 3, FRAMES, SIZE // 4, SIZE // 4)
    flow = stage.lfae.estimate_motion(frames[1:, :, 0], frames[1:, :, 3])
    torch.testing.assert_close(latent[1, :, 3], flow_to_latent(flow, residual_flow=True)[0])
    torch.testing.assert_close(feature, stage.lfae.generator.encode(frames[:, :, 0])[-1])


def test_labels_matter_unless_they_are_dropped():
    stage, without = dm_stage(null_probability=0.0), dm_stage(null_probability=1.0)
    assert noise_loss(stage, 1) != pytest.approx(noise_loss(stage, 2), rel=1e-5)
    assert noise_loss(without, 1) == pytest.approx(noise_loss(without, 2), rel=1e-6)
    assert noise_loss(stage, -1) == pytest.approx(noise_loss(without, 1), rel=1e-6), "no label is the null embedding"


def test_embeddings_are_dropped_as_often_as_asked():
    stage = dm_stage()
    seen: list[Tensor] = []
    stage.diffusion.denoise_fn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2]))
    for seed in range(60):
        stage.losses(clip_batch(), torch.Generator().manual_seed(seed))
    dropped = (torch.cat(seen) == 0).all(dim=1).float().mean().item()
    assert 0.03 < dropped < 0.2


def test_the_loss_in_bfloat16_is_near_that_in_float32():
    stage = dm_stage()
    with torch.autocast("cpu", torch.bfloat16):
        coarse = noise_loss(stage, 1)
    assert coarse == pytest.approx(noise_loss(stage, 1), rel=0.03)


def test_a_still_background_leaves_a_picture_where_it_is():
    lfae = new_lfae(LFAE, 0, SIZE).eval()
    image = torch.rand(1, 3, SIZE, SIZE)
    background = lfae.bg_predictor(image, image)
    grid = torch.tensor([[-1.0, 0.0, 1.0], [1 / 7, 0.0, 1.0]])  # two of eight points a side, homogeneous
    centers = torch.tensor([[-7 / 8, 0.0], [1 / 8, 0.0]])  # where pixels of the latent have their centers
    torch.testing.assert_close((grid @ background[0].T)[:, :2], centers)


def test_the_mean_of_weights_by_hand():
    network = torch.nn.BatchNorm1d(1)
    ema = Ema(network, 0.75)
    with torch.no_grad():
        network.weight.fill_(5.0)
        network.get_buffer("num_batches_tracked").fill_(7)
    ema.update(network, step=10_000)
    assert ema.weights["weight"].item() == pytest.approx(0.75 * 1.0 + 0.25 * 5.0)
    assert ema.weights["num_batches_tracked"].item() == 7
    ema.update(network, step=0)  # early on the decay is 1 / 10
    assert ema.weights["weight"].item() == pytest.approx(0.1 * 2.0 + 0.9 * 5.0)


def test_the_step_size_follows_the_published_milestones():
    rates = [LFAE_OPTIMIZER.rate(step, 100) for step in (0, 59, 60, 89, 90, 99)]
    np.testing.assert_allclose(rates, [2e-4, 2e-4, 2e-5, 2e-5, 2e-6, 2e-6])
    assert DM_OPTIMIZER.rate(0, 100) == DM_OPTIMIZER.rate(99, 100) == 1e-4
    assert OptimizerSettings(1.0, (0.9, 0.99), warm_up=4).rate(1, 100) == 0.5


def test_settings_check_themselves():
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        OptimizerSettings(0.0, (0.9, 0.99))
    with pytest.raises(ValueError, match="steps, batch_size and accumulate must be 1 or more"):
        RunSettings(steps=0, batch_size=1)


def test_the_small_model_is_small():
    networks = new_lfae(SMALL.lfae, 0, 64), new_diffusion(SMALL, 0)
    size = sum(4 * tensor.numel() for network in networks for tensor in network.state_dict().values())
    assert size <= 16e6
    assert SMALL.latent_size(64) == 16


def test_the_global_random_state_is_left_alone():
    before = torch.get_rng_state()
    stage = dm_stage()
    noise_loss(stage, 1)
    assert torch.equal(before, torch.get_rng_state())


# --- The command -----------------------------------------------------------------------------------


def test_the_command_trains_and_previews(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["--steps", "1", "--batch-size", "1", "--frames", "2", "--image-size", "32", "--log-every", "1"]
    lfae = [*common, "--out", str(tmp_path / "lfae"), "--preview-every", "1"]
    assert main(["lfae", *lfae]) == 0
    assert f"checkpoint  {tmp_path / 'lfae' / 'lfae.pth'}" in capsys.readouterr().out
    with Image.open(tmp_path / "lfae" / "previews" / "step_0000001.gif") as preview:
        assert preview.size == (3 * 32, 4 * 32)
    assert '"step": 1' in (tmp_path / "lfae" / "logs" / "losses.jsonl").read_text(encoding="utf-8")
    assert main(["lfae", *lfae]) == 1
    assert "resume it, or choose another folder" in capsys.readouterr().err
    assert main(["lfae", *lfae, "--resume"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "mug"], "needs its folder"),
        (["--data", "plain", "--root", "nowhere"], "there is no folder nowhere"),
        (["--subjects", "one"], "expected numbers such as 1,3,5"),
        (["--steps", "0"], "must be 1 or more"),
        (["--vgg", "none.pth"], "weights of VGG-19 cannot be read"),
        (["--start", "none.pth"], "none.pth does not exist; give the path of an LFAE checkpoint"),
    ],
)
def test_errors_are_one_line(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["lfae", "--steps", "1", "--out", str(tmp_path / "run"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("lfdm-train: error: ")
    assert error.count("\n") == 1
