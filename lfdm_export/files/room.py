"""Folders of files that can be created again, kept within a size: the least recently used file is removed first."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def used_now(path: Path) -> None:
    """Record that a file was used, where its folder is writable."""
    with contextlib.suppress(OSError):
        os.utime(path)


def make_room(folder: Path, ending: str, needed: int, size: int, *, replaced: Path) -> None:
    """Remove files until `needed` bytes fit; safe for any number of processes.

    Args:
        folder: the folder.
        ending: of the names of its files; other files stay.
        needed: bytes to be written.
        size: bytes that all files together may take.
        replaced: the file to be written.

    Raises:
        OSError: a file cannot be removed.
    """
    entries = []
    for path in folder.glob(f"*{ending}"):
        with contextlib.suppress(OSError):  # another process was faster
            facts = path.stat()
            if path != replaced:
                entries.append((facts.st_mtime, facts.st_size, path))
    total = sum(taken for _, taken, _ in entries)
    for _, taken, path in sorted(entries):
        if total + needed <= size:
            break
        path.unlink(missing_ok=True)
        total -= taken
