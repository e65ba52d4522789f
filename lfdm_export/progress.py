"""Progress callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

#: Called as ``progress(stage, done, total)``.
Progress: TypeAlias = Callable[[str, int, int], None]


def report(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Call `progress`, unless it is None."""
    if progress is not None:
        progress(stage, done, total)
