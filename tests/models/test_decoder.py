"""``lfdm-train lfae --learn decoder``: a handful of pictures or clips of one person."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from lfdm_export import load_model
from lfdm_models.training import layouts, recipes
from lfdm_models.training.cli import main
from lfdm_models.training.decoder import QUALITY, Adapted, learn_decoder
from lfdm_models.training.draws import Draws
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.lfae import DECODER, LfaeStage, load_lfae
from lfdm_models.training.losses import PyramidLoss
from lfdm_models.training.person import (
    Measured,
    Person,
    PersonPairs,
    bent,
    divide,
    read_person,
    rebuilt_quality,
    to_batch,
)
from lfdm_models.training.pictures import Framing
from lfdm_models.training.procedural import HELD_OUT_SEEDS, LABELS, sample_clip
from lfdm_models.training.settings import LFAE_OPTIMIZER, OptimizerSettings
from tests.models.test_training import LFAE, QUICK, SIZE, run_settings, train_dm, train_lfae

UInt8 = NDArray[np.uint8]

STEPS = 30
#: A step size that does not depend on the number of steps.
STEADY = OptimizerSettings(1e-3, (0.5, 0.999))


def picture(value: int, size: int = SIZE) -> UInt8:
    """A smooth picture, different for each value."""
    rows, columns = np.mgrid[0:size, 0:size]
    levels = [np.sin(rows / (4 + value)) + np.cos(columns / 5), np.sin(columns / 6 + value), np.cos(rows / 7)]
    return (np.clip(np.stack(levels, axis=-1) / 4 + 0.5, 0, 1) * 255).astype(np.uint8)


def somebody() -> Person:
    clip = sample_clip(HELD_OUT_SEEDS[0], size=SIZE, frames=8).frames
    return Person((picture(0), picture(1), picture(2)), (clip,))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for a few steps, so that its statistics are not the initial ones."""
    return train_lfae(tmp_path_factory.mktemp("start"), run_settings(2, ema=0.0)).checkpoint


@pytest.fixture(scope="module")
def adapted(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    return learn_decoder(
        LFAE,
        start,
        somebody(),
        OptimizerSettings(1e-2, (0.5, 0.999)),
        run_settings(STEPS, ema=0.8, batch_size=4, checkpoint_every=0),
        tmp_path_factory.mktemp("adapted"),
        jitter=False,
    )


def of_decoder(key: str) -> bool:
    return key.startswith(tuple(f"generator.{part}." for part in DECODER))


# --- What is trained -------------------------------------------------------------------------------


def test_only_what_decodes_is_trained(start: Path, adapted: Adapted):
    before, after = (load_lfae(path)[0].state_dict() for path in (start, adapted.outcome.checkpoint))
    statistics = [key for key in before if "running" in key or "tracked" in key]
    assert any(of_decoder(key) for key in statistics)
    for key, value in before.items():
        if not of_decoder(key) or key in statistics:
            assert value.numpy().tobytes() == after[key].numpy().tobytes(), key
    learned = [key for key in before if of_decoder(key) and key not in statistics]
    assert {key.split(".")[1] for key in learned} == set(DECODER)
    assert all(not torch.equal(before[key], after[key]) for key in learned)


def test_motion_and_the_feature_of_the_dm_keep_their_bits(start: Path, adapted: Adapted):
    first, second = (load_lfae(path)[0] for path in (start, adapted.outcome.checkpoint))
    source, driving = to_batch(np.stack([picture(0), picture(1)])).split(1)
    with torch.no_grad():
        for one, other in zip(
            first.estimate_motion(source, driving), second.estimate_motion(source, driving), strict=True
        ):
            assert torch.equal(one, other)
        for one, other in zip(first.generator.encode(source), second.generator.encode(source), strict=True):
            assert torch.equal(one, other)
        assert not torch.equal(first(source, driving).frame, second(source, driving).frame)


def test_the_loss_falls_and_held_out_frames_get_better(start: Path, adapted: Adapted):
    pairs = PersonPairs(divide(somebody(), 0.2)[0], seed=99)
    examples = [pairs[number] for number in range(16)]
    source, driving = (torch.stack([pair[side] for pair in examples]) for side in ("source", "driving"))

    def loss(checkpoint: Path) -> float:
        stage = LfaeStage(load_lfae(checkpoint)[0], PyramidLoss(), learn="decoder", examples={})
        found = stage.losses({"source": source, "driving": driving}, torch.Generator())
        assert set(found) == {"similarity"}
        return found["similarity"].item()

    assert loss(adapted.outcome.checkpoint) < 0.95 * loss(start)
    assert adapted.held_out
    # 4 bends of one picture, and the last 2 of 8 frames.
    assert adapted.before.frames == adapted.after.frames == 4 + 2
    assert adapted.after.l1 < 0.98 * adapted.before.l1
    assert adapted.after.psnr > adapted.before.psnr


def test_the_result_has_the_released_layout_and_tells_how_it_was_made(adapted: Adapted):
    checkpoint = adapted.outcome.checkpoint
    content = torch.load(checkpoint, weights_only=True)
    assert {"generator", "region_predictor", "bg_predictor", "training"} <= set(content)
    _, facts = load_lfae(checkpoint)
    assert (facts["learn"], facts["freeze norm"]) == ("decoder", True)
    assert facts["examples"]["person"] == "2 pictures, 1 clips of 6 frames", "without what is held out"
    stored = json.loads((checkpoint.parent / QUALITY).read_text(encoding="utf-8"))
    assert stored["after"]["l1"] == adapted.after.l1
    assert (stored["held out"], stored["step"]) == (True, STEPS)
    header, _, before, after = adapted.table().splitlines()
    assert header == "| held-out frames | L1 | PSNR, dB |"
    assert before == f"| 6, before | {adapted.before.l1:.5f} | {adapted.before.psnr:.2f} |"
    assert after.startswith("| 6, after | ")


def test_the_result_goes_with_the_dm_of_its_start(start: Path, adapted: Adapted, tmp_path: Path):
    dm = train_dm(tmp_path / "dm", start, run_settings(1)).checkpoint
    model = load_model(adapted.outcome.checkpoint, dm)
    assert tuple(model.label_embeddings) == LABELS
    assert model.provenance["data"] == "procedural", "its motions are those of the DM"
    weight = load_lfae(adapted.outcome.checkpoint)[0].generator.final.weight
    assert torch.equal(model.lfae.generator.final.weight, weight)


def test_a_run_goes_on_to_the_same_bits(start: Path, tmp_path: Path):
    def run(folder: str, steps: int, *, resume: bool = False) -> Path:
        settings = run_settings(steps, checkpoint_every=1)
        return learn_decoder(
            LFAE, start, somebody(), STEADY, settings, tmp_path / folder, resume=resume
        ).outcome.checkpoint

    whole = run("whole", 3)
    run("parts", 2)
    again = run("parts", 3, resume=True)
    first, second = (load_lfae(path)[0].state_dict() for path in (whole, again))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


# --- Pictures and clips ----------------------------------------------------------------------------


def write(path: Path, frames: UInt8) -> None:
    path.mkdir(parents=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{index}.png")


def test_pictures_lie_in_the_folder_and_clips_in_it_or_below(tmp_path: Path):
    Image.fromarray(picture(0, 20)).save(tmp_path / "b.png")
    Image.fromarray(picture(1, 20)).save(tmp_path / "a.jpg", quality=95)
    (tmp_path / "notes.txt").write_text("no picture")
    write(tmp_path / "takes" / "one", np.stack([picture(2), picture(3), picture(4)]))
    frames = [Image.fromarray(picture(value)) for value in (5, 6)]
    frames[0].save(tmp_path / "wave.gif", save_all=True, append_images=frames[1:], duration=100)
    found = read_person(tmp_path, Framing(), SIZE)
    assert [one.shape for one in found.pictures] == [(SIZE, SIZE, 3)] * 2
    assert sorted(len(clip) for clip in found.clips) == [2, 3]
    assert np.array_equal(next(clip for clip in found.clips if len(clip) == 3)[1], picture(3))
    assert found.describe() == "2 pictures, 2 clips of 5 frames"


def test_a_folder_that_cannot_serve_is_told(tmp_path: Path):
    with pytest.raises(TrainingError, match=r"there is no folder .*give a folder of pictures and clips of one person"):
        read_person(tmp_path / "none", Framing(), SIZE)
    with pytest.raises(TrainingError, match="holds no pictures, videos or folders of pictures"):
        read_person(tmp_path, Framing(), SIZE)
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    with pytest.raises(TrainingError, match=r"torn\.png cannot be used: .*repair it, or remove it"):
        read_person(tmp_path, Framing(), SIZE)
    (tmp_path / "torn.png").unlink()
    write(tmp_path / "short", picture(0)[None])
    with pytest.raises(TrainingError, match="short cannot be used: it has 1 frames, expected at least 2"):
        read_person(tmp_path, Framing(), SIZE)


def test_the_last_pictures_and_frames_are_held_out():
    clips = np.stack([picture(value) for value in range(10)]), np.stack([picture(value) for value in range(3)])
    person = Person(tuple(picture(10 + value) for value in range(6)), clips)
    learned, measured = divide(person, 0.2)
    assert (len(learned.pictures), [len(clip) for clip in learned.clips]) == (4, [8, 3])
    assert [one.tobytes() for one in measured.pictures] == [picture(14).tobytes(), picture(15).tobytes()]
    ((first, held),) = measured.clips
    assert np.array_equal(first, picture(0))
    assert np.array_equal(held, clips[0][8:])
    assert measured.held_out
    everything, measured = divide(person, 0.0)
    assert everything == person
    assert (len(measured.pictures), [len(held) for _, held in measured.clips]) == (6, [9, 2])
    assert not measured.held_out


@pytest.mark.parametrize(
    ("person", "share", "why"),
    [
        (Person((picture(0),), ()), 0.2, "nothing can be held out of 1 pictures, 0 clips of 0 frames: it takes 2"),
        (Person((), (np.stack([picture(0)] * 3),)), 0.2, "or a clip of 4 frames; give more, or hold out 0"),
        (Person((picture(0),), ()), 0.6, "the share that is held out is 0.6, expected 0 to 0.5"),
    ],
)
def test_too_little_to_hold_out_is_told(person: Person, share: float, why: str):
    with pytest.raises(TrainingError, match=why):
        divide(person, share)


def test_every_picture_and_frame_is_an_example():
    clip = np.stack([picture(value) for value in (3, 4, 5)])
    person = Person((picture(0), picture(1)), (clip,))
    pairs = PersonPairs(person, seed=1)
    known = {to_batch(picture(value)[None])[0].numpy().tobytes(): value for value in (0, 1, 3, 4, 5)}
    seen = set()
    for number in range(60):
        pair = pairs[number]
        source, driving = (known.get(pair[side].numpy().tobytes()) for side in ("source", "driving"))
        seen.add((source, driving))
        assert torch.equal(pair["source"], pairs[number]["source"])
    bends = {(0, None), (None, 0), (1, None), (None, 1)}
    assert seen == bends | {(one, other) for one in (3, 4, 5) for other in (3, 4, 5) if one != other}


def test_a_bend_is_small_and_not_the_identity():
    image = to_batch(picture(0)[None])
    found = bent(image, Draws(0, 0))
    assert found.shape == image.shape
    assert 0.002 < (found - image).abs().mean() < 0.2
    assert torch.equal(found, bent(image, Draws(0, 0)))
    assert not torch.equal(found, bent(image, Draws(1, 0)))


def test_the_quality_is_that_of_rebuilt_frames(start: Path):
    lfae, _ = load_lfae(start)
    clip = sample_clip(HELD_OUT_SEEDS[0], size=SIZE, frames=5).frames
    found = rebuilt_quality(lfae, Measured((), ((clip[0], clip[1:]),), True))
    wanted = to_batch(clip[1:])
    with torch.no_grad():
        rebuilt = lfae(to_batch(clip[:1]).expand_as(wanted).contiguous(), wanted).frame
    assert found.frames == 4
    assert found.l1 == pytest.approx(float((rebuilt - wanted).abs().mean()), rel=1e-5)
    per_frame = [
        -10 * np.log10(float((one - other).square().mean())) for one, other in zip(rebuilt, wanted, strict=True)
    ]
    assert found.psnr == pytest.approx(np.mean(per_frame), rel=1e-5)


def test_data_sets_keep_their_rules_for_pictures():
    assert set(layouts.FRAMING) == {"mug", "mhad", "natops", "plain"}
    assert layouts.FRAMING["mhad"].resize_first == (336, 480)
    assert layouts.FRAMING["natops"].crop == (30, 10, 290, 239)


# --- The command -----------------------------------------------------------------------------------


def small_start(folder: Path) -> Path:
    from lfdm_models.training.settings import SMALL

    data = recipes.DataSettings(image_size=32, frames=4)
    return recipes.train_lfae(SMALL.lfae, data, QUICK, run_settings(1, batch_size=1), folder).checkpoint


def test_the_command_adapts_and_prints_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = small_start(tmp_path / "start")
    (tmp_path / "me").mkdir()
    for value in range(2):
        Image.fromarray(picture(value, 40)).save(tmp_path / "me" / f"{value}.png")
    common = ["--learn", "decoder", "--root", str(tmp_path / "me"), "--image-size", "32", "--batch-size", "2"]
    arguments = [
        "lfae",
        *common,
        "--start",
        str(start),
        "--steps",
        "1",
        "--out",
        str(tmp_path / "run"),
        "--threads",
        "1",
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "step 1: similarity" in printed
    assert "| 4, before | " in printed
    assert "| 4, after | " in printed
    assert load_lfae(tmp_path / "run" / "lfae.pth")[1]["examples"]["person"] == "1 pictures, 0 clips of 0 frames"
    facts = torch.load(tmp_path / "run" / "training.pt", weights_only=True)["facts"]
    assert facts["optimiser"]["learning_rate"] == LFAE_OPTIMIZER.learning_rate
    capsys.readouterr()
    assert main([*arguments, "--hold-out", "0.7"]) == 1
    assert "the share that is held out is 0.7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (["--learn", "decoder", "--root", "me"], "--learn decoder adapts a trained LFAE; give it with --start"),
        (["--learn", "decoder", "--start", "lfae.pth"], "and the folder with --root"),
        (
            ["--learn", "decoder", "--root", "me", "--start", "lfae.pth", "--camera-still"],
            "--camera-still does not apply to --learn decoder",
        ),
        (["--hold-out", "0.1"], "--hold-out is for --learn decoder"),
    ],
)
def test_the_command_refuses_in_one_sentence(
    more: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["lfae", "--steps", "1", "--out", str(tmp_path / "run"), *more]) == 1
    printed = capsys.readouterr()
    assert why in printed.err
    assert printed.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_start_of_another_architecture_is_told(start: Path, tmp_path: Path):
    other = dataclasses.replace(LFAE, region_pad=0)
    with pytest.raises(TrainingError, match=r"was trained as .*'region_pad': 3.*name its size and data"):
        learn_decoder(other, start, somebody(), QUICK, run_settings(1), tmp_path)
