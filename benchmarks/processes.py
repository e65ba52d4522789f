"""Linux's processes, from /proc."""

from __future__ import annotations

import contextlib
from pathlib import Path


def descendants(ancestor: int) -> list[int]:
    """Ids of a process's descendants, in any process group."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # the process has ended
            # "PID (NAME) STATE PARENT ...", where the name may contain anything.
            parent = int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(entry.parent.name))
    found, left = [], [ancestor]
    while left:
        left = [child for parent in left for child in children.get(parent, [])]
        found += left
    return found
