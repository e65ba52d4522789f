"""One engine and several threads that want it: each gets its turn, in the order in which they came."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from lfdm_export.errors import InputError

# Seconds after which who waits is told again where it stands, so that it may give up.
_GLANCE = 0.2


class Turns:
    """For any number of threads."""

    def __init__(self) -> None:
        """It is nobody's turn."""
        self._changed = threading.Condition()
        self._line: list[object] = []

    @contextmanager
    def taken(self, *, most: int | None = None, on_wait: Callable[[int], None] | None = None) -> Iterator[None]:
        """Wait for the turn, and keep it inside of the ``with``.

        Args:
            most: that may have or wait for the turn, this one included; None for any number.
            on_wait: called again and again with the number of those before; what it raises leaves the line.

        Raises:
            InputError: so many are there already.
        """
        ticket = object()
        with self._changed:
            if most is not None and len(self._line) >= most:
                raise InputError(f"{most} clips wait already; try again later")
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
        """How many are before, after a moment's wait if there are any."""
        with self._changed:
            if self._line.index(ticket):
                self._changed.wait(_GLANCE)
            return self._line.index(ticket)
