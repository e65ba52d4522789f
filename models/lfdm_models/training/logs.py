"""Logs as JSON lines, and as scalars for TensorBoard where it is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any


class Logs:
    """Appends to ``losses.jsonl``, and to event files if tensorboard can be imported."""

    def __init__(self, folder: Path, *, events: bool = True) -> None:
        """Write into `folder`, which is created with the first entry; event files only if `events`."""
        self._folder, self._events = folder, events
        self._writer: Any = None

    def __enter__(self) -> Logs:
        """Open the event file, if tensorboard is installed."""
        if not self._events:
            return self
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return self
        self._writer = SummaryWriter(str(self._folder))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log values of a step."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "losses.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
