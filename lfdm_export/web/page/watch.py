"""Between the thread that makes a clip and the one that shows it."""

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
    """Nobody wants the clip any more."""


@dataclass(frozen=True)
class Waiting:
    """So many clips come before."""

    before: int


@dataclass(frozen=True)
class Working:
    """`done` of `total` of a stage are done."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, eq=False)
class Preview:
    """Some frames (n, H, W, 3) uint8 as they would be by the estimate after `step` of `steps`."""

    step: int
    steps: int
    frames: NDArray[np.uint8]


@dataclass(frozen=True)
class Made:
    """The clip is there."""

    kept: Kept


@dataclass(frozen=True)
class Failed:
    """There is no clip, for a reason that is a sentence."""

    why: str


Event: TypeAlias = Waiting | Working | Preview | Made | Failed


class Watch:
    """What is told of one clip. The maker's thread tells, another one listens, any may stop it."""

    def __init__(self) -> None:
        """Nothing was told."""
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._give_up: Callable[[], object] | None = None

    def tell(self, event: Event) -> None:
        """Tell what happened.

        Raises:
            Stopped: nobody wants to know any more.
        """
        if self._stopped.is_set():
            raise Stopped
        self._events.put(event)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Tell of progress, as the library reports it.

        Raises:
            Stopped: see `tell`.
        """
        self.tell(Working(stage, done, total))

    def fail(self, why: str) -> None:
        """Tell that there is no clip, if anybody wants to know."""
        if not self._stopped.is_set():
            self._events.put(Failed(why))

    def on_stop(self, give_up: Callable[[], object]) -> None:
        """Have something called where the clip is stopped, by the thread that stops it."""
        self._give_up = give_up

    @property
    def stopped(self) -> bool:
        """Whether nobody wants the clip any more."""
        return self._stopped.is_set()

    def stop(self) -> None:
        """The clip is not wanted any more; harmless where it has ended."""
        if not self._stopped.is_set():
            self._stopped.set()
            if self._give_up is not None:
                self._give_up()

    def end(self) -> None:
        """Nothing more will be told."""
        self._events.put(None)

    def news(self, seconds: float) -> list[Event | None]:
        """What was told since, after waiting so long at most for something; None is the end."""
        found: list[Event | None] = []
        with contextlib.suppress(queue.Empty):
            found.append(self._events.get(timeout=seconds))
            while True:
                found.append(self._events.get_nowait())
        return found
