"""The crop of a photograph before it is scaled."""

from __future__ import annotations

from typing import Literal, TypeAlias

from lfdm_export.errors import InputError
from lfdm_models.pictures.raster import Box

#: The largest centered square, a square around the largest face, or (x, y, width, height) in pixels of the upright
#: picture.
Crop: TypeAlias = Literal["center", "face"] | tuple[int, int, int, int]


def parse_crop(text: str) -> Crop:
    """Parse ``center``, ``face`` or ``X,Y,W,H``.

    Raises:
        InputError: it is none of them.
    """
    if text in ("center", "face"):
        return "center" if text == "center" else "face"
    try:
        x, y, width, height = (int(part) for part in text.split(","))
    except ValueError:
        raise InputError(
            f"the crop is {text!r}, expected center, face, or X,Y,W,H in pixels such as 40,0,300,300"
        ) from None
    return x, y, width, height


def crop_box(crop: Crop, full_size: tuple[int, int], size: tuple[int, int]) -> Box:
    """The crop in a picture's pixels.

    Args:
        crop: in pixels of the picture in its file; "face" is settled before.
        full_size: (width, height) in the file.
        size: (width, height) of the decoded picture, which the decoder may have scaled.

    Raises:
        InputError: the crop is invalid, or not within the picture.
    """
    width, height = full_size
    if crop == "center":
        side = min(width, height)
        crop = ((width - side) // 2, (height - side) // 2, side, side)
    if not isinstance(crop, tuple | list) or len(crop) != 4 or not all(type(value) is int for value in crop):
        raise InputError(f"crop is {crop!r}, expected 'center', 'face', or (x, y, width, height) in pixels")
    x, y, across, down = crop
    if min(x, y) < 0 or min(across, down) < 1 or x + across > width or y + down > height:
        raise InputError(
            f"crop {x},{y},{across},{down} is not within the picture of {width}x{height} pixels; "
            "its numbers are X,Y,W,H from the upper left"
        )
    left, right = (edge * size[0] // width for edge in (x, x + across))
    top, bottom = (edge * size[1] // height for edge in (y, y + down))
    return left, top, max(right, left + 1), max(bottom, top + 1)
