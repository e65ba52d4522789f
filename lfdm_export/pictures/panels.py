"""The five pictures that show how a frame is made, side by side as in the published demos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from lfdm_export.errors import InputError

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]

#: Titles of the five pictures.
TITLES = ("source", "generated", "warped", "grid", "occlusion")
#: Lines across and down the grid picture.
GRID_LINES = 17
# Drawn this many times larger and averaged down: Pillow's lines are not anti-aliased.
_OVERSAMPLING = 4
_PAPER, _REGULAR, _DEFORMED = (255, 255, 255), (185, 185, 185), (20, 60, 150)


def panels(
    source: UInt8Array, frames: UInt8Array, warped: UInt8Array, latent: Float32Array, *, residual_flow: bool = False
) -> UInt8Array:
    """Source | generated | warped source | deformed grid over the regular one | occlusion, for each frame.

    The deformed grid shows from where in the source each point of a regular grid on the frame is sampled. Occlusion is
    white where the warped source is kept, black where the decoder paints new content.

    Args:
        source: (H,W,3), the reference image.
        frames: (T,H,W,3), the clip.
        warped: (T,H,W,3), the warped source.
        latent: (3,T,h,w), sampling grid (x, y) and occlusion, each in [-1,1].
        residual_flow: the grid is an offset from the identity.

    Returns:
        (T,H,5W,3) uint8.

    Raises:
        InputError: the shapes do not match.
    """
    length, height, width = frames.shape[:3]
    fits = source.shape == frames.shape[1:] and warped.shape == frames.shape and latent.shape[:2] == (3, length)
    if not fits or frames.ndim != 4 or latent.ndim != 4:
        shapes = ", ".join(str(array.shape) for array in (source, frames, warped, latent))
        raise InputError(
            f"source, frames, warped and latent have shapes {shapes}, expected (H,W,3), twice (T,H,W,3), (3,T,h,w)"
        )
    strip = np.empty((length, height, 5 * width, 3), np.uint8)
    for index in range(length):
        flow, occlusion = latent[:2, index], (latent[2, index] + 1) / 2
        parts = (
            source,
            frames[index],
            warped[index],
            _grid_picture(flow + _identity(flow) if residual_flow else flow, width, height),
            _gray_picture(occlusion, width, height),
        )
        strip[index] = np.concatenate(parts, axis=1)
    return strip


def with_titles(strip: UInt8Array, titles: Sequence[str] = TITLES) -> UInt8Array:
    """N pictures side by side (T,H,N W,3) with a title above each: (T,H+h,N W,3), h even."""
    width = strip.shape[2] // len(titles)
    font, size = ImageFont.load_default(), 11
    across = max(font.getbbox(title)[2] for title in titles)
    enlarged = max(1, width // int(2 * across))
    band = Image.new("L", (strip.shape[2] // enlarged, size + 5), 255)
    for place, title in enumerate(titles):
        middle = (place + 0.5) * band.width / len(titles)
        ImageDraw.Draw(band).text((middle - font.getbbox(title)[2] / 2, 2), title, fill=0, font=font)
    band = band.resize((strip.shape[2], band.height * enlarged), Image.Resampling.BICUBIC)
    above = np.repeat(np.asarray(band)[None, :, :, None], 3, axis=3)
    return np.concatenate([np.repeat(above, len(strip), axis=0), strip], axis=1)


def _identity(flow: Float32Array) -> Float32Array:
    """Corner-aligned coordinates in [-1,1], (2,h,w), x first."""
    rows, columns = (np.linspace(-1, 1, size, dtype=np.float32) for size in flow.shape[1:])
    return np.stack(np.broadcast_arrays(columns[None, :], rows[:, None]))


def _grid_picture(flow: Float32Array, width: int, height: int) -> UInt8Array:
    """A regular grid in a light color, and the same lines displaced by `flow` (2,h,w): (height,width,3)."""
    size = (width * _OVERSAMPLING, height * _OVERSAMPLING)
    canvas = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(canvas)
    for grid, color in ((_identity(flow), _REGULAR), (flow, _DEFORMED)):
        # Flow far outside (or not finite) leaves the picture, but the drawing must not fail.
        inside = np.nan_to_num(np.clip(grid, -4, 4), nan=4)
        points = (inside.transpose(1, 2, 0) + 1) / 2 * (np.array(size) - 1)
        down, across = _evenly(points, axis=0), _evenly(points, axis=1).transpose(1, 0, 2)
        for line in (*down, *across):
            draw.line([(float(x), float(y)) for x, y in line], fill=color, width=_OVERSAMPLING, joint="curve")
    return np.asarray(canvas.resize((width, height), Image.Resampling.BOX))


def _evenly(points: npt.NDArray[np.floating[Any]], axis: int) -> npt.NDArray[np.floating[Any]]:
    """GRID_LINES rows or columns (or all, if fewer) of (h,w,2), evenly spaced from the first to the last."""
    count = points.shape[axis]
    position = np.linspace(0, count - 1, min(count, GRID_LINES))
    before = np.minimum(position.astype(np.intp), max(count - 2, 0))
    weight = np.expand_dims(position - before, (1, 2) if axis == 0 else (0, 2))
    after = np.minimum(before + 1, count - 1)
    lines: npt.NDArray[np.floating[Any]] = (
        np.take(points, before, axis) * (1 - weight) + np.take(points, after, axis) * weight
    )
    return lines


def _gray_picture(values: Float32Array, width: int, height: int) -> UInt8Array:
    """(h,w) in [0,1] as a smooth gray picture (height,width,3)."""
    gray = np.nan_to_num(np.clip(values, 0, 1) * 255).round().astype(np.uint8)
    scaled = Image.fromarray(gray).resize((width, height), Image.Resampling.BILINEAR)
    return np.repeat(np.asarray(scaled)[:, :, None], 3, axis=2)
