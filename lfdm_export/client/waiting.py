"""How a client waits: blocking its thread, or by asyncio. The rest of the client is shared by both.

Clients and streams are coroutines that wait only through these methods. Those of `Blocking` never suspend, so `finish`
runs such a coroutine to its end in the calling thread, without an event loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeAlias, TypeVar

from lfdm_export.client.settings import import_grpc

T = TypeVar("T")
#: Starts work that is awaited.
Work = Callable[[], Coroutine[Any, Any, T]]


def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that waits by `Blocking`, and return its result."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError(f"{work} waits for an event loop")


class Blocking:
    """Waits by blocking the calling thread. Thread-safe."""

    event = threading.Event

    def channels(self) -> Any:
        """Return the module that opens channels."""
        return import_grpc()

    async def answer(self, call: Any) -> Any:
        """Return the response of a unary call, which continues if the wait is interrupted.

        Raises:
            grpc.RpcError: the call failed.
            grpc.FutureCancelledError: this client cancelled the call.
        """
        return call.result()

    async def message(self, call: Any) -> Any:
        """Return the next response of a streaming call, None after the last one. Raises as `answer` does."""
        return next(call, None)

    async def until(self, event: Any, seconds: float) -> bool:
        """Wait for an event for at most `seconds`; returns whether it was set."""
        return bool(event.wait(seconds))

    async def aside(self, function: Callable[[], T]) -> T:
        """Run a function that computes for some 100 ms, and return its result."""
        return function()

    async def together(
        self, works: Sequence[Work[T]], limit: int, done: Callable[[int], None], give_up: Work[None]
    ) -> list[T]:
        """Run pieces of work concurrently and return their results, in order.

        Args:
            works: the pieces of work.
            limit: how many are in progress at a time, at most.
            done: called in the calling thread after each one, with the number done.
            give_up: ends all of them; called if one fails or the wait is interrupted.
        """
        # Even for a single one: Ctrl-C interrupts the calling thread anywhere, and a call starting there would be lost.
        with ThreadPoolExecutor(min(len(works), limit), "lfdm-client") as pool:
            try:
                futures = [pool.submit(lambda work: finish(work()), work) for work in works]
                for count, future in enumerate(as_completed(futures), 1):
                    future.result()
                    done(count)
            except BaseException:
                await give_up()
                raise
        return [future.result() for future in futures]


class Suspending:
    """Waits in the running event loop; the methods correspond to those of `Blocking`."""

    event = asyncio.Event

    def channels(self) -> Any:
        """Return the module that opens channels."""
        from grpc import aio

        return aio

    async def answer(self, call: Any) -> Any:
        """Return the response of a unary call."""
        return await _shielded(call)

    async def message(self, call: Any) -> Any:
        """Return the next response of a streaming call."""
        response = await _shielded(call.read())
        return None if response is self.channels().EOF else response

    async def until(self, event: Any, seconds: float) -> bool:
        """Wait for an event for at most `seconds`."""
        try:
            return bool(await asyncio.wait_for(event.wait(), seconds))
        except asyncio.TimeoutError:
            return False

    async def aside(self, function: Callable[[], T]) -> T:
        """Return the result of a function that runs in a thread."""
        return await asyncio.to_thread(function)

    async def together(
        self, works: Sequence[Work[T]], limit: int, done: Callable[[int], None], give_up: Work[None]
    ) -> list[T]:
        """Run pieces of work concurrently and return their results, in order."""
        slots = asyncio.Semaphore(limit)

        async def one(work: Work[T]) -> T:
            async with slots:
                return await work()

        tasks = [asyncio.ensure_future(one(work)) for work in works]
        try:
            for count, task in enumerate(asyncio.as_completed(tasks), 1):
                await task
                done(count)
        except BaseException:
            await asyncio.shield(give_up())
            await asyncio.wait(tasks)
            raise
        return [task.result() for task in tasks]


Waiting: TypeAlias = Blocking | Suspending


async def _shielded(call: Awaitable[T]) -> T:
    """Await a call; cancelling the task does not cancel the call, because the server must be notified first."""

    async def wait() -> T:
        return await call

    answer = asyncio.ensure_future(wait())
    answer.add_done_callback(_forget)
    try:
        return await asyncio.shield(answer)
    except asyncio.CancelledError:
        if answer.cancelled():
            raise import_grpc().FutureCancelledError from None
        raise


def _forget(answer: asyncio.Future[Any]) -> None:
    """Retrieve the call's exception, because this response may never be awaited."""
    if not answer.cancelled():
        answer.exception()
