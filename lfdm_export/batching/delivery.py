"""A thread for callbacks, so that computation does not wait for receivers."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable

logger = logging.getLogger(__name__)


class Delivery:
    """Calls functions in order of submission on its own thread.

    An exception in a function is logged, and the next function is still called.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Queue a call of `function`; returns immediately."""
        self._queue.put(function)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def close(self, timeout: float) -> bool:
        """Call all queued functions, then end the thread. The thread itself may call this.

        Args:
            timeout: seconds to wait.

        Returns:
            Whether the thread has ended or is the calling thread.
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
            del function  # else it keeps a whole sample in memory until the next one
