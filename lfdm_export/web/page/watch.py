"""The channel between the thread that makes a clip and the thread that shows it."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.web.page.shelf import Kept


class Stopped(Exception):
    """The clip was cancelled."""


@dataclass(frozen=True)
class Waiting:
    """The number of clips ahead in the queue."""

    before: int


@dataclass(frozen=True)
class Working:
    """`done` of `total` parts of a stage are done."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Preview:
    """Some frames (n, H, W, 3) uint8, decoded from the estimate after `step` of `steps`."""

    step: int
    steps: int
    frames: NDArray[np.uint8]


@dataclass(frozen=True)
class Made:
    """The clip is ready."""

    kept: Kept


@dataclass(frozen=True)
class Failed:
    """The clip failed; `why` is a sentence."""

    why: str


Event: TypeAlias = Waiting | Working | Preview | Made | Failed


class Watch:
    """The events of one clip: the thread that makes it sends them, another receives them, and any may stop it."""

    def __init__(self) -> None:
        """Start without events."""
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._give_up: Callable[[], object] | None = None

    def tell(self, event: Event) -> None:
        """Send an event.

        Raises:
            Stopped: the clip was cancelled.
        """
        if self._stopped.is_set():
            raise Stopped
        self._events.put(event)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Send progress. Has the signature of `lfdm_export.progress.Progress`.

        Raises:
            Stopped: see `tell`.
        """
        self.tell(Working(stage, done, total))

    def fail(self, why: str) -> None:
        """Send the reason of a failure, unless the clip was cancelled."""
        if not self._stopped.is_set():
            self._events.put(Failed(why))

    def on_stop(self, give_up: Callable[[], object]) -> None:
        """Set the function that `stop` calls, in the thread that stops the clip."""
        self._give_up = give_up

    @property
    def stopped(self) -> bool:
        """Whether the clip was cancelled."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """Cancel the clip. Has no effect after its end."""
        if not self._stopped.is_set():
            self._stopped.set()
            if self._give_up is not None:
                self._give_up()

    def end(self) -> None:
        """Send the end of the events."""
        self._events.put(None)

    def news(self, seconds: float) -> list[Event | None]:
        """The events since the last call, after waiting up to `seconds` for the first. None marks the end."""
        found: list[Event | None] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=seconds))
            while True:
                found.append(self._events.get_nowait())
        return found
