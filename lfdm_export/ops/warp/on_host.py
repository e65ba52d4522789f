"""Warp in NumPy, for previews: the image moved by the flow alone, which takes no engine and no decoder."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]

#: A coordinate in the zero padding outside of any picture, like all coordinates of larger magnitude.
_OUTSIDE = np.float32(100.0)


def warped_images(image: Float32, latent: Float32, *, residual_flow: bool) -> Float32:
    """The output `warped` of `decode`, up to rounding.

    Args:
        image: (B, 3, H, W) in [0, 1].
        latent: (B, 3, F, h, w).
        residual_flow: the grid of the latent is an offset from the identity.

    Returns:
        (B, 3, F, H, W) in [0, 1].

    Parity: the grid is corner-aligned, but resized and sampled by pixel centers, as `lfdm_models.layers.sample` says.
    """
    (height, width), (rows, columns) = image.shape[2:], latent.shape[3:]
    grid = latent[:, :2]
    if residual_flow:
        x, y = (np.linspace(-1, 1, size, dtype=np.float32) for size in (columns, rows))
        grid = grid + np.stack(np.broadcast_arrays(x[None], y[:, None]))[None, :, None]
    resized = _resized(_resized(grid, 3, height), 4, width)
    within = np.where(np.abs(resized) < _OUTSIDE, resized, _OUTSIDE)
    # Positions in pixels, (B, F, H, W).
    x, y = ((within[:, axis] + 1) * np.float32(size / 2) - np.float32(0.5) for axis, size in ((0, width), (1, height)))
    left, top = np.floor(x), np.floor(y)
    warped = np.zeros((len(image), 3, *x.shape[1:]), np.float32)
    for right, down in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, row = left + right, top + down
        weight = (1 - np.abs(x - column)) * (1 - np.abs(y - row))
        weight *= (column >= 0) & (column < width) & (row >= 0) & (row < height)
        place = np.clip(row, 0, height - 1).astype(np.intp) * width + np.clip(column, 0, width - 1).astype(np.intp)
        for sample, pixels in enumerate(image.reshape(len(image), 3, -1)):
            warped[sample] += pixels[:, place[sample]] * weight[sample]
    return warped


def _resized(values: Float32, axis: int, size: int) -> Float32:
    """Resize an axis bilinearly, by pixel centers. A value that is not finite stays where it is."""
    given = values.shape[axis]
    position = np.maximum((np.arange(size) + 0.5) * given / size - 0.5, 0).astype(np.float32)
    before = np.minimum(position.astype(np.intp), given - 1)
    share = np.expand_dims(position - before, tuple(range(1, values.ndim - axis)))
    after = np.minimum(before + 1, given - 1)
    result: Float32 = np.take(values, before, axis) * (1 - share) + np.take(values, after, axis) * share
    return result
