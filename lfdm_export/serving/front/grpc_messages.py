"""Reading and writing gRPC messages with limits on time and size."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from lfdm_export.serving.front.inflate import inflated_message
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.refusal import RefusedError, invalid


class MessageDoor:
    """Reads and writes the messages of all calls, a few at a time."""

    def __init__(self, limits: FrontLimits) -> None:
        """Apply the limits of the front."""
        self._limits = limits
        self._readers = asyncio.Semaphore(limits.readers)

    async def read(self, context: Any, most: int) -> bytes:
        """Read the first message of a call.

        Raises:
            RefusedError: no message comes in time, or it is too large.
        """
        seconds = self._limits.body_seconds
        with limited(seconds, f"no whole request came within {seconds:.0f} s; send it faster"):
            async with self._readers:
                found = await context.read()
        if found is grpc.aio.EOF:
            raise invalid("the call has no request; send one")
        return inflated_message(found, most)

    async def write(self, context: Any, answer: bytes) -> None:
        """Send a message.

        Raises:
            RefusedError: the client does not read it in time.
        """
        with limited(self._limits.write_seconds, "the answer was not taken in time; read it faster"):
            await context.write(answer)


@contextmanager
def limited(seconds: float, sentence: str, unless: Callable[[], bool] = lambda: False) -> Iterator[None]:
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
        if hasattr(task, "uncancel"):  # Python 3.11 counts cancellations
            task.uncancel()
        raise RefusedError("DEADLINE_EXCEEDED", sentence) from None
    finally:
        timer.cancel()


def parsed(kind: Any, message: bytes) -> Any:
    """Parse a raw message.

    Raises:
        RefusedError: it is not of that kind.
    """
    try:
        return kind.FromString(message)
    except DecodeError:
        raise invalid("the request is not a message of Triton's protocol; send a ModelInferRequest") from None
