"""Puts a clip of a crop back into the photograph that it was cut out of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from lfdm_export.errors import InputError
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.preprocess import ImageLike, fitted_box, read_with_crop
from lfdm_export.pictures.resize import area_resize, whole_array
from lfdm_models.pictures.raster import Box, Raster

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]

#: Longer side of the result; larger photographs are scaled down to it.
MAX_SIDE = 1280
# Width of the soft border, as a share of the crop's shorter side.
_BORDER = 1 / 8


@dataclass(frozen=True, eq=False)
class Surroundings:
    """A photograph, and the part of it that moves.

    Attributes:
        picture: (H,W,3) uint8, at most `MAX_SIDE` per side.
        box: the crop in the pixels of `picture`.
        shape: (height, width) of the crop before the photograph was scaled down.
    """

    picture: UInt8Array
    box: Box
    shape: tuple[int, int]


def read_surroundings(image: ImageLike | Raster, crop: Crop | None) -> Surroundings:
    """The photograph around a crop.

    Args:
        image: the photograph, not a batch.
        crop: the region that the clip was made of, as in `lfdm_export.pictures.preprocess.prepare_image`.

    Raises:
        InputError: there is no crop, or it is not within the picture; or the picture cannot be used.
    """
    if crop is None:
        raise InputError("without a crop there is nothing to paste back into; give the crop that the clip was made of")
    pixels, (left, top, right, bottom) = read_with_crop(image, crop)
    shape = (bottom - top, right - left)
    height, width = pixels.shape[:2]
    longer = max(height, width)
    if longer <= MAX_SIDE:
        return Surroundings(whole_array(pixels), (left, top, right, bottom), shape)
    size = (max(1, height * MAX_SIDE // longer), max(1, width * MAX_SIDE // longer))
    left, right = (edge * size[1] // width for edge in (left, right))
    top, bottom = (edge * size[0] // height for edge in (top, bottom))
    left, top = min(left, size[1] - 1), min(top, size[0] - 1)
    return Surroundings(area_resize(pixels, size), (left, top, max(right, left + 1), max(bottom, top + 1)), shape)


def paste_back(frames: UInt8Array, surroundings: Surroundings) -> UInt8Array:
    """Blend the frames of a crop into the photograph.

    The frames are scaled to the crop (Lanczos). Along the crop's edges, except those that are the photograph's own, the
    clip fades in over 1/8 of the crop's shorter side, as half a wave of a cosine. Outside of the crop the pixels are
    those of the photograph, to the bit.

    Args:
        frames: (T,size,size,3) uint8, as the model makes them.
        surroundings: the photograph.

    Returns:
        (T,H,W,3) uint8, with the size of the photograph in `surroundings`.

    Raises:
        InputError: the crop is too long and thin for frames of that size.
    """
    picture, (left, top, right, bottom) = surroundings.picture, surroundings.box
    x0, y0, x1, y1 = fitted_box(surroundings.shape, frames.shape[1])
    still = picture[top:bottom, left:right].astype(np.float32)
    weight = _weights(surroundings)[:, :, None]
    pasted = np.repeat(picture[None], len(frames), axis=0)
    for whole, frame in zip(pasted, frames, strict=True):
        part = Image.fromarray(frame[y0:y1, x0:x1])  # not by `box` of `resize`, whose filter reads beyond it: the bars
        moved = part.resize((right - left, bottom - top), Image.Resampling.LANCZOS)
        whole[top:bottom, left:right] = np.rint(still + weight * (np.asarray(moved, np.float32) - still))
    return pasted


def _weights(surroundings: Surroundings) -> Float32Array:
    """The clip's share of each pixel of the crop, (h,w) in [0,1]."""
    height, width = surroundings.picture.shape[:2]
    left, top, right, bottom = surroundings.box
    border = max(1.0, _BORDER * min(bottom - top, right - left))
    rows = _fade(bottom - top, border, before=top > 0, after=bottom < height)
    columns = _fade(right - left, border, before=left > 0, after=right < width)
    return np.outer(rows, columns).astype(np.float32)


def _fade(length: int, border: float, *, before: bool, after: bool) -> Float32Array:
    """Weights along an axis, (length,): from 0 to 1 within `border` pixels of an end that fades."""
    place = np.arange(length) + 0.5
    near = np.minimum(place if before else np.inf, length - place if after else np.inf)
    return (0.5 - 0.5 * np.cos(np.pi * np.minimum(near / border, 1))).astype(np.float32)
