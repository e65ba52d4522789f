"""NumPy archives from strangers, read with suspicion."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import BundleError

# What numpy and zipfile raise on a damaged archive, or on a lone array, which `with` cannot hold.
_UNREADABLE = (
    ValueError, KeyError, EOFError, AttributeError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error, OSError,
)  # fmt: skip
# More than any header of an .npy file that this program writes.
_HEADER_BYTES = 4096


def read_arrays(path: Path, expected: Mapping[str, tuple[str, tuple[int, ...]]], what: str) -> dict[str, NDArray[Any]]:
    """Read the named arrays of an .npz file; others in it are left alone.

    Args:
        path: the file.
        expected: dtype and shape of each array, by name.
        what: the file is meant to be, for messages.

    Raises:
        BundleError: it is no such archive, an array is missing or of another dtype or shape, or the file would
            unpack to more than these arrays take.
    """
    largest = max(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in expected.values())
    try:
        with np.load(path, allow_pickle=False) as archive:
            for info in archive.zip.infolist():  # before anything is unpacked: a small file can claim to be huge
                if info.file_size > largest + _HEADER_BYTES:
                    raise BundleError(f"{path}: {info.filename} is larger than a {what} needs; export again")
            arrays = {name: archive[name] for name in expected}
    except _UNREADABLE as error:
        raise BundleError(f"{path} is no {what} ({error}); export again") from error
    for name, (dtype, shape) in expected.items():
        found = arrays[name]
        if found.shape != shape or found.dtype != dtype:
            raise BundleError(f"{path}: {name} is {found.dtype} {found.shape}, expected {dtype} {shape}; export again")
    return arrays
