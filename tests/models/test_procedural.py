from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest

from lfdm_models.training.draws import Draws
from lfdm_models.training.motions import Pose, sample_motion
from lfdm_models.training.procedural import (
    HELD_OUT_SEEDS,
    LABELS,
    TRAINING_SEEDS,
    clip_parts,
    render,
    sample_clip,
)

SEEDS = HELD_OUT_SEEDS[:6]
#: SHA-256 of the frames of clip 7.
DIGEST = "31a8157f48b96365b847eb5d3e797ad018bad0f6b4b6c3c2d10f678e52648364"


def luma(frames: Any) -> Any:
    return frames.astype(np.float64) @ [0.299, 0.587, 0.114]


def face_box(seed: int) -> tuple[slice, slice]:
    """Rows and columns of the face, at 64 pixels a side."""
    who, _ = clip_parts(seed)
    row, column = 32 * (1 + who.head_y), 32 * (1 + who.head_x)
    return slice(int(row - 8), int(row + 13)), slice(int(column - 12), int(column + 12))


def blurred(frames: Any) -> Any:
    for axis in (1, 2):
        for _ in range(3):
            frames = (np.roll(frames, 1, axis) + 2 * frames + np.roll(frames, -1, axis)) / 4
    return frames


def path(seed: int, label: str) -> Any:
    """Where the face is, (T, 2) right and down in pixels: Lucas and Kanade's estimate from frame to frame, summed."""
    frames = blurred(luma(sample_clip(seed, label=label).frames))
    box = face_box(seed)
    steps = [np.zeros(2)]
    for before, after in itertools.pairwise(frames):
        down, right = (gradient[box].ravel() for gradient in np.gradient((before + after) / 2))
        steps.append(np.linalg.lstsq(np.stack([right, down], 1), (before - after)[box].ravel(), rcond=None)[0])
    return np.cumsum(steps, axis=0)


def test_draws_are_those_of_philox():
    draws = Draws(0, 0)
    assert [draws.integer(1000) for _ in range(6)] == [11, 241, 111, 564, 502, 277]
    assert Draws(1, 0).uniform() != Draws(0, 1).uniform()
    with pytest.raises(ValueError, match="out of range"):
        Draws(-1, 0)


def test_a_clip_has_the_same_bits_everywhere():
    clip = sample_clip(7)
    assert clip.frames.shape == (16, 64, 64, 3)
    assert clip.frames.dtype == np.uint8
    assert clip.label in LABELS
    assert hashlib.sha256(clip.frames.tobytes()).hexdigest() == DIGEST
    assert np.array_equal(sample_clip(7).frames, clip.frames)


def test_seeds_differ_and_held_out_characters_are_others():
    assert not np.array_equal(sample_clip(1, label="nod").frames, sample_clip(2, label="nod").frames)
    assert TRAINING_SEEDS[-1] < HELD_OUT_SEEDS[0]
    assert len({sample_clip(seed, size=16, frames=2).label for seed in range(60)}) == len(LABELS)


def test_the_label_does_not_change_the_character():
    first = [sample_clip(5, label=label).frames[0] for label in LABELS]
    assert all(np.array_equal(frame, first[0]) for frame in first)


def test_the_first_frame_is_neutral_and_the_last_nearly_so():
    for label in LABELS:
        _, motion = clip_parts(11, label)
        pose = motion.pose(np.array([0.0, 0.5, 1.0]))
        channels = np.stack([getattr(pose, name) for name in Pose.__dataclass_fields__])
        np.testing.assert_array_equal(channels[:, 0], 0)
        assert np.abs(channels[:, 1]).max() > 0.01 or label in ("nod", "shake head", "wave")
        np.testing.assert_allclose(channels[:, 2], 0, atol=1e-6)


def test_amplitude_and_timing_vary():
    motions = [sample_motion(Draws(seed, 1), "smile") for seed in range(20)]
    assert len({motion.amplitude for motion in motions}) == 20
    assert len({motion.onset for motion in motions}) == 20


def test_few_frames_are_those_of_the_whole_clip():
    character, motion = clip_parts(3, "wave")
    whole = sample_clip(3, label="wave").frames
    some = render(character, motion, np.array([0.0, 5 / 15, 9 / 15]), 64)
    assert np.abs(some.astype(int) - whole[[0, 5, 9]]).max() <= 1


@pytest.mark.parametrize("seed", SEEDS)
def test_motions_go_where_their_labels_say(seed: int):
    paths = {label: path(seed, label) for label in LABELS}
    assert paths["look left"][:, 0].min() < -2
    assert paths["look left"][:, 0].max() < 1
    assert paths["look right"][:, 0].max() > 2
    assert paths["look right"][:, 0].min() > -1
    assert paths["nod"][:, 1].max() > 2
    for label in ("smile", "wave"):
        assert np.abs(paths[label]).max() < 1.5


@pytest.mark.parametrize("seed", SEEDS)
def test_a_shaken_head_goes_to_both_sides(seed: int):
    shaken = luma(sample_clip(seed, label="shake head").frames)
    for side in ("look left", "look right"):
        turned = luma(sample_clip(seed, label=side).frames)[8]
        distance = np.abs(shaken - turned).mean(axis=(1, 2))
        assert distance.min() < 0.7 * distance[0]


@pytest.mark.parametrize("seed", SEEDS)
def test_motion_is_where_the_label_has_it(seed: int):
    side = clip_parts(seed)[0].hand_side

    def energy(label: str) -> tuple[float, float]:
        clip = luma(sample_clip(seed, label=label).frames)
        changed = np.abs(clip - clip[0]).mean(axis=0)
        hand = changed[24:, 52:] if side > 0 else changed[24:, :12]
        rows, columns = face_box(seed)
        return hand.mean(), changed[rows, columns].mean()

    hand, face = energy("wave")
    assert hand > 4 * face
    for label in ("smile", "surprise"):
        hand, face = energy(label)
        assert face > 4 * hand


def test_wrong_arguments_are_told():
    with pytest.raises(ValueError, match="unknown label 'jump'; expected one of smile"):
        sample_clip(0, label="jump")
    with pytest.raises(ValueError, match="expected at least 2"):
        sample_clip(0, frames=1)
    with pytest.raises(ValueError, match="at least 16 pixels"):
        sample_clip(0, size=8)
