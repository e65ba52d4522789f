"""Finds the face in a photograph with a cascade of OpenCV, whose file of weights comes with the package."""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from lfdm_export.errors import EngineError, InputError, MissingDependencyError
from lfdm_export.pictures.resize import area_resize, whole_array
from lfdm_models.pictures.raster import Box, Raster

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

# Of the frontal cascades of OpenCV the one with the fewest false faces.
_CASCADE = "haarcascade_frontalface_alt2.xml"
# Photographs are searched at this longer side: faces that are smaller than 1/20 of it have nothing to animate.
_SEARCHED_SIDE, _SMALLEST_FACE = 800, 40
# In a picture of MUG, 896 pixels per side, the cascade finds a face of 494, whose middle is 474 below the upper edge.
_SIDE_PER_FACE, _FACE_HEIGHT = 896 / 494, 474 / 896


@dataclass(frozen=True)
class Face:
    """The largest face of a photograph.

    Attributes:
        crop: (x, y, width, height) of the square around it, in pixels of the upright picture.
        found: number of faces in the photograph.
    """

    crop: tuple[int, int, int, int]
    found: int


def can_find_faces() -> bool:
    """Whether OpenCV, which finds faces, is installed."""
    return importlib.util.find_spec("cv2") is not None


def largest_face(picture: UInt8Array | Raster) -> Face:
    """Find the largest face, upright and seen from the front, and the square around it.

    The square shows as much around the face as the pictures of MUG do: its side is 1.8 times that of the detected box,
    and the middle of the box is 0.53 of the side below its upper edge. Near the edges of the photograph it is moved
    inside, and at most as large as the photograph.

    Args:
        picture: (H,W,3) uint8, upright, or a decoded picture.

    Raises:
        InputError: there is no face.
        MissingDependencyError: OpenCV is not installed.
        EngineError: the installed version of OpenCV does not have the cascade.
    """
    height, width = picture.shape[:2]
    full_width, full_height = picture.full_size if isinstance(picture, Raster) else (width, height)
    shrink = min(1.0, _SEARCHED_SIDE / max(height, width))
    searched = (max(1, round(height * shrink)), max(1, round(width * shrink)))
    boxes = _detect(area_resize(picture, searched) if shrink < 1 else whole_array(picture))
    if not boxes:
        raise InputError(
            f"no face was found in the picture of {full_width}x{full_height} pixels, expected one seen from the front; "
            "give the region yourself: --crop X,Y,W,H"
        )
    box = max(boxes, key=lambda found: (found[2] - found[0], found))
    return Face(_around(box, full_width / searched[1], (full_width, full_height)), len(boxes))


def _around(box: Box, factor: float, full_size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The square around a box that is `factor` times larger in a picture of (width, height)."""
    left, top, right, bottom = (factor * edge for edge in box)
    side = min(round((right - left) * _SIDE_PER_FACE), *full_size)
    x, y = round((left + right - side) / 2), round((top + bottom) / 2 - side * _FACE_HEIGHT)
    return min(max(x, 0), full_size[0] - side), min(max(y, 0), full_size[1] - side), side, side


def _detect(pixels: UInt8Array) -> list[Box]:
    """The boxes of all faces, in no order that means something."""
    cv2 = _import_opencv()
    path = os.path.join(getattr(getattr(cv2, "data", None), "haarcascades", ""), _CASCADE)  # noqa: PTH118 (OpenCV's own)
    if not hasattr(cv2, "CascadeClassifier") or not os.path.isfile(path):  # noqa: PTH113
        raise EngineError(
            f"OpenCV {cv2.__version__} has no weights that find faces, expected a version below 5; "
            "install it with: pip install 'lfdm-export[face]'"
        )
    gray = cv2.equalizeHist(cv2.cvtColor(np.ascontiguousarray(pixels), cv2.COLOR_RGB2GRAY))
    found = cv2.CascadeClassifier(path).detectMultiScale(
        gray, scaleFactor=1.1, minNeighbors=5, minSize=(_SMALLEST_FACE, _SMALLEST_FACE)
    )
    boxes = [tuple(map(int, box)) for box in found]
    return [(x, y, x + width, y + height) for x, y, width, height in boxes]


def _import_opencv() -> Any:
    try:
        import cv2
    except ModuleNotFoundError as error:
        raise MissingDependencyError("opencv-python-headless", "finding a face in a picture", "face") from error
    return cv2
