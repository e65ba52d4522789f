"""Frames in a NumPy archive, read with suspicion."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from lfdm_models.pictures.errors import PictureError, decoding

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
_MEMBER = "frames.npy"


def read_frames(stream: BinaryIO, name: str, most_pixels: int) -> Iterator[UInt8Array]:
    """The frames in an archive's array ``frames``, (T,H,W,3) uint8, or one sample of them, (1,T,H,W,3).

    Nothing is unpacked before the array's header agrees with its size, and frames come one by one.

    Raises:
        PictureError: it is no such archive, is damaged, or has too many pixels.
    """
    what = "a NumPy archive"
    with decoding(name, what), zipfile.ZipFile(stream) as archive:
        names = [member.removesuffix(".npy") for member in archive.namelist()]
        if "frames" not in names:
            raise PictureError(f"{name} holds {', '.join(names[:9]) or 'nothing'}, expected an array named frames")
        with archive.open(_MEMBER) as member:
            version = npy.read_magic(member)
            if version not in _READERS:
                raise PictureError(f"{name} holds an array of version {version}, expected 1.0 or 2.0; save it anew")
            given, by_columns, dtype = _READERS[version](member)
            shape = given[1:] if len(given) == 5 and given[0] == 1 else given
            if len(shape) != 4 or shape[-1] != 3 or dtype != np.uint8 or 0 in shape:
                raise PictureError(f"frames in {name} have shape {given} and type {dtype}, expected (T,H,W,3) of uint8")
            if math.prod(shape) > 3 * most_pixels:
                raise PictureError(
                    f"{name} has more than {most_pixels:,} pixels in all; give a shorter or smaller clip"
                )
            # An array by columns has its frames side by side.
            parts = [shape] if by_columns else [(1, *shape[1:])] * shape[0]
            for part in parts:
                data = member.read(math.prod(part))
                if len(data) < math.prod(part):
                    raise PictureError(f"{name} cannot be read as {what}: it ends within the frames; save it anew")
                yield from np.frombuffer(data, np.uint8).reshape(part, order="F" if by_columns else "C")
