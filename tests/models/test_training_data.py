from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lfdm_models.labels import MHAD, MUG, NATOPS
from lfdm_models.training import layouts
from lfdm_models.training.conditions import label_table
from lfdm_models.training.data import (
    NO_LABEL,
    ColorJitter,
    DiskClips,
    FramePairs,
    ProceduralClips,
    TrainingClips,
    batches,
    choose_frames,
)
from lfdm_models.training.draws import Draws
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.pictures import DiskClip, Framing
from lfdm_models.training.procedural import LABELS

LOGGER = "lfdm_models.training.data"


def picture(value: int, size: tuple[int, int] = (12, 12)) -> Image.Image:
    return Image.new("RGB", size, (value, value, value))


def folder(path: Path, values: Sequence[int], size: tuple[int, int] = (12, 12)) -> Path:
    """A clip of one gray picture per value."""
    path.mkdir(parents=True)
    for index, value in enumerate(values):
        picture(value, size).save(path / f"img_{index}.png")
    return path


def video(path: Path, values: Sequence[int]) -> None:
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 48, "yuv420p"
        for value in values:
            container.mux(stream.encode(av.VideoFrame.from_image(picture(value, (32, 48)))))
        container.mux(stream.encode(None))


# --- Frames ----------------------------------------------------------------------------------------


def test_random_choice_is_sorted_and_begins_at_the_first():
    seen = set()
    for seed in range(30):
        chosen = choose_frames(20, 6, "random", Draws(seed, 0))
        assert chosen == sorted(set(chosen))
        assert chosen[0] == 0
        assert len(chosen) == 6
        seen.update(chosen)
    assert seen == set(range(20))


def test_spread_choice_takes_one_of_each_span():
    choices = [choose_frames(20, 5, "spread", Draws(seed, 0)) for seed in range(30)]
    for chosen in choices:
        assert [index // 4 for index in chosen] == [0, 1, 2, 3, 4]
    assert len({tuple(chosen) for chosen in choices}) > 20


@pytest.mark.parametrize("choice", ["random", "spread"])
def test_short_clips_repeat_their_last_frame(choice: layouts.FrameChoice):
    assert choose_frames(3, 6, choice, Draws(0, 0)) == [0, 1, 2, 2, 2, 2]
    assert choose_frames(4, 4, choice, Draws(0, 0)) == [0, 1, 2, 3]


def test_jitter_is_shared_by_a_clip_and_leaves_nothing_out_of_range():
    frame = np.random.default_rng(0).random((1, 8, 8, 3)).astype(np.float32)
    clip = np.repeat(frame, 3, axis=0)
    changed = ColorJitter(0.4, 0.4, 0.4, 0.1).apply(clip, Draws(1, 0))
    assert changed.dtype == np.float32
    assert 0 <= changed.min() <= changed.max() <= 1
    assert np.abs(changed - clip).max() > 0.02
    np.testing.assert_array_equal(changed[0], changed[2])
    np.testing.assert_allclose(ColorJitter(0, 0, 0, 0).apply(clip, Draws(1, 0)), clip, atol=1e-5)


# --- Pictures and clips ----------------------------------------------------------------------------


def test_pictures_are_fitted_into_a_black_square():
    white = Framing().prepare(picture(255, (20, 10)), 8)
    assert white.shape == (8, 8, 3)
    np.testing.assert_array_equal(white[:, 0, 0], [0, 0, 255, 255, 255, 255, 0, 0])


def test_a_crop_is_for_the_cameras_own_pictures_only():
    framing = Framing(frame_size=(20, 10), crop=(10, 0, 20, 10))
    source = picture(0, (20, 10))
    source.paste((255, 255, 255), (10, 0, 20, 10))
    assert framing.prepare(source, 4).min() == 255
    assert framing.prepare(picture(7, (10, 10)), 4).max() == 7


def test_frames_of_a_folder_come_in_natural_order(tmp_path: Path):
    clip = DiskClip(folder(tmp_path / "clip", range(0, 240, 20)), Framing(), 4)
    assert len(clip) == 12
    np.testing.assert_array_equal(clip.read([0, 2, 10, 10])[:, 0, 0, 0], [0, 40, 200, 200])


def test_a_video_is_read(tmp_path: Path):
    video(tmp_path / "clip.avi", [40, 120, 200])
    frames = DiskClip(tmp_path / "clip.avi", Framing(), 12).read([0, 1, 2])
    assert frames.shape == (3, 12, 12, 3)
    np.testing.assert_allclose(frames[:, 6, 6, 0], [40, 120, 200], atol=12)
    assert frames[:, :, 0].max() < 12, "black beside a tall picture"


# --- Layouts ---------------------------------------------------------------------------------------


def test_mug_takes_the_published_subjects(tmp_path: Path):
    for subject in ("008", "001", "999"):
        folder(tmp_path / "subjects3" / subject / "anger" / "take000", [1, 2])
    folder(tmp_path / "subjects3" / "084" / "Surprise", [1, 2])
    folder(tmp_path / "subjects3" / "084" / "talking", [1, 2])
    found = layouts.mug(tmp_path, "train")
    assert [(entry.path.relative_to(tmp_path / "subjects3").parts[0], entry.label) for entry in found.entries] == [
        ("008", "anger"),
        ("084", "surprise"),
    ]
    assert found.labels == MUG
    assert found.choice == "random"
    assert len(layouts.mug(tmp_path, "test").entries) == 1


def test_mhad_numbers_actions_without_sit_to_stand(tmp_path: Path):
    for name in ("a1_s1_t1_color", "a23_s3_t1_color", "a24_s1_t1_color", "a25_s1_t2_color", "a27_s7_t1_color"):
        folder(tmp_path / name, [1, 2])
    folder(tmp_path / "a2_s2_t1_color", [1, 2])
    found = layouts.mhad(tmp_path, "train")
    assert [entry.label for entry in found.entries] == [
        "right arm swipe to the left",
        "walking",
        "stand to sit",
        "squat",
    ]
    assert found.labels == MHAD
    assert found.framing.resize_first == (336, 480)
    assert len(layouts.mhad(tmp_path, "test").entries) == 1
    assert len(layouts.mhad(tmp_path, "test", subjects=[1]).entries) == 2


def test_natops_takes_gestures_by_number_and_reports_odd_ones(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    for name in ("g01s01r01", "g24s10r20", "g25s02r01", "g02s11r01"):
        folder(tmp_path / name, [1, 2])
    with caplog.at_level(logging.WARNING):
        found = layouts.natops(tmp_path, "train")
    assert [entry.label for entry in found.entries] == [NATOPS[0], NATOPS[23]]
    assert "1 clips have a gesture number out of 1 to 24" in caplog.text
    assert found.framing.crop == (30, 10, 290, 239)
    assert [entry.label for entry in layouts.natops(tmp_path, "test").entries] == [NATOPS[1]]


def test_plain_folders_are_labels(tmp_path: Path):
    folder(tmp_path / "run" / "one", [1, 2])
    folder(tmp_path / "None" / "two", [1, 2])
    video(tmp_path / "jump" / "three.mp4", [1, 2])
    found = layouts.plain(tmp_path, "train")
    assert found.labels == ("jump", "run")
    assert [entry.label for entry in found.entries] == ["None", "jump", "run"]
    with pytest.raises(TrainingError, match="no folders train and test"):
        layouts.plain(tmp_path, "test")


def test_a_folder_without_clips_is_told(tmp_path: Path):
    with pytest.raises(TrainingError, match="has no clips of the train split; expected pictures in SUBJECT/LABEL/TAKE"):
        layouts.mug(tmp_path, "train")
    with pytest.raises(TrainingError, match="there is no folder"):
        layouts.plain(tmp_path / "none", "train")


# --- Examples --------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> DiskClips:
    for index in range(4):
        folder(tmp_path / "data" / "up" / f"clip{index}", range(50 * index, 50 * index + 10))
    folder(tmp_path / "data" / "None" / "still", [250, 251, 252])
    return DiskClips(layouts.plain(tmp_path / "data", "train"), 8, seed=3)


def test_every_epoch_has_every_clip_once_in_another_order(disk: DiskClips):
    def epoch(number: int) -> list[int]:
        return [int(disk.read(5 * number + i, lambda count: [0])[0][0, 0, 0, 0]) for i in range(5)]

    assert sorted(epoch(0)) == sorted(epoch(1)) == [0, 50, 100, 150, 250]
    assert len({tuple(epoch(number)) for number in range(4)}) > 1


def test_clips_carry_their_label_or_none(disk: DiskClips):
    for number in range(5):
        frames, label = disk.read(number, lambda count: [0])
        assert label == (NO_LABEL if frames[0, 0, 0, 0] == 250 else 0)


def test_clips_that_cannot_be_used_are_reported_once_and_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder(tmp_path / "a" / "good", [10, 20, 30])
    folder(tmp_path / "a" / "short", [10])
    broken = folder(tmp_path / "a" / "torn", [10, 20, 30])
    for path in broken.iterdir():
        path.write_bytes(path.read_bytes()[:40])
    (tmp_path / "a" / "noise.mp4").write_bytes(b"no video at all")
    source = DiskClips(layouts.plain(tmp_path, "train"), 8, seed=0)
    with caplog.at_level(logging.WARNING, LOGGER):
        clips = [source.read(number, lambda count: [0, 1]) for number in range(12)]
    assert all(frames[0, 0, 0, 0] == 10 for frames, _ in clips)
    assert len(caplog.messages) == 3
    assert any("short: it has 1 frames, expected at least 2" in message for message in caplog.messages)


def test_nothing_but_broken_clips_is_an_error(tmp_path: Path):
    folder(tmp_path / "a" / "short", [10])
    with pytest.raises(TrainingError, match="none of 1 clips in a row can be used"):
        DiskClips(layouts.plain(tmp_path, "train"), 8, seed=0).read(0, lambda count: [0])


def test_pairs_are_two_different_frames(disk: DiskClips):
    pairs = FramePairs(disk, seed=0)
    for number in range(20):
        pair = pairs[number]
        assert pair["source"].shape == pair["driving"].shape == (3, 8, 8)
        assert not torch.equal(pair["source"], pair["driving"])


def test_an_example_is_a_function_of_seed_and_number():
    source = ProceduralClips(16, 4, seed=1)
    clips = TrainingClips(source, 4, seed=1, jitter=ColorJitter())
    first, again, other = clips[12], clips[12], clips[13]
    assert first["frames"].shape == (3, 4, 16, 16)
    assert 0 <= first["label"] < len(LABELS)
    assert torch.equal(first["frames"], again["frames"])
    assert not torch.equal(first["frames"], other["frames"])


def test_batches_do_not_depend_on_workers_and_start_anywhere():
    pairs = FramePairs(ProceduralClips(16, 4, seed=0), seed=0)
    here = batches(pairs, 3, start=0, workers=0)
    wanted = [next(here) for _ in range(4)]
    there = batches(pairs, 3, start=6, workers=2)
    for expected in wanted[2:]:
        found = next(there)
        assert all(torch.equal(found[key], expected[key]) for key in ("source", "driving"))
    assert wanted[0]["source"].shape == (3, 3, 16, 16)
    assert wanted[0]["source"].dtype == torch.float32


# --- Label embeddings ------------------------------------------------------------------------------


def test_label_embeddings_are_orthogonal_and_of_unit_scale():
    table = label_table(LABELS, 64)
    rows = np.stack(list(table.values()))
    assert tuple(table) == LABELS
    np.testing.assert_array_equal(rows @ rows.T, 64 * np.eye(len(LABELS)))
    assert set(np.unique(rows)) == {-1.0, 1.0}
    assert (rows.sum(axis=1) == 0).all(), "none is the vector of ones"


def test_label_embeddings_that_cannot_be():
    with pytest.raises(ValueError, match="expected a power of two"):
        label_table(LABELS, 48)
    with pytest.raises(ValueError, match="8 labels, expected at most 7"):
        label_table(LABELS, 8)
