"""Photographs to the model's images, and the model's frames to 8-bit pictures.

Source: the published program. In: scaled by area averaging so that the longer side fits, padded with black to a
square, divided by 255. Out: clamped, times 255, truncated.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from lfdm_export.errors import InputError, not_finite
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.files.names import user_path
from lfdm_export.pictures.crop import Crop, crop_box
from lfdm_export.pictures.faces import Face, largest_face
from lfdm_export.pictures.resize import area_resize, whole_array
from lfdm_models.pictures.errors import PictureError
from lfdm_models.pictures.formats import open_picture, open_stream
from lfdm_models.pictures.raster import Box, Raster, on_black, read_picture, to_8_bits, upright_size

logger = logging.getLogger(__name__)

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
#: A path, a PIL image, or an array (H,W), (H,W,1), (H,W,3) or (H,W,4) of uint8 or uint16.
ImageLike: TypeAlias = "str | os.PathLike[str] | Image.Image | npt.NDArray[Any]"

#: Largest side in the rules below; no camera's pictures are larger.
_LARGEST_SIDE = 1 << 14
#: Maximum for arrays and PIL images; files have the limits of `lfdm_models.pictures.formats`.
MAX_PIXELS = 80_000_000


@dataclass(frozen=True)
class Preprocessing:
    """A data set's rule for its pictures before they are scaled to the model's size.

    Attributes:
        dataset: name of the data set, for information; None for the plain rule.
        frame_size: (width, height) of the camera's pictures, to which the crop applies. The crop is in that camera's
            pixels and has no meaning for other pictures, so they stay whole.
        crop_rows, crop_columns: half-open ranges of pixels to keep; None keeps all.
        resize_first: (width, height) that every picture is scaled to first, whatever its shape.
    """

    dataset: str | None = None
    frame_size: tuple[int, int] | None = None
    crop_rows: tuple[int, int] | None = None
    crop_columns: tuple[int, int] | None = None
    resize_first: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a size is not positive, or a crop is empty, outside its picture or without a `frame_size`.
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
                raise ValueError(f"{name} {crop} is not a range of pixels within frame_size {self.frame_size}")

    @classmethod
    def for_dataset(cls, dataset: str | None) -> Preprocessing:
        """The rule of "mug", "mhad" or "natops"; the plain one for None.

        Raises:
            InputError: the name is unknown.
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
        """Read the result of `to_json`.

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

    Files may be JPEG, PNG, WebP, GIF, BMP or TIFF; their content decides. A path or PIL image is rotated upright by its
    EXIF or XMP orientation, colors are converted to RGB, 16- and 32-bit gray is scaled to 8 bits, and transparency is
    composited on black. An animation gives its first frame; an animated PNG gives the picture that viewers without
    animation show.

    A JPEG of more than 40 million pixels (of several scans: about half as many) is scaled down by 2, 4 or 8 while it is
    decoded. All other pictures keep their size.

    Returns:
        (H,W,3) uint8.

    Raises:
        InputError: not a readable picture, too large, or an array of another shape or type.
    """
    return whole_array(_read(image))


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) of a picture file, upright, without decoding it.

    Raises:
        InputError: not a readable picture.
    """
    place = user_path(path)
    with _as_input_error(), open_stream(place, str(place)) as stream:
        opened = open_picture(stream, str(place))
        return upright_size(opened.image, opened.full_size)


def read_stream(stream: BinaryIO, name: str, *, most_pixels: int | None = None) -> Raster:
    """The picture in a binary stream, for `prepare_image`, with the rules of `read_image`.

    Args:
        stream: of an encoded picture.
        name: for messages.
        most_pixels: maximum number of pixels; default: the limit of its format.

    Raises:
        InputError: not a readable picture, or too large.
    """
    with _as_input_error():
        return read_picture(stream, name, most_pixels=most_pixels)


def _read(image: ImageLike | Raster) -> UInt8Array | Raster:
    if isinstance(image, Raster):
        return image
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image)
    with _as_input_error():
        if isinstance(image, Image.Image):
            width, height = image.size
            if not 1 <= width * height <= MAX_PIXELS:
                raise InputError(
                    f"the image has {width}x{height} pixels, expected 1 to {MAX_PIXELS:,}; scale it down first"
                )
            return Raster(image, "the image")
        if isinstance(image, str | os.PathLike):
            path = user_path(image)
            return read_picture(path, str(path))
    raise InputError(f"an image must be a path, a PIL image or an array, not {type(image).__name__}")


@contextmanager
def _as_input_error() -> Iterator[None]:
    try:
        yield
    except PictureError as error:
        raise InputError(str(error)) from error


def _array_to_rgb(array: npt.NDArray[Any]) -> UInt8Array:
    """(H,W), (H,W,1), (H,W,3) or (H,W,4), uint8 or uint16, as a new (H,W,3) uint8 array."""
    shape = array.shape
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise InputError(f"an image array has shape {shape}, expected (H,W,3), or (H,W) or (H,W,4)")
    if array.shape[0] * array.shape[1] > MAX_PIXELS:
        raise InputError(f"an image array of shape {shape} has more than {MAX_PIXELS:,} pixels; scale it down first")
    if array.dtype == np.uint16:
        array = to_8_bits(array)
    if array.dtype != np.uint8:
        raise InputError(f"an image array has values of type {array.dtype}, expected uint8 in 0..255 (or uint16)")
    if array.shape[2] == 4:
        return on_black(array)
    return np.repeat(array, 3, axis=2) if array.shape[2] == 1 else np.array(array, order="C")


def find_face(image: ImageLike) -> Face:
    """The largest face of a picture, and the crop around it; `lfdm_export.pictures.faces.largest_face` says how.

    Raises:
        InputError: the picture cannot be used, or has no face.
        MissingDependencyError: OpenCV is not installed.
        EngineError: the installed version of OpenCV does not have the detector.
    """
    return largest_face(_read(image))


def settled_crop(picture: UInt8Array | Raster, crop: Crop) -> Crop:
    """A crop, where "face" has become the square around the largest face; that there are several is logged.

    Raises:
        InputError: there is no face.
        MissingDependencyError: OpenCV is not installed.
    """
    if crop != "face":
        return crop
    face = largest_face(picture)
    if face.found > 1:
        logger.warning("%d faces found, the largest is used: crop %s", face.found, ",".join(map(str, face.crop)))
    return face.crop


def read_with_crop(image: ImageLike | Raster, crop: Crop) -> tuple[UInt8Array | Raster, Box]:
    """The whole picture, and the crop in its pixels.

    Raises:
        InputError: the picture cannot be used, the crop is not within it, or there is no face.
    """
    pixels = _read(image)
    crop = settled_crop(pixels, crop)
    full = pixels.full_size if isinstance(pixels, Raster) else (pixels.shape[1], pixels.shape[0])
    return pixels, crop_box(crop, full, (pixels.shape[1], pixels.shape[0]))


def prepare_image(
    image: ImageLike | Raster, size: int, preprocessing: Preprocessing | None = None, *, crop: Crop | None = None
) -> UInt8Array:
    """One picture in the model's input size.

    A picture that already has `size` rows and columns passes unchanged. Any other is scaled so that its longer side
    fits, and padded with black to a square, as in the published program; `crop` avoids the padding.

    Args:
        image: a picture in one of the forms that `read_image` accepts.
        size: rows and columns of the result.
        preprocessing: the data set's rule; default: the plain one.
        crop: cut out first: "center" for the largest centered square, "face" for a square around the largest face, or
            (x, y, width, height) in pixels of the upright picture. It replaces the data set's own rule.

    Returns:
        (size,size,3) uint8, RGB.

    Raises:
        InputError: the picture cannot be used, the crop is not within it, or there is no face.
        MissingDependencyError: OpenCV, which finds faces, is not installed.
    """
    if crop is None:
        pixels, rule = _read(image), preprocessing or Preprocessing()
    else:
        pixels, rule = _cut(*read_with_crop(image, crop)), Preprocessing()
    height, width = pixels.shape[:2]
    if (height, width) == (size, size):
        return whole_array(pixels)
    _refuse_thin((height, width), size)
    if rule.resize_first is not None:
        pixels = area_resize(pixels, (rule.resize_first[1], rule.resize_first[0]))
    if rule.frame_size is not None and pixels.shape[:2] == (rule.frame_size[1], rule.frame_size[0]):
        left, right = rule.crop_columns or (0, rule.frame_size[0])
        top, bottom = rule.crop_rows or (0, rule.frame_size[1])
        pixels = _cut(pixels, (left, top, right, bottom))
    height, width = pixels.shape[:2]
    left, top, right, bottom = fitted_box((height, width), size)
    square = np.zeros((size, size, 3), np.uint8)
    square[top:bottom, left:right] = area_resize(pixels, (bottom - top, right - left))
    return square


def fitted_box(shape: tuple[int, int], size: int) -> Box:
    """Where a picture of (height, width) lies in the model's square; around it is black.

    Raises:
        InputError: a side would be less than a pixel.
    """
    _refuse_thin(shape, size)
    longer = max(shape)
    height, width = (side * size // longer for side in shape)
    top, left = (size - height) // 2, (size - width) // 2
    return left, top, left + width, top + height


def _refuse_thin(shape: tuple[int, int], size: int) -> None:
    if min(shape) * size < max(shape):
        raise InputError(
            f"an image of {shape[1]}x{shape[0]} pixels is too long and thin to be scaled to {size}x{size}; crop it"
        )


def _cut(pixels: UInt8Array | Raster, box: Box) -> UInt8Array | Raster:
    left, top, right, bottom = box
    return pixels.crop(box) if isinstance(pixels, Raster) else pixels[top:bottom, left:right]


def prepare_images(
    images: ImageLike, size: int, preprocessing: Preprocessing | None = None, *, crop: Crop | None = None
) -> UInt8Array:
    """One picture, or a batch (B,H,W,3) uint8, in the model's input size; each passes through `prepare_image`.

    Returns:
        (B,size,size,3) uint8, RGB; B is 1 for one picture.

    Raises:
        InputError: a picture cannot be used.
    """
    if isinstance(images, np.ndarray) and images.ndim == 4:
        if len(images) == 0:
            raise InputError(f"a batch of images has shape {images.shape}, expected at least one image")
        return np.stack([prepare_image(image, size, preprocessing, crop=crop) for image in images])
    return prepare_image(images, size, preprocessing, crop=crop)[None]


def to_float(images: UInt8Array) -> Float32Array:
    """Convert (B,H,W,3) uint8 to the networks' (B,3,H,W) float32 in [0,1]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def to_uint8(frames: npt.NDArray[np.floating[Any]]) -> UInt8Array:
    """Convert the networks' frames to 8-bit pictures: clamped to [0,1], times 255, truncated.

    Args:
        frames: (B,3,T,H,W) float, in [0,1] up to rounding.

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
            raise not_finite(f"frame {index} of sample {sample} has")
        # Parity: truncated, not rounded, as the published program does.
        video[sample, index] = (np.clip(frame, 0, 1) * frame.dtype.type(255)).astype(np.uint8).transpose(1, 2, 0)
    return video
