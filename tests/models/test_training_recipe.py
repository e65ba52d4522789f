"""What a run on a CPU needs: a pool of clips, landmarks, the mixture, errors weighed by noise level."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lfdm_export import InputError, load_model
from lfdm_models.config import HourglassConfig, LfaeConfig
from lfdm_models.generator import Candidates, Flow, warp
from lfdm_models.layers import coordinate_grid
from lfdm_models.regions import Regions
from lfdm_models.training import recipes
from lfdm_models.training.cli import main
from lfdm_models.training.data import NO_CLIP, FramePairs, ProceduralClips, TrainingClips, batches
from lfdm_models.training.dm import DmStage, load_diffusion, new_diffusion, noise_weight
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.figure import draw
from lfdm_models.training.landmarks import LANDMARKS, landmarks
from lfdm_models.training.lfae import LfaeStage, landmark_loss, load_lfae, mixture_loss, new_lfae, regions_of
from lfdm_models.training.loop import STATE
from lfdm_models.training.losses import PyramidLoss
from lfdm_models.training.procedural import LABELS, clip_parts, sample_clip
from lfdm_models.training.processes import Processes
from lfdm_models.training.settings import COSINE_END, LFAE_OPTIMIZER, SMALL, OptimizerSettings
from tests.models.test_training import CONFIG, FRAMES, QUICK, SIZE, Killed, assert_same_bits, killed_after, run_settings

MANY = LfaeConfig(
    regions=len(LANDMARKS),
    width=8,
    max_width=16,
    bottleneck_blocks=1,
    flow_predictor=HourglassConfig(8, max_width=16, blocks=2),
    region_predictor=HourglassConfig(8, max_width=16, blocks=2),
    bg_predictor=HourglassConfig(8, max_width=16, blocks=2),
)
POOL = recipes.DataSettings(image_size=SIZE, frames=FRAMES, pool=4)


# --- A pool ----------------------------------------------------------------------------------------


def test_a_pool_is_shuffled_in_every_epoch_and_drawn_once(monkeypatch: pytest.MonkeyPatch):
    drawn: list[int] = []
    render = draw

    def spy(*arguments: Any) -> Any:
        drawn.append(1)
        return render(*arguments)

    monkeypatch.setattr("lfdm_models.training.procedural.draw", spy)
    clips = ProceduralClips(SIZE, FRAMES, seed=0, pool=5)
    examples = TrainingClips(clips, FRAMES, seed=0)
    numbers = [int(examples[number]["clip"]) for number in range(15)]
    assert [sorted(numbers[start : start + 5]) for start in (0, 5, 10)] == [list(range(5))] * 3
    assert numbers[:5] != numbers[5:10] or numbers[5:10] != numbers[10:]
    assert len(drawn) == 5
    first, again = (next(examples[n] for n in range(start, 15) if numbers[n] == 2) for start in (0, 5))
    assert torch.equal(first["frames"], again["frames"])
    assert int(TrainingClips(ProceduralClips(SIZE, FRAMES, 0), FRAMES, 0)[0]["clip"]) == NO_CLIP


def test_latents_of_a_pool_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    encode, seen = DmStage.encode, []

    def spy(stage: DmStage, frames: torch.Tensor) -> Any:
        seen.append(len(frames))
        return encode(stage, frames)

    monkeypatch.setattr(DmStage, "encode", spy)
    lfae = tmp_path / "lfae"
    recipes.train_lfae(CONFIG.lfae, POOL, QUICK, run_settings(1), lfae)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run = run_settings(8)
    recipes.train_dm(CONFIG, lfae / "lfae.pth", POOL, QUICK, run, whole, signal_std=0.05)
    assert seen == [1] * 4
    with pytest.raises(Killed):
        recipes.train_dm(CONFIG, lfae / "lfae.pth", POOL, QUICK, run, killed, signal_std=0.05, progress=killed_after(5))
    recipes.train_dm(CONFIG, lfae / "lfae.pth", POOL, QUICK, run, killed, signal_std=0.05, resume=True)
    assert_same_bits(whole / STATE, killed / STATE)


def test_a_pool_is_of_procedural_clips():
    with pytest.raises(TrainingError, match="a pool is for procedural clips"):
        recipes.DataSettings("plain", Path("anywhere"), pool=3).open(0)


# --- Landmarks -------------------------------------------------------------------------------------


def test_landmarks_follow_the_drawing():
    who, motion = clip_parts(3, "wave")
    found = landmarks(who, motion.pose(np.array([0.0, 0.5])))
    assert found.shape == (2, len(LANDMARKS), 5)
    hand = found[:, LANDMARKS.index("hand"), :2]
    assert hand[1, 1] < hand[0, 1] - 0.2, "the hand is raised"
    frames = sample_clip(3, size=128, frames=3, label="wave").frames[:2]
    rows, columns = (((hand[:, axis] + 1) * 64).astype(int) for axis in (1, 0))
    skin = np.array(who.skin)
    for frame, row, column in zip(frames, rows, columns, strict=True):
        color = frame[row, column] / 255
        assert np.corrcoef(color, skin)[0, 1] > 0.8 or np.abs(color - skin).max() < 0.3
    who, motion = clip_parts(3, "smile")
    lips = landmarks(who, motion.pose(np.array([0.0, 0.5])))[
        :, [LANDMARKS.index(f"{n} lip") for n in ("upper", "lower")]
    ]
    assert np.diff(lips[1, :, 1]) > np.diff(lips[0, :, 1]) + 0.05, "lips part"


def test_examples_have_the_landmarks_of_their_frames():
    clips = ProceduralClips(SIZE, FRAMES, seed=0, pool=3)
    pair = FramePairs(clips, 0, from_first=True, landmarks=True)[1]
    torch.testing.assert_close(pair["source_landmarks"], torch.from_numpy(clips.landmarks(1, [0])[0]))
    frames, _ = clips.read(1, lambda count: range(count))
    assert torch.equal(pair["source"], torch.from_numpy(frames[0]).permute(2, 0, 1) / 255)
    assert "source_landmarks" not in FramePairs(clips, 0)[1]


def gaussian(x: float, y: float, size: tuple[float, float]) -> Regions:
    grid = coordinate_grid(16, 16, torch.zeros(()))
    squared = ((grid - torch.tensor([x, y])) / torch.tensor(size)).square().sum(dim=2)
    heatmap = torch.softmax(-0.5 * squared.flatten(), dim=0).view(1, 1, 16, 16)
    return Regions(torch.tensor([[[x, y]]]), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), heatmap)


def test_the_loss_of_landmarks_is_a_divergence():
    # Corner-aligned pixels: what a picture has at 0.3 is at 0.32 of 16 of them.
    landmark = torch.tensor([[[0.3, -0.15, 0.0, 0.15, 0.22]]])
    right = landmark_loss(gaussian(0.32, -0.16, (0.15, 0.22)), landmark)
    near = landmark_loss(gaussian(0.4, -0.16, (0.15, 0.22)), landmark)
    far = landmark_loss(gaussian(0.6, -0.16, (0.15, 0.22)), landmark)
    turned = landmark_loss(gaussian(0.32, -0.16, (0.22, 0.15)), landmark)
    assert abs(right) < 1e-4 < near < far
    assert turned > 0.05
    quarter = landmark.clone()
    quarter[..., 2] = torch.pi / 2
    assert abs(landmark_loss(gaussian(0.32, -0.16, (0.22, 0.15)), quarter)) < 1e-4


def test_landmarks_need_procedural_clips_and_regions_enough(tmp_path: Path):
    with pytest.raises(TrainingError, match="landmarks are for the procedural data set, with 11 regions or more"):
        recipes.train_lfae(CONFIG.lfae, POOL, QUICK, run_settings(1), tmp_path, landmarks=1.0)


def test_a_still_camera_leaves_the_background_exactly_where_it_is(tmp_path: Path):
    outcome = recipes.train_lfae(
        MANY, POOL, QUICK, run_settings(2), tmp_path / "still", camera_still=True, start=moved_background(tmp_path)
    )
    lfae, facts = load_lfae(outcome.checkpoint)
    assert facts["examples"]["camera still"] is True
    image = torch.rand(1, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    grid = coordinate_grid(SIZE // 4, SIZE // 4, image)
    homogeneous = torch.cat([grid, torch.ones_like(grid[..., :1])], dim=-1)
    moved = homogeneous @ lfae.bg_predictor(image, image.flip(3))[0, :2].T
    warped = warp(image, Flow(moved[None], torch.ones(1, 1, SIZE // 4, SIZE // 4)))
    inner = (..., slice(2, -2), slice(2, -2))  # at the rim grids are clamped
    torch.testing.assert_close(warped[inner], image[inner], atol=1e-5, rtol=0)


def moved_background(folder: Path) -> Path:
    """A checkpoint whose background moves."""
    lfae = new_lfae(MANY, 0, SIZE)
    with torch.no_grad():
        lfae.bg_predictor.fc.bias.add_(0.1)
    outcome = recipes.train_lfae(MANY, POOL, QUICK, run_settings(1), folder / "moved")
    content = torch.load(outcome.checkpoint, weights_only=True)
    content["bg_predictor"] = lfae.bg_predictor.state_dict()
    torch.save(content, folder / "moved.pth")
    return folder / "moved.pth"


def test_neutral_and_moving_images_are_normalized_alike():
    predictor = new_lfae(MANY, 0, SIZE).region_predictor.train()
    images = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    # The same image, among others that are dark and among others that are bright.
    dark, bright = torch.cat([images[:1], images[1:] / 8]), torch.cat([images[:1], 1 - images[1:] / 8])
    here, there = regions_of(predictor, dark, bright)
    for one, other in zip(here, there, strict=True):
        assert len(one) == len(other) == 4
        torch.testing.assert_close(one[0], other[0], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(predictor(dark).shift[0], predictor(bright).shift[0], atol=1e-4)


def test_the_statistics_of_batch_norm_are_kept_where_that_is_asked_for(tmp_path: Path):
    start = recipes.train_lfae(MANY, POOL, QUICK, run_settings(2), tmp_path / "start").checkpoint
    run = run_settings(2)
    kept = recipes.train_lfae(MANY, POOL, QUICK, run, tmp_path / "kept", start=start, freeze_norm=True).checkpoint
    moved = recipes.train_lfae(MANY, POOL, QUICK, run, tmp_path / "moved", start=start).checkpoint
    before, after, others = (load_lfae(path)[0].state_dict() for path in (start, kept, moved))
    statistics = [key for key in before if "running" in key]
    assert statistics
    for key in statistics:
        torch.testing.assert_close(after[key], before[key], atol=1e-6, rtol=1e-6)
    assert any(not torch.allclose(others[key], before[key], atol=1e-4) for key in statistics)
    assert not torch.allclose(after["generator.final.weight"], before["generator.final.weight"], atol=1e-6)
    assert load_lfae(kept)[1]["freeze norm"] is True


def test_a_new_lfae_has_no_statistics_to_keep(tmp_path: Path):
    with pytest.raises(TrainingError, match="no statistics to keep; give an initial checkpoint"):
        recipes.train_lfae(MANY, POOL, QUICK, run_settings(1), tmp_path, freeze_norm=True)


def test_coordinates_keep_all_their_bits_in_mixed_precision(monkeypatch: pytest.MonkeyPatch):
    lfae = new_lfae(MANY, 0, SIZE)
    stage = LfaeStage(lfae, PyramidLoss(), examples={})
    flows: list[Flow] = []
    decode = lfae.generator.decode

    def spy(image: torch.Tensor, skips: list[torch.Tensor], flow: Flow) -> Any:
        flows.append(flow)
        return decode(image, skips, flow)

    monkeypatch.setattr(lfae.generator, "decode", spy)
    examples = FramePairs(ProceduralClips(SIZE, FRAMES, 0), 0)
    batch = next(batches(examples, 2, start=0, workers=0))
    motions: list[torch.Tensor] = []
    mixture = lfae.generator.pixelwise_flow_predictor.mixture

    def watch(*parts: torch.Tensor) -> Candidates:
        motions.append(parts[1])
        return mixture(*parts)

    monkeypatch.setattr(lfae.generator.pixelwise_flow_predictor, "mixture", watch)
    for lower in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=lower):
            stage.losses(batch, torch.Generator().manual_seed(0))
    assert torch.equal(*motions)
    assert {flow.grid.dtype for flow in flows} == {torch.float32}
    assert not torch.equal(flows[0].grid, flows[1].grid), "the mixture is of lower precision"
    torch.testing.assert_close(flows[0].grid, flows[1].grid, atol=0.02, rtol=0)


def test_stages_of_an_lfae_follow_each_other(tmp_path: Path):
    start, losses = None, {}
    for learn in ("regions", "motion", "all"):
        outcome = recipes.train_lfae(
            MANY, POOL, QUICK, run_settings(2), tmp_path / learn, learn=learn, start=start, landmarks=3.0, mixture=2.0
        )
        losses[learn] = set(outcome.losses) - {"gradient norm"}
        start = outcome.checkpoint
    assert losses["regions"] == {"shift", "affine", "landmarks"}
    assert losses["motion"] == losses["all"] == {"similarity", "mixture", *losses["regions"]}
    fresh, regions, motion, whole = (
        new_lfae(MANY, 0, SIZE).state_dict(),
        *(load_lfae(tmp_path / learn / "lfae.pth")[0].state_dict() for learn in losses),
    )

    def changed(first: dict[str, Any], second: dict[str, Any]) -> set[str]:
        keys = (key for key in first if key.endswith("weight") and not torch.equal(first[key], second[key]))
        return {key.partition(".")[0] + ("." + key.split(".")[1] if "generator" in key else "") for key in keys}

    assert changed(fresh, regions) == {"region_predictor"}
    assert changed(regions, motion) == {"region_predictor", "bg_predictor", "generator.pixelwise_flow_predictor"}
    assert {"generator.final", "generator.bottleneck"} <= changed(motion, whole)


def test_a_dm_goes_on_from_another(tmp_path: Path):
    lfae = recipes.train_lfae(CONFIG.lfae, POOL, QUICK, run_settings(1), tmp_path / "lfae").checkpoint
    first = recipes.train_dm(CONFIG, lfae, POOL, QUICK, run_settings(1), tmp_path / "first").checkpoint
    still = OptimizerSettings(1e-12, (0.5, 0.999))
    settings = run_settings(1, ema=0.0)
    second = recipes.train_dm(CONFIG, lfae, POOL, still, settings, tmp_path / "second", start=first).checkpoint
    started, ended = (torch.load(path, weights_only=True)["diffusion"] for path in (first, second))
    for key, value in started.items():
        torch.testing.assert_close(ended[key], value, rtol=0, atol=1e-9)
    fresh = recipes.train_dm(CONFIG, lfae, POOL, still, settings, tmp_path / "fresh").checkpoint
    other = torch.load(fresh, weights_only=True)["diffusion"]
    assert any(not torch.allclose(other[key], value, rtol=0, atol=1e-4) for key, value in started.items())
    with pytest.raises(TrainingError, match=r"dm\.pth is not a DM of this architecture: "):
        load_diffusion(new_diffusion(SMALL, 0), first)


# --- The mixture -----------------------------------------------------------------------------------


def candidates(**changes: torch.Tensor) -> Candidates:
    parts = {
        "logits": torch.zeros(1, 2, 1, 1),
        "motions": torch.zeros(1, 2, 1, 1, 2),
        "deformed": torch.tensor([0.0, 1.0]).view(1, 2, 1, 1, 1).expand(1, 2, 3, 1, 1),
        "visible": torch.full((1, 1, 1, 1), 10.0),
    }
    return Candidates(**{**parts, **changes})


def test_a_mixture_teaches_a_flow_that_is_sure_and_wrong():
    driving = torch.ones(1, 3, 1, 1)
    even = mixture_loss(candidates(), driving)
    assert even.item() == pytest.approx(np.log(2), abs=1e-3), "half of it explains everything"
    sure = torch.tensor([8.0, 0.0]).view(1, 2, 1, 1).requires_grad_()
    mixture_loss(candidates(logits=sure), driving).backward()
    assert sure.grad is not None
    torch.testing.assert_close(sure.grad.flatten(), torch.tensor([1.0, -1.0]), atol=3e-2, rtol=0)
    nothing = torch.full((1, 1, 1, 1), 5.0).requires_grad_()
    mixture_loss(candidates(visible=nothing), 2 * driving).backward()
    assert nothing.grad is not None
    assert nothing.grad.item() > 0.9, "what no motion explains is occluded"


def test_a_new_lfae_copies_its_source():
    lfae = new_lfae(MANY, 0, SIZE).eval()
    image = sample_clip(1, size=SIZE, frames=2).frames[:1]
    source = torch.from_numpy(image).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        decoded = lfae(source, source)
        flow = lfae.estimate_motion(source, source)
    inner = (..., slice(3, -3), slice(3, -3))
    assert (decoded.warped - source)[inner].abs().mean() < 0.02
    assert (decoded.frame - decoded.warped).abs().mean() < 0.05
    assert flow.occlusion.min() > 0.8


# --- Rates and weights -----------------------------------------------------------------------------


def test_a_rate_can_fall_along_a_cosine():
    rates = OptimizerSettings(1.0, (0.9, 0.99), cosine=True)
    assert rates.rate(0, 100) == 1
    assert rates.rate(50, 100) == pytest.approx((1 + COSINE_END) / 2)
    assert rates.rate(100, 100) == pytest.approx(COSINE_END)
    assert dataclasses.replace(LFAE_OPTIMIZER).rate(99, 100) == pytest.approx(2e-6)


def test_errors_are_weighed_by_noise_level():
    spread = torch.tensor([0.01, 0.05, 0.1, 0.5, 0.999])
    signal = (1 - spread**2).sqrt()
    assert torch.equal(noise_weight(signal, spread, 0.0), torch.ones(5))
    found = noise_weight(signal, spread, 0.05)
    torch.testing.assert_close(found[:3], torch.tensor([1.04, 2.0025, 5.0404]) / 25, atol=1e-4, rtol=0)
    assert found[3:].tolist() == [1, 1]


def test_the_small_model_has_a_region_a_landmark():
    assert SMALL.lfae.regions >= len(LANDMARKS)


# --- What a checkpoint tells -----------------------------------------------------------------------


def test_a_loaded_pair_knows_what_it_was_trained_with(tmp_path: Path):
    lfae, dm = tmp_path / "lfae", tmp_path / "dm"
    recipes.train_lfae(CONFIG.lfae, POOL, QUICK, run_settings(1), lfae)
    recipes.train_dm(CONFIG, lfae / "lfae.pth", POOL, QUICK, run_settings(1), dm)
    model = load_model(lfae / "lfae.pth", dm / "dm.pth")
    assert model.config == CONFIG
    assert model.config.residual_flow
    assert tuple(model.label_embeddings) == LABELS
    table = torch.load(dm / "dm.pth", weights_only=True)["label_embeddings"].numpy()
    np.testing.assert_array_equal(np.stack(list(model.label_embeddings.values())), table)
    assert (model.provenance["trained"], model.provenance["frames"], model.provenance["image_size"]) == (
        True, FRAMES, SIZE,
    )  # fmt: skip
    assert model.provenance["data"] == "procedural"
    with pytest.raises(InputError, match="residual_flow is False, but the checkpoint was trained with True"):
        load_model(lfae / "lfae.pth", dm / "dm.pth", residual_flow=False)
    with pytest.raises(InputError, match="region_pad is 0, but the checkpoint was trained with 3"):
        load_model(lfae / "lfae.pth", dm / "dm.pth", region_pad=0)


# --- Several processes -----------------------------------------------------------------------------


def test_processes_take_batches_in_turn():
    examples = FramePairs(ProceduralClips(SIZE, FRAMES, 0, pool=3), 0)
    alone = batches(examples, 2, start=4, workers=0)
    parts = [batches(examples, 2, start=4, workers=0, part=part, parts=2) for part in range(2)]
    for part in (0, 1, 0, 1):
        assert torch.equal(next(alone)["driving"], next(parts[part])["driving"])


def test_a_process_alone_changes_nothing():
    alone = Processes("cpu")
    tensor = torch.ones(3)
    alone.average([tensor])
    alone.wait()
    assert (alone.count, alone.rank, alone.first, alone.any(False), alone.any(True)) == (1, 0, True, False, True)
    assert torch.equal(tensor, torch.ones(3))


def test_the_command_takes_it_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    common = ["--steps", "1", "--batch-size", "1", "--frames", "3", "--image-size", "32", "--pool", "2", "--cosine"]
    options = ["--learn", "motion", "--landmarks", "3", "--mixture", "2", "--equivariance", "2", "--from-first"]
    lfae = [*common, *options, "--beta1", "0.9", "--out", str(tmp_path / "lfae"), "-q"]
    assert main(["lfae", *lfae]) == 0
    facts = torch.load(tmp_path / "lfae" / STATE, weights_only=True)["facts"]
    assert facts["learn"] == "motion"
    assert facts["optimiser"]["betas"] == [0.9, 0.999]
    assert facts["optimiser"]["cosine"] is True
    assert capsys.readouterr().out == ""


def test_evaluate_belongs_to_the_toolkit(capsys: pytest.CaptureFixture[str]):
    assert main(["evaluate"]) == 1
    assert "comes with lfdm_export" in capsys.readouterr().err


def test_two_processes_end_with_the_same_weights(tmp_path: Path):
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import torch
from pathlib import Path
from tests.models.test_training import run_settings, train_lfae
torch.set_num_threads(1)
from lfdm_models.training.loop import Ema
import lfdm_models.training.loop as loop
kept = []
state = loop._State.__init__
def init(self, *arguments):
    state(self, *arguments)
    kept.append(self)
loop._State.__init__ = init
folder = Path({str(tmp_path)!r})
outcome = train_lfae(folder / "run", run_settings(2, batch_size=1, accumulate=2))
import os
torch.save(kept[0].network.state_dict(), folder / ("rank" + os.environ["RANK"] + ".pt"))
assert outcome.finished
"""
    # As under torchrun: the store at which they meet is the launcher's, on a port that it has already taken.
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",  # not the address that the machine's own name stands for
        "ACCELERATE_USE_CPU": "true",
    }
    runs = []
    for rank in range(2):
        said = (tmp_path / f"rank{rank}.txt").open("w+", encoding="utf-8")  # a pipe that nobody reads would fill up
        places = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        runs.append((subprocess.Popen([sys.executable, "-c", code], env={**common, **places}, stderr=said), said))
    for run, said in runs:
        with said:
            status = run.wait()
            said.seek(0)
            assert status == 0, said.read()
    first, second = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items() if value.is_floating_point())
    state = torch.load(tmp_path / "run" / STATE, weights_only=True)
    assert state["step"] == 2
    assert state["facts"]["batch size"] == 1 * 2 * 2
