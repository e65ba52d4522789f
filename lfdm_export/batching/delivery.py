"""A thread that calls back, so that who computes need not wait for who listens."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Delivery:
    """Calls functions one after the other, in the order in which they were handed in, on a thread of its own.

    What a function raises is logged; the next one is called all the same.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Have `function` called; returns at once."""
        self._queue.put(function)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, timeout: float) -> bool:
        """Call what was handed in, then end the thread; may be called from it.

        Args:
            timeout: seconds to wait.

        Returns:
            Whether the thread has ended, or is the caller's own.
        """
        self._queue.put(None)
        if threading.current_thread() is self._thread:
            return True
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (function := self._queue.get()) is not None:
            try:
                function()
            except Exception:
                logger.exception("a callback failed")
            del function  # else it would hold a whole sample until the next one comes
