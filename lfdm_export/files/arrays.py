"""NumPy archives from untrusted sources, read with all checks."""

from __future__ import annotations

import lzma
import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import BundleError

# What numpy and zipfile raise on a damaged archive, or on a single array, which `with` cannot hold.
_UNREADABLE = (
    ValueError, LookupError, EOFError, AttributeError, TypeError, RuntimeError, SyntaxError, ArithmeticError,
    MemoryError, struct.error, tokenize.TokenError, lzma.LZMAError, zipfile.BadZipFile, zlib.error, OSError,
)  # fmt: skip
# Larger than any header of an .npy file that this program writes.
_HEADER_BYTES = 4096


def read_arrays(path: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]], what: str) -> dict[str, NDArray[Any]]:
    """Read the named arrays of an .npz file; other arrays in it are ignored.

    Args:
        path: the file.
        expected: dtype and shape of each array, by name.
        what: kind of file, for messages.

    Raises:
        BundleError: the file is no such archive, an array is missing or has another dtype or shape, or the file would
            unpack to more than these arrays need.
    """
    largest = max(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in expected.values())
    try:
        with np.load(path, allow_pickle=False) as archive:
            for info in archive.zip.infolist():  # before anything is unpacked: a small file can claim to be huge
                if info.file_size > largest + _HEADER_BYTES:
                    raise BundleError(f"{path}: {info.filename} is larger than a {what} needs; export again")
            for name in expected:  # nor is memory allocated by an array's own header
                _check_header(archive.zip, name, expected[name], path)
            arrays = {name: archive[name] for name in expected}
    except _UNREADABLE as error:
        raise BundleError(f"{path} is not a {what} ({error}); export again") from error
    return arrays


def _check_header(archive: zipfile.ZipFile, name: str, expected: tuple[str, tuple[int, ...]], path: Path) -> None:
    with archive.open(f"{name}.npy") as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, found = read(member, max_header_size=_HEADER_BYTES)
    if found.hasobject:
        raise ValueError(f"{name} holds Python objects")
    dtype, wanted = expected
    if shape != wanted or found != dtype:
        raise BundleError(f"{path}: {name} is {found} {str(shape)[:80]}, expected {dtype} {wanted}; export again")
