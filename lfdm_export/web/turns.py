"""A queue of threads that share one pipeline: each has its turn in the order of arrival."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lfdm_export.errors import InputError

# Seconds between two calls of `on_wait`, which may raise to leave the queue.
_GLANCE = 0.2


class Turns:
    """A fair lock that reports the position in its queue. For any number of threads."""

    def __init__(self) -> None:
        """Start with an empty queue."""
        self._changed = threading.Condition()
        self._line: list[object] = []

    @contextmanager
    def taken(self, *, most: int | None = None, on_wait: Callable[[int], None] | None = None) -> Iterator[None]:
        """Wait for the turn, and hold it inside the ``with`` block.

        Args:
            most: most threads that may hold or wait for the turn, this one included; None for no limit.
            on_wait: called repeatedly with the number of threads ahead; if it raises, the thread leaves the queue.

        Raises:
            InputError: the queue is full.
        """
        ticket = object()
        with self._changed:
            if most is not None and len(self._line) >= most:
                raise InputError(f"{most} clips are queued already; try again later")
            self._line.append(ticket)
        try:
            while before := self._wait(ticket):
                if on_wait is not None:
                    on_wait(before)
            yield
        finally:
            with self._changed:
                self._line.remove(ticket)
                self._changed.notify_all()

    def _wait(self, ticket: object) -> int:
        """The number of threads ahead, after a short wait if there are any."""
        with self._changed:
            if self._line.index(ticket):
                self._changed.wait(_GLANCE)
            return self._line.index(ticket)
