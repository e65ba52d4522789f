"""SHA-256 of files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from lfdm_models.paths import LFS_POINTER

_CHUNK = 1 << 20


def sha256_and_size(path: Path) -> tuple[str, int]:
    """SHA-256 of a file, hexadecimal, and its size in bytes.

    Raises:
        OSError: it cannot be read.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def json_digest(facts: object) -> str:
    """SHA-256 of plain JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is a pointer of Git LFS (`LFS_POINTER`).

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER.encode()
