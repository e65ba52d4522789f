"""The procedural data set: unlimited drawn characters that perform labeled motions, from a seed.

Seed and label define a clip completely, on every machine. Training uses `TRAINING_SEEDS`; the characters of
`HELD_OUT_SEEDS` appear in no training.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lfdm_models.training.characters import Character, sample_character
from lfdm_models.training.drawing import UInt8Array
from lfdm_models.training.draws import Draws
from lfdm_models.training.figure import draw
from lfdm_models.training.motions import LABELS, Motion, sample_motion

__all__ = ["HELD_OUT_SEEDS", "LABELS", "TRAINING_SEEDS", "Clip", "clip_parts", "render", "sample_clip"]

TRAINING_SEEDS = range(2**31)
HELD_OUT_SEEDS = range(2**31, 2**32)

_CHARACTER, _MOTION = 0, 1


class Clip(NamedTuple):
    """A clip.

    Attributes:
        frames: (T, H, W, 3) uint8, RGB; the first shows the neutral pose.
        label: one of `LABELS`.
    """

    frames: UInt8Array
    label: str


def clip_parts(seed: int, label: str | None = None) -> tuple[Character, Motion]:
    """The character and the motion of a seed's clip.

    Args:
        seed: seed of both, 0 … 2^32 - 1.
        label: the motion's label; default: drawn from the seed. The character does not depend on it.

    Raises:
        ValueError: the label is unknown, or the seed is out of range.
    """
    return sample_character(Draws(seed, _CHARACTER)), sample_motion(Draws(seed, _MOTION), label)


def render(character: Character, motion: Motion, moments: NDArray[np.float64], size: int) -> UInt8Array:
    """Draw moments of a clip.

    Args:
        character: the character, such as from `clip_parts`.
        motion: the motion, likewise.
        moments: (T,), shares of the clip from 0 to 1.
        size: pixels per side, at least 16.

    Returns:
        (T, size, size, 3) uint8.

    Raises:
        ValueError: the size is too small.
    """
    if size < 16:
        raise ValueError(f"size is {size}, expected at least 16 pixels per side")
    return draw(character, motion.pose(moments), size)


def sample_clip(seed: int, *, size: int = 64, frames: int = 16, label: str | None = None) -> Clip:
    """The clip of a seed.

    Args:
        seed: one of `TRAINING_SEEDS` or `HELD_OUT_SEEDS`.
        size: pixels per side, at least 16.
        frames: T, at least 2.
        label: one of `LABELS`; default: drawn from the seed.

    Raises:
        ValueError: an argument is out of range.
    """
    if frames < 2:
        raise ValueError(f"frames is {frames}, expected at least 2")
    character, motion = clip_parts(seed, label)
    moments = np.arange(frames) / (frames - 1)
    return Clip(render(character, motion, moments, size), motion.label)
