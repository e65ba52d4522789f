"""The procedural data set: drawn characters that perform labelled motions, without end, from a seed.

A clip is fully told by its seed and label: the same on every machine. Training takes seeds of
`TRAINING_SEEDS`; those of `HELD_OUT_SEEDS` are characters that no training has seen.
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
    """Who a seed's clip shows, and what they do.

    Args:
        seed: of everything: 0 … 2^32 - 1.
        label: what they do; drawn from the seed if None. It does not change who they are.

    Raises:
        ValueError: there is no such label, or the seed is out of range.
    """
    return sample_character(Draws(seed, _CHARACTER)), sample_motion(Draws(seed, _MOTION), label)


def render(character: Character, motion: Motion, moments: NDArray[np.float64], size: int) -> UInt8Array:
    """Draw moments of a clip.

    Args:
        character: see `clip_parts`.
        motion: likewise.
        moments: (T,), shares of the clip from 0 to 1.
        size: pixels a side, at least 16.

    Returns:
        (T, size, size, 3) uint8.

    Raises:
        ValueError: the size is too small.
    """
    if size < 16:
        raise ValueError(f"size is {size}, expected at least 16 pixels a side")
    return draw(character, motion.pose(moments), size)


def sample_clip(seed: int, *, size: int = 64, frames: int = 16, label: str | None = None) -> Clip:
    """The clip of a seed.

    Args:
        seed: see `TRAINING_SEEDS` and `HELD_OUT_SEEDS`.
        size: pixels a side, at least 16.
        frames: T, at least 2.
        label: one of `LABELS`; drawn from the seed if None.

    Raises:
        ValueError: an argument is out of range.
    """
    if frames < 2:
        raise ValueError(f"frames is {frames}, expected at least 2")
    character, motion = clip_parts(seed, label)
    moments = np.arange(frames) / (frames - 1)
    return Clip(render(character, motion, moments, size), motion.label)
