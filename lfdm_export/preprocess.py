"""Photographs into the model's images, and the model's frames into 8-bit pictures.

Source: the model's published way with pictures: scaled by area averaging so that the longer side
fits, padded with black to a square, divided by 255; out: clamped, times 255, truncated.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from lfdm_export.errors import EngineError, InputError
from lfdm_export.files.names import user_path
from lfdm_export.json_codec import from_plain, to_plain
from lfdm_export.resize import area_resize

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
#: A path, a PIL image, or an array (H,W), (H,W,1), (H,W,3) or (H,W,4) of uint8 or uint16.
ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[Any]"

#: Of the rules below; no camera's pictures are larger.
_LARGEST_SIDE = 1 << 14
#: Larger pictures are refused before they are decoded.
MAX_PIXELS = 80_000_000
#: Everything that Pillow raises for a file that is damaged, or no picture.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class Preprocessing:
    """What a data set does to its pictures before they are scaled to the model's size.

    Attributes:
        dataset: whose rule it is, for the reader; None for the plain one.
        frame_size: (width, height) of the pictures that are cropped: the camera's. A crop is in that
            camera's pixels and would cut anything out of another picture, so others stay whole.
        crop_rows, crop_columns: half-open ranges of pixels that are kept; None keeps all.
        resize_first: (width, height) that every picture is scaled to before all else, whatever its shape.
    """

    dataset: str | None = None
    frame_size: tuple[int, int] | None = None
    crop_rows: tuple[int, int] | None = None
    crop_columns: tuple[int, int] | None = None
    resize_first: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a size is not positive, or a crop is empty, outside its picture or without one.
        """
        for name, pair in (("frame_size", self.frame_size), ("resize_first", self.resize_first)):
            if pair is not None and not 1 <= min(pair) <= max(pair) <= _LARGEST_SIDE:
                raise ValueError(f"{name} must be positive and at most {_LARGEST_SIDE}, not {pair}")
        crops = (("crop_columns", self.crop_columns, 0), ("crop_rows", self.crop_rows, 1))
        for name, crop, axis in crops:
            if crop is None:
                continue
            if self.frame_size is None:
                raise ValueError(f"{name} needs frame_size, the size of the pictures to crop")
            if not 0 <= crop[0] < crop[1] <= self.frame_size[axis]:
                raise ValueError(f"{name} {crop} is no range of pixels within frame_size {self.frame_size}")

    @classmethod
    def for_dataset(cls, dataset: str | None) -> Preprocessing:
        """The rule of "mug", "mhad" or "natops"; the plain one for None.

        Raises:
            InputError: another name.
        """
        if dataset is None:
            return cls()
        if dataset not in _DATASETS:
            raise InputError(f"unknown data set {dataset!r}; expected one of {', '.join(_DATASETS)}, or none")
        return _DATASETS[dataset]

    def to_json(self) -> dict[str, object]:
        """A plain JSON object, for the bundle's manifest."""
        plain: dict[str, object] = to_plain(self)
        return plain

    @classmethod
    def from_json(cls, value: Mapping[str, object]) -> Preprocessing:
        """What `to_json` gave.

        Raises:
            InputError: a field is missing, unknown or of the wrong type, or its value is out of range.
        """
        try:
            return from_plain(cls, dict(value), "preprocessing")
        except ValueError as error:
            raise InputError(f"{error}; the preprocessing facts are damaged or of another version") from error


_DATASETS = {
    "mug": Preprocessing("mug"),
    "mhad": Preprocessing("mhad", resize_first=(336, 480)),
    "natops": Preprocessing("natops", frame_size=(320, 240), crop_rows=(10, 239), crop_columns=(30, 290)),
}


def read_image(image: ImageLike) -> UInt8Array:
    """One picture as RGB.

    Colours of a path or PIL image are converted to RGB, its EXIF orientation is applied, 16-bit
    values are scaled to 8 bits and transparency is composited on black.

    Returns:
        (H,W,3) uint8.

    Raises:
        InputError: not a readable picture, too large, or an array of another shape or type.
    """
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image)
    if isinstance(image, Image.Image):
        return pil_to_rgb(image, "the image")
    if not isinstance(image, str | os.PathLike):
        raise InputError(f"an image must be a path, a PIL image or an array, not {type(image).__name__}")
    name = str(user_path(image))
    if Path(name).is_dir():
        raise InputError(f"{name} is a folder, not an image; give the path of one picture")
    try:
        with Image.open(name) as opened:
            return pil_to_rgb(opened, name)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; give the path of a picture") from None
    except UNREADABLE as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{name} cannot be read as an image ({_first_line(error)})") from error


def pil_to_rgb(image: Image.Image, name: str) -> UInt8Array:
    """The current frame of a PIL image as `read_image` gives it; `name` is for messages.

    Returns:
        (H,W,3) uint8.

    Raises:
        InputError: too large, empty, damaged, or of float values, whose range is not known.
    """
    width, height = image.size
    if width * height > MAX_PIXELS or min(width, height) < 1:
        raise InputError(f"{name} has {width}x{height} pixels, expected 1 to {MAX_PIXELS:,}; scale it down first")
    if image.mode == "F":
        raise InputError(f"{name} holds float values, whose range is not known; save it with 8 or 16 bits")
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            return _array_to_rgb(np.asarray(image).clip(0, 65535).astype(np.uint16))
        has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
        return _array_to_rgb(np.asarray(image.convert("RGBA" if has_alpha else "RGB")))
    except UNREADABLE as error:
        raise InputError(f"{name} cannot be read as an image ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _array_to_rgb(array: npt.NDArray[Any]) -> UInt8Array:
    """(H,W), (H,W,1), (H,W,3) or (H,W,4), uint8 or uint16, as (H,W,3) uint8 of its own."""
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"an image array has shape {shape}, expected (H,W,3), or (H,W) or (H,W,4)")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"an image array of shape {shape} has more than {MAX_PIXELS:,} pixels; scale it down first")
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if array.dtype != np.uint8:
        raise InputError(f"an image array has values of type {array.dtype}, expected uint8 in 0..255 (or uint16)")
    if array.shape[2] == 4:
        product = array[:, :, :3].astype(np.uint16) * array[:, :, 3:]
        return ((product + 127) // 255).astype(np.uint8)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.array(array, order="C")


def prepare_image(image: ImageLike, size: int, preprocessing: Preprocessing | None = None) -> UInt8Array:
    """One picture as the model takes it.

    A picture that already has `size` rows and columns passes unchanged.

    Args:
        image: see `read_image`.
        size: rows and columns of the result.
        preprocessing: the data set's rule; the plain one if None.

    Returns:
        (size,size,3) uint8, RGB.

    Raises:
        InputError: the picture cannot be used.
    """
    pixels, rule = read_image(image), preprocessing or Preprocessing()
    if pixels.shape[:2] == (size, size):
        return pixels
    if rule.resize_first is not None:
        pixels = area_resize(pixels, (rule.resize_first[1], rule.resize_first[0]))
    if rule.frame_size is not None and pixels.shape[:2] == (rule.frame_size[1], rule.frame_size[0]):
        pixels = pixels[slice(*rule.crop_rows or (None,)), slice(*rule.crop_columns or (None,))]
    height, width = pixels.shape[:2]
    longer = max(height, width)
    fitted = (height * size // longer, width * size // longer)
    if min(fitted) < 1:
        raise InputError(
            f"an image of {width}x{height} pixels is too long and thin to be scaled to {size}x{size}; crop it"
        )
    top, left = (size - fitted[0]) // 2, (size - fitted[1]) // 2
    square = np.zeros((size, size, 3), np.uint8)
    square[top : top + fitted[0], left : left + fitted[1]] = area_resize(pixels, fitted)
    return square


def prepare_images(images: ImageLike, size: int, preprocessing: Preprocessing | None = None) -> UInt8Array:
    """One picture or a batch of them, (B,H,W,3) uint8, as the model takes them; see `prepare_image`.

    Returns:
        (B,size,size,3) uint8, RGB; B is 1 for one picture.

    Raises:
        InputError: a picture cannot be used.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        if len(images) == 0:
            raise InputError(f"a batch of images has shape {images.shape}, expected at least one image")
        return np.stack([prepare_image(image, size, preprocessing) for image in images])
    return prepare_image(images, size, preprocessing)[None]


def to_float(images: UInt8Array) -> Float32Array:
    """(B,H,W,3) uint8 to the networks' (B,3,H,W) float32 in [0,1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def to_uint8(frames: npt.NDArray[np.floating[Any]]) -> UInt8Array:
    """The networks' frames as 8-bit pictures: clamped to [0,1], times 255, truncated.

    Args:
        frames: (B,3,T,H,W) float, [0,1] but for rounding.

    Returns:
        (B,T,H,W,3) uint8.

    Raises:
        EngineError: a value is NaN or infinite.
    """
    batch, channels, length, height, width = frames.shape
    video = np.empty((batch, length, height, width, channels), np.uint8)
    for sample, index in np.ndindex(batch, length):  # frame by frame: no second float copy of the clip
        frame = frames[sample, :, index]
        if not np.isfinite(frame).all():
            raise EngineError(
                f"frame {index} of sample {sample} has values that are not finite; "
                "the weights or the engine are at fault: check the bundle with lfdm-verify"
            )
        # Parity: truncated, not rounded, as the published program does.
        video[sample, index] = (np.clip(frame, 0, 1) * frame.dtype.type(255)).astype(np.uint8).transpose(1, 2, 0)
    return video
