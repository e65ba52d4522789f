"""Processes that a signal has stopped: they hold requests and locks, and nothing else would notice them."""

from __future__ import annotations

import logging
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)

#: Seconds that a process may be stopped, and seconds between two looks.
STOPPED_SECONDS, _LOOK = 2.0, 0.5


class StoppedProcesses:
    """Ends processes that stay stopped. Use it on one thread."""

    def __init__(self) -> None:
        """Start without any."""
        self._since: dict[int, float] = {}
        self._next = 0.0

    def end(self, processes: dict[int, str]) -> None:
        """End those that have been stopped for too long; cheap enough to be called all the time.

        Args:
            processes: name by process id.
        """
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + _LOOK
        stopped = filter(is_stopped, processes)
        self._since = {pid: self._since.get(pid, now) for pid in stopped}
        for pid, since in self._since.items():
            if now - since >= STOPPED_SECONDS:
                logger.error("the process of %s was stopped by a signal: it is ended and started again", processes[pid])
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process. Source: proc(5), stat."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except OSError:
        return False
