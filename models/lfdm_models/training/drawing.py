"""A small rasterizer: shapes as signed distances, drawn on all frames of a clip at once.

A pixel's coverage is 0.5 - distance, in pixels, limited to 0 … 1, which gives smooth edges without a larger canvas. Per
pixel, only additions, products, quotients, square roots and comparisons are used. IEEE 754 defines their results, so a
picture has the same bits on every machine.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32Array: TypeAlias = NDArray[np.float32]
UInt8Array: TypeAlias = NDArray[np.uint8]
#: A number, or one per frame (T,).
PerFrame: TypeAlias = "float | NDArray[np.float64]"
#: Red, green, blue in [0, 1].
Color: TypeAlias = "tuple[float, float, float]"

_TINY = np.float32(1e-6)


class Patch(NamedTuple):
    """The part of the canvas that a shape may cover, with its own coordinates.

    Attributes:
        rows, columns: range on the canvas.
        u, v: coordinates from the shape's center, to its right and down, broadcastable to (T, h, w), in half
            widths of the picture.
    """

    rows: slice
    columns: slice
    u: Float32Array
    v: Float32Array


def per_frame(value: PerFrame) -> Float32Array:
    """A number or (T,) -> float32, broadcastable over (T, h, w)."""
    array = np.asarray(value, np.float32)
    return array if array.ndim == 0 else array[:, None, None]


class Canvas:
    """T square pictures of float32 colors. Coordinates range from -1 (left, top) to 1 (right, bottom)."""

    def __init__(self, frames: int, size: int) -> None:
        self.size = size
        self.pixels: Float32Array = np.zeros((3, frames, size, size), np.float32)
        self._axis = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)

    def repeat(self, frames: int) -> Canvas:
        """A canvas with `frames` copies of this canvas's only picture."""
        canvas = Canvas(0, self.size)
        canvas.pixels = np.repeat(self.pixels, frames, axis=1)
        return canvas

    def patch(
        self,
        x: PerFrame,
        y: PerFrame,
        reach: tuple[float, float],
        *,
        cos: PerFrame = 1.0,
        sin: PerFrame = 0.0,
    ) -> Patch:
        """The area around a center in all frames.

        Args:
            x: x of the center.
            y: y of the center.
            reach: half width and half height of the area around it, along the canvas's axes.
            cos: cosine of the shape's clockwise rotation.
            sin: sine of that rotation.
        """
        columns = self._span(x, reach[0])
        rows = self._span(y, reach[1])
        u = self._axis[columns] - per_frame(x)
        v = self._axis[rows][:, None] - per_frame(y)
        if np.any(sin):
            c, s = per_frame(cos), per_frame(sin)
            u, v = u * c + v * s, v * c - u * s
        return Patch(rows, columns, u, v)

    def _span(self, center: PerFrame, reach: float) -> slice:
        margin = reach + 2.0 / self.size
        first = int((float(np.min(center)) - margin + 1) * self.size / 2)
        last = int((float(np.max(center)) + margin + 1) * self.size / 2) + 1
        return slice(min(max(first, 0), self.size), min(max(last, 0), self.size))

    def fill(
        self,
        patch: Patch,
        distance: Float32Array,
        color: Color,
        *,
        alpha: PerFrame = 1.0,
        tone: Float32Array | None = None,
        blur: float = 0.0,
    ) -> None:
        """Draw where `distance` is negative.

        Args:
            patch: area to draw in.
            distance: signed, negative inside, broadcastable to (T, h, w).
            color: color of the shape.
            alpha: opacity, 0 … 1.
            tone: factor of the color at each pixel.
            blur: width of the edge in half widths of the picture, if wider than a pixel.
        """
        width = np.float32(max(2.0 / self.size, blur))
        cover = np.float32(0.5) - distance / width
        np.clip(cover, 0, 1, out=cover)
        if isinstance(alpha, np.ndarray) or alpha != 1.0:
            cover = cover * per_frame(alpha)
        for channel in range(3):
            part = self.pixels[channel, :, patch.rows, patch.columns]
            value = np.float32(color[channel])
            part += ((value if tone is None else value * tone) - part) * cover

    def to_uint8(self) -> UInt8Array:
        """(T, H, W, 3) uint8, rounded."""
        levels = np.clip(self.pixels * np.float32(255) + np.float32(0.5), 0, np.float32(255.5)).astype(np.uint8)
        return np.ascontiguousarray(levels.transpose(1, 2, 3, 0))


def ellipse(u: Float32Array, v: Float32Array, a: PerFrame, b: PerFrame) -> Float32Array:
    """First-order distance to an ellipse of radii a and b: (k - 1) k / |grad k|, with k the scaled radius."""
    ra, rb = per_frame(a), per_frame(b)
    p, q = u / ra, v / rb
    p2, q2 = p * p, q * q
    k2 = p2 + q2
    k2 += _TINY
    gradient = p2 / (ra * ra) + q2 / (rb * rb)
    gradient += _TINY / (ra * rb)
    distance: Float32Array = np.sqrt(k2)
    gradient = k2 / gradient
    np.sqrt(gradient, out=gradient)
    distance -= 1
    distance *= gradient
    return distance


def segment(u: Float32Array, v: Float32Array, half_length: PerFrame, radius: PerFrame) -> Float32Array:
    """Distance to a bar with round ends along u."""
    over = np.maximum(np.abs(u) - per_frame(half_length), 0)
    distance: Float32Array = np.sqrt(over * over + v * v) - per_frame(radius)
    return distance


def bowl(
    u: Float32Array, v: Float32Array, half_width: PerFrame, upper: PerFrame, lower: PerFrame, margin: PerFrame
) -> Float32Array:
    """Distance to the area between two parabolas that meet at (±half_width, 0).

    Args:
        u: coordinate to the right.
        v: coordinate down.
        half_width: u at which the parabolas meet.
        upper: v of one parabola at u = 0; positive is down.
        lower: v of the other, at least `upper`.
        margin: added on all sides.
    """
    w, top, bottom, grown = (per_frame(value) for value in (half_width, upper, lower, margin))
    scaled = u / w
    arch = 1 - scaled * scaled
    slope = 2 * scaled / w
    steeper = np.maximum(np.abs(top), np.abs(bottom)) * slope
    across = np.maximum(arch * top - v, v - arch * bottom) / np.sqrt(1 + steeper * steeper)
    distance: Float32Array = np.maximum(across, np.abs(u) - w) - grown
    return distance
