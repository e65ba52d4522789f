"""Frames and latents in untrusted NumPy archives."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from lfdm_models.pictures.errors import PictureError, decoding

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_WHAT = "a NumPy archive"


def read_frames(stream: BinaryIO, name: str, most_pixels: int) -> Iterator[UInt8Array]:
    """Yield the frames in an archive's array ``frames``: (T,H,W,3) uint8, or a single sample (1,T,H,W,3).

    Nothing is unpacked before the array's header matches its size, and frames come one by one.

    Raises:
        PictureError: the file is no such archive, is damaged, or has too many pixels.
    """
    with decoding(name, _WHAT), zipfile.ZipFile(stream) as archive:
        names = [member.removesuffix(".npy") for member in archive.namelist()]
        if "frames" not in names:
            raise PictureError(f"{name} holds {', '.join(names[:9]) or 'nothing'}, expected an array named frames")
        with archive.open("frames.npy") as member:
            given, by_columns, dtype = _read_header(member, name)
            shape = given[1:] if len(given) == 5 and given[0] == 1 else given
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or 0 in shape:
                raise PictureError(f"frames in {name} have shape {given} and type {dtype}, expected (T,H,W,3) of uint8")
            if math.prod(shape) > 3 * most_pixels:
                raise PictureError(
                    f"{name} has more than {most_pixels:,} pixels in all; give a shorter or smaller clip"
                )
            # A column-major array stores its frames interleaved.
            parts = [shape] if by_columns else [(1, *shape[1:])] * shape[0]
            for part in parts:
                data = member.read(math.prod(part))
                if len(data) < math.prod(part):
                    raise PictureError(f"{name} cannot be read as {_WHAT}: it ends within the frames; save it again")
                yield from np.frombuffer(data, np.uint8).reshape(part, order="F" if by_columns else "C")


def read_floats(stream: BinaryIO, name: str, array: str, most_values: int) -> npt.NDArray[np.float32]:
    """Read an array of float32, of any shape; nothing is unpacked before its header matches its size.

    Raises:
        PictureError: the file is not an archive or is damaged; the array is missing, of another type or too large.
    """
    with decoding(name, _WHAT), zipfile.ZipFile(stream) as archive:
        names = [member.removesuffix(".npy") for member in archive.namelist()]
        if array not in names:
            raise PictureError(f"{name} holds {', '.join(names[:9]) or 'nothing'}, expected an array named {array}")
        with archive.open(f"{array}.npy") as member:
            shape, by_columns, dtype = _read_header(member, name)
            if dtype != np.float32:
                raise PictureError(f"{array} in {name} has values of type {dtype}, expected float32")
            if math.prod(shape) > most_values:
                raise PictureError(f"{array} in {name} has the shape {shape}, more than {most_values:,} values")
            data = member.read(4 * math.prod(shape))
            if len(data) < 4 * math.prod(shape):
                raise PictureError(f"{name} cannot be read as {_WHAT}: it ends within {array}; save it again")
            return np.frombuffer(data, dtype).reshape(shape, order="F" if by_columns else "C").astype(np.float32)


def read_text(stream: BinaryIO, name: str, array: str, most_characters: int) -> str | None:
    """Read a text from an archive; None if the array is missing, or is not a text of at most that length.

    Raises:
        PictureError: the file is not an archive, or is damaged.
    """
    with decoding(name, _WHAT), zipfile.ZipFile(stream) as archive:
        if f"{array}.npy" not in archive.namelist():
            return None
        with archive.open(f"{array}.npy") as member:
            shape, _, dtype = _read_header(member, name)
            if shape != () or dtype.kind != "U" or dtype.itemsize > 4 * most_characters:
                return None
            return str(np.frombuffer(member.read(dtype.itemsize), dtype)[0])


def _read_header(member: IO[bytes], name: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the data is column-major, and dtype of an array."""
    version = npy.read_magic(member)
    if version not in _READERS:
        raise PictureError(f"{name} holds an array of version {version}, expected 1.0 or 2.0; save it again")
    shape, by_columns, dtype = _READERS[version](member)
    return shape, by_columns, dtype
