"""A limit on the time of a block of code."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lfdm_export.serving.front.refusal import RefusedError


@contextmanager
def limited(seconds: float, sentence: str, unless: Callable[[], object] = bool) -> Iterator[None]:
    """Limit the time of a block of this task; `asyncio.wait_for` takes another task, and 0.1 ms.

    Args:
        seconds: the limit.
        sentence: why the block ended.
        unless: returns whether the block may take the time once more; called when it has taken it.

    Raises:
        RefusedError: the block has not ended in time.
    """
    loop, task, expired = asyncio.get_running_loop(), asyncio.current_task(), False
    assert task is not None
    timer: asyncio.TimerHandle

    def start() -> None:
        nonlocal timer
        timer = loop.call_later(seconds, expire)

    def expire() -> None:
        nonlocal expired
        if unless():
            start()
            return
        expired = True
        task.cancel()

    start()
    try:
        yield
    except asyncio.CancelledError:
        if not expired:
            raise
        uncancel(task)
        raise RefusedError("DEADLINE_EXCEEDED", sentence) from None
    finally:
        timer.cancel()


def uncancel(task: asyncio.Task[Any]) -> None:
    """Take back a cancellation that was delivered to a task; Python 3.11 and newer count them."""
    if hasattr(task, "uncancel"):
        task.uncancel()
