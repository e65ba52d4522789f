"""Scale 8-bit pictures by area averaging, bit for bit as OpenCV does.

The model's training pictures were made with OpenCV; this module avoids that large dependency.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lfdm_models.pictures.raster import Raster

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]

# Pixels of a picture that are processed at a time.
_STRIP_PIXELS = 1 << 20


def area_resize(image: UInt8Array | Raster, size: tuple[int, int]) -> UInt8Array:
    """Scale a picture bit for bit as OpenCV's INTER_AREA does.

    Shrinking averages the area under each new pixel. Where an axis grows, both axes are interpolated between two
    neighbors, in fixed point, with OpenCV's own weights for this mode. A picture that shrinks is processed in strips of
    rows, so that a large one needs little additional memory.

    Args:
        image: (H,W,C) uint8, or a decoded picture.
        size: new (height, width).

    Returns:
        (height,width,C) uint8.

    Source: the behavior of OpenCV's `resize` with INTER_AREA on 8-bit pictures (versions 4 and 5).
    """
    height, width, channels = image.shape
    if (height, width) == size:
        return whole_array(image).copy()
    if size[0] > height or size[1] > width:
        return _enlarge(whole_array(image), size)
    # The factors as OpenCV computes them: one over the quotient, so that 7 can become 7.000000000000001.
    factors = 1.0 / (size[0] / height), 1.0 / (size[1] / width)
    whole = round(factors[0]), round(factors[1])
    strip = max(1, _STRIP_PIXELS // (width * whole[0])) * whole[0]  # of whole blocks
    parts = (image[start : start + strip] for start in range(0, height, strip))
    if max(abs(factors[0] - whole[0]), abs(factors[1] - whole[1])) >= np.finfo(np.float64).eps:
        taps = _area_weights(width, size[1])
        rows = np.concatenate([_weighted_sum(part, *taps, axis=1) for part in parts])
        return _round(_weighted_sum(rows, *_area_weights(height, size[0]), axis=0))
    shape = (-1, whole[0], size[1], whole[1], channels)
    total = np.concatenate([part.reshape(shape).sum(axis=(1, 3), dtype=np.int32) for part in parts])
    if whole == (2, 2):  # the only case in which OpenCV rounds half up, not to even
        return ((total + 2) >> 2).astype(np.uint8)
    return _round(total.astype(np.float32) * np.float32(1.0 / (whole[0] * whole[1])))


def whole_array(image: UInt8Array | Raster) -> UInt8Array:
    """The picture as an array (H,W,C) uint8, which may be the input itself."""
    return image.array() if isinstance(image, Raster) else image


def _round(values: Float32Array) -> UInt8Array:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def _area_weights(old: int, new: int) -> tuple[npt.NDArray[np.intp], Float32Array]:
    """Per new pixel, the old pixels under it and their weights: (new, taps) each, unused taps with weight 0."""
    factor = 1.0 / (new / old)
    covered: list[list[tuple[int, float]]] = []
    for index in range(new):
        start = index * factor
        end, cell = start + factor, min(factor, old - start)
        last = min(int(np.floor(end)), old - 1)
        first = min(int(np.ceil(start)), last)
        taps = [(pixel, 1.0 / cell) for pixel in range(first, last)]
        if first - start > 1e-3:  # parts below a thousandth of a pixel are ignored
            taps.insert(0, (first - 1, (first - start) / cell))
        if end - last > 1e-3:
            taps.append((last, min(end - last, 1.0, cell) / cell))
        covered.append(taps)
    most = max(map(len, covered))
    padded = [taps + [(0, 0.0)] * (most - len(taps)) for taps in covered]
    pixels = np.array([[pixel for pixel, _ in taps] for taps in padded], np.intp)
    return pixels, np.array([[weight for _, weight in taps] for taps in padded], np.float32)


def _weighted_sum(
    image: npt.NDArray[Any], pixels: npt.NDArray[np.intp], weights: Float32Array, *, axis: int
) -> Float32Array:
    """Sum of weighted pixels along an axis, tap by tap in float32: the order decides the last bit."""
    shape = [1, 1, 1]
    shape[axis] = len(pixels)
    total: Float32Array | None = None
    for tap in range(pixels.shape[1]):
        term = np.take(image, pixels[:, tap], axis=axis) * weights[:, tap].reshape(shape)
        total = term if total is None else np.add(total, term, out=total)
    assert total is not None  # every new pixel covers something
    return total


def _enlarge(image: UInt8Array, size: tuple[int, int]) -> UInt8Array:
    """Two taps per axis with weights of 11 bits; sums are truncated to OpenCV's fixed-point widths in between."""
    (top, bottom, row_weights), (left, right, column_weights) = map(_enlarging_weights, image.shape[:2], size)

    def across(rows: UInt8Array) -> npt.NDArray[np.int32]:
        wide: npt.NDArray[np.int32] = (
            rows[:, left] * column_weights[0][:, None] + rows[:, right] * column_weights[1][:, None]
        )
        return wide >> 4

    upper, lower = (weights[:, None, None] for weights in row_weights)
    total = ((upper * across(image[top])) >> 16) + ((lower * across(image[bottom])) >> 16)
    enlarged: UInt8Array = ((total + 2) >> 2).clip(0, 255).astype(np.uint8)
    return enlarged


def _enlarging_weights(old: int, new: int) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.int32]]:
    """Per new pixel, the two old pixels and their weights in 1/2048, (2, new)."""
    ratio = new / old
    index = np.arange(new)
    first = np.floor(index * (1.0 / ratio)).astype(np.intp)
    second_weight = ((index + 1) - (first + 1) * ratio).astype(np.float32)
    second_weight = np.where(second_weight <= 0, np.float32(0), second_weight - np.floor(second_weight))
    second_weight[first >= old - 1] = 0
    first = np.minimum(first, old - 1)
    weights = np.stack([np.float32(1) - second_weight, second_weight]) * np.float32(2048)
    return first, np.minimum(first + 1, old - 1), np.rint(weights).astype(np.int32)
