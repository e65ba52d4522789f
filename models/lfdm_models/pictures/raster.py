"""A decoded picture as upright RGB, converted part by part.

Converting a whole picture's mode, type and orientation at once would make a second and a third copy of it.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from lfdm_models.pictures.errors import PictureError, decoding
from lfdm_models.pictures.formats import Source, open_picture, open_stream

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
#: (left, top, right, bottom), in pixels of the upright picture.
Box: TypeAlias = tuple[int, int, int, int]

_ORIENTATION, _SAMPLE_FORMAT, _PHOTOMETRIC = 0x0112, 339, 262
_SIGNED = 2
# EXIF orientation -> rows flipped, columns flipped, then axes swapped.
_TURNS = {
    2: (False, True, False),
    3: (True, True, False),
    4: (True, False, False),
    5: (False, False, True),
    6: (True, False, True),
    7: (True, True, True),
    8: (False, True, True),
}
_UPRIGHT = (False, False, False)
_MOST_16_BITS = 2**16 - 1


def read_picture(source: Source, name: str, *, most_pixels: int | None = None) -> Raster:
    """Open and decode a picture file, with the formats and limits of `open_picture`.

    Args:
        source: a path, or a binary stream.
        name: for messages.
        most_pixels: a smaller limit than the format's own.

    Raises:
        PictureError: it cannot be read, or is too large.
    """
    with open_stream(source, name) as stream:
        opened = open_picture(stream, name, most_pixels=most_pixels)
        return Raster(opened.image, name, opened.full_size)


class Raster:
    """A decoded picture, upright, as 8-bit RGB; its rows are converted when they are read.

    EXIF or XMP define its orientation; with damaged or unusual EXIF it stays as stored. Colors are converted to RGB,
    transparency is composited on black. 16-bit gray is scaled to 8 bits; so is 32-bit gray, whose values count as
    16-bit if none is larger.

    Attributes:
        full_size: (width, height) of the upright picture before its decoder scaled it; for a `crop`, those of the whole
            picture.
    """

    def __init__(self, image: Image.Image, name: str, full_size: tuple[int, int] | None = None) -> None:
        """Decode a picture.

        Args:
            image: a picture's current frame.
            name: for messages.
            full_size: (width, height) before its decoder scaled it, if it did; before any rotation.

        Raises:
            PictureError: it is damaged, or has float values, whose range is unknown.
        """
        if image.mode == "F":
            raise PictureError(f"{name} holds float values, whose range is unknown; save it with 8 or 16 bits")
        with decoding(name, "an image"):
            image.load()
            # After loading: in a PNG, the tag may follow the pixels, and Pillow rotates TIFF itself.
            self._turn = _turn(image)
            self._gray_range = _gray_range(image)
            self._inverted = _is_inverted(image)
        self._image, self._name = image, name
        width, height = image.size
        across, down = full_size or image.size
        if self._turn[2]:
            width, height, across, down = height, width, down, across
        self._box: Box = (0, 0, width, height)
        self.full_size = across, down

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""
        left, top, right, bottom = self._box
        return bottom - top, right - left, 3

    def crop(self, box: Box) -> Raster:
        """A part of the picture, without a copy; `box` must be within it."""
        part = object.__new__(Raster)
        part.__dict__.update(self.__dict__)
        left, top = self._box[:2]
        part._box = (left + box[0], top + box[1], left + box[2], top + box[3])
        return part

    def __getitem__(self, rows: slice) -> UInt8Array:
        """Some rows, (n, W, 3) uint8, as a new array."""
        left, top, right, _ = self._box
        start, stop, _ = rows.indices(self.shape[0])
        upright = (left, top + start, right, top + stop)
        flip_rows, flip_columns, swap = self._turn
        x0, y0, x1, y1 = (upright[1], upright[0], upright[3], upright[2]) if swap else upright
        width, height = self._image.size
        if flip_columns:
            x0, x1 = width - x1, width - x0
        if flip_rows:
            y0, y1 = height - y1, height - y0
        with decoding(self._name, "an image"):
            pixels = self._rgb(self._image.crop((x0, y0, x1, y1)))
        pixels = pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1]
        return np.ascontiguousarray(pixels.transpose(1, 0, 2) if swap else pixels)

    def array(self) -> UInt8Array:
        """The whole picture, (H, W, 3) uint8."""
        height, width, _ = self.shape
        whole = np.empty(self.shape, np.uint8)
        step = max(1, (1 << 20) // width)
        for start in range(0, height, step):
            whole[start : start + step] = self[start : start + step]
        return whole

    def _rgb(self, part: Image.Image) -> UInt8Array:
        """A part in its stored orientation, (h, w, 3) uint8."""
        if part.mode.startswith("I"):
            return np.repeat(self._gray(np.asarray(part))[:, :, None], 3, axis=2)
        has_alpha = part.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in part.info
        if not has_alpha:
            return np.asarray(part.convert("RGB"))
        return on_black(np.asarray(part.convert("RGBA")))

    def _gray(self, values: npt.NDArray[Any]) -> UInt8Array:
        unsigned, most = self._gray_range
        if unsigned:
            values = np.ascontiguousarray(values, np.int32).view(np.uint32)
        if most == _MOST_16_BITS:
            gray = to_8_bits(values.clip(0, most).astype(np.uint16))
        else:
            gray = np.rint(values.clip(0) * (255.0 / most)).astype(np.uint8)
        return ~gray if self._inverted else gray


def _turn(image: Image.Image) -> tuple[bool, bool, bool]:
    """The rotation of a picture by its orientation tag; no other tag is read."""
    try:
        value: Any = image.getexif().get(_ORIENTATION)
        if isinstance(value, tuple | bytes) and value:
            value = value[0]
        return _TURNS.get(value, _UPRIGHT)
    except Exception:  # noqa: BLE001 (Pillow raises anything on damaged EXIF, which must not reject the picture)
        return _UPRIGHT


def _is_inverted(image: Image.Image) -> bool:
    """Whether a TIFF stores white as 0, which Pillow ignores for 16 and 32 bits."""
    return image.mode.startswith("I") and (getattr(image, "tag_v2", None) or {}).get(_PHOTOMETRIC) == 0


def upright_size(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) of a picture that is not decoded yet, after its rotation.

    Args:
        image: the picture.
        size: (width, height) as stored.
    """
    return size[::-1] if _turn(image)[2] else size


def _gray_range(image: Image.Image) -> tuple[bool, int]:
    """For 16- and 32-bit gray: whether Pillow's signed values are really unsigned, and the value of white."""
    if image.mode != "I":
        return False, _MOST_16_BITS
    lowest, highest = image.getextrema()
    assert isinstance(lowest, int | float)
    assert isinstance(highest, int | float)
    signed = _SIGNED in (getattr(image, "tag_v2", None) or {}).get(_SAMPLE_FORMAT, ())
    unsigned = lowest < 0 and not signed
    if unsigned:
        return True, 2**32 - 1
    if highest <= _MOST_16_BITS:
        return False, _MOST_16_BITS
    return False, 2**31 - 1 if signed else 2**32 - 1


def on_black(pixels: UInt8Array) -> UInt8Array:
    """Composite (h, w, 4) uint8, RGB with alpha, on black: (h, w, 3)."""
    product = pixels[:, :, :3].astype(np.uint16) * pixels[:, :, 3:]
    return ((product + 127) // 255).astype(np.uint8)


def to_8_bits(values: npt.NDArray[np.uint16]) -> UInt8Array:
    """Round 16-bit values to 8 bits, of any shape."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
