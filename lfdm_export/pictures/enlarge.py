"""Enlarge the pictures of a clip."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from lfdm_export.errors import InputError

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
MAX_SCALE = 8


def check_scale(scale: int) -> None:
    """Check the scale.

    Raises:
        InputError: it is not a whole number from 1 to `MAX_SCALE`.
    """
    if isinstance(scale, bool) or not isinstance(scale, int) or not 1 <= scale <= MAX_SCALE:
        raise InputError(f"scale is {scale!r}, expected a whole number from 1 to {MAX_SCALE}")


def enlarge(frames: UInt8Array, scale: int) -> UInt8Array:
    """(T,H,W,3) uint8 -> (T,scale*H,scale*W,3), by Lanczos interpolation; scale 1 returns `frames` itself.

    Raises:
        InputError: the scale is out of range.
    """
    check_scale(scale)
    if scale == 1:
        return frames
    height, width = frames.shape[1:3]
    larger = np.empty((len(frames), height * scale, width * scale, 3), np.uint8)
    for index, frame in enumerate(frames):
        larger[index] = Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.LANCZOS)
    return larger
