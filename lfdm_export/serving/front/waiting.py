"""Calls that wait for a message from their client: how many there may be, and what they may make gRPC keep.

gRPC keeps what has come of each message, up to its largest size, and tells nobody before the message is complete. So
the memory of this process is watched while calls wait.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lfdm_export.serving.front.refusal import RefusedError
from lfdm_export.serving.front.time_limit import limited, uncancel

#: Seconds between two looks at the memory.
_LOOK = 0.05
_ENDED = "others need the place of this silent call; send the request again, whole and faster"
#: Share of the waiting calls that end at each look while this process is too large.
_SHARE = 0.125


class Waiting:
    """The waiting calls. Those that have waited longest make room for others. Use it only on one event loop."""

    def __init__(self, most: int, most_bytes: int) -> None:
        """Start without calls.

        Args:
            most: maximum number of waiting calls.
            most_bytes: how much this process may grow from now on while calls wait.
        """
        self._most, self._most_resident = most, resident_bytes() + most_bytes
        self._calls: dict[asyncio.Task[Any], Callable[[], object]] = {}  # the longest wait first
        self._ended: set[asyncio.Task[Any]] = set()
        self._watched = False

    async def message(self, context: Any, seconds: float, late: str, working: Callable[[], object] = bool) -> Any:
        """The next message of a call, or gRPC's mark for the end.

        Args:
            context: gRPC's context of the call.
            seconds: how long the call may wait without requests in flight.
            late: what a call is told that waits longer.
            working: whether it has requests in flight; then it makes room only if memory requires it.

        Raises:
            RefusedError: no message came in time, or other calls need the place.
        """
        task = asyncio.current_task()
        assert task is not None
        self._calls[task] = working
        if len(self._calls) > self._most:
            self._end(self._idle(1))
        if not self._watched:
            self._watch()
        try:
            with limited(seconds, late, unless=working):
                return await context.read()
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            uncancel(task)
            raise RefusedError("RESOURCE_EXHAUSTED", _ENDED) from None
        finally:
            self._calls.pop(task, None)
            self._ended.discard(task)

    def _idle(self, count: int) -> list[asyncio.Task[Any]]:
        """The longest waits of calls without requests in flight."""
        idle = (task for task, working in self._calls.items() if not working())
        return list(itertools.islice(idle, count))

    def _end(self, calls: list[asyncio.Task[Any]]) -> None:
        for task in calls:
            del self._calls[task]
            self._ended.add(task)
            task.cancel()

    def _watch(self) -> None:
        """End calls while this process is too large, and look again as long as calls wait."""
        if resident_bytes() > self._most_resident:
            count = 1 + int(_SHARE * len(self._calls))
            self._end(self._idle(count) or list(itertools.islice(self._calls, count)))
        self._watched = bool(self._calls)
        if self._watched:
            asyncio.get_running_loop().call_later(_LOOK, self._watch)


def resident_bytes() -> int:
    """Memory of this process. Source: proc(5), statm."""
    return int(Path("/proc/self/statm").read_bytes().split()[1]) * os.sysconf("SC_PAGE_SIZE")
