"""How callers hear of progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

#: Called with the stage at work, how much of it is done, and out of how much.
Progress: TypeAlias = Callable[[str, int, int], None]


def report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Call it, if there is one."""
    if progress is not None:
        progress(stage, done, total)
