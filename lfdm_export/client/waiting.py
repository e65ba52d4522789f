"""How a client waits: by blocking its thread, or for asyncio. All else here is written once, for both.

Clients and streams are coroutines that wait by these methods alone. Those of `Blocking` never suspend, so that `finish`
runs such a coroutine from beginning to end where it is called: without an event loop, and without a thread of its own.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeAlias, TypeVar

from lfdm_export.client.settings import import_grpc

T = TypeVar("T")
#: Begins a piece of work that is awaited.
Work = Callable[[], Coroutine[Any, Any, T]]


def finish(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that waits by `Blocking`."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError(f"{work} waits for an event loop")


class Blocking:
    """Waits in the calling thread, which may be any."""

    event = threading.Event

    def channels(self) -> Any:
        """The module that opens channels."""
        return import_grpc()

    async def answer(self, call: Any) -> Any:
        """The response of a unary call, which goes on if the wait is interrupted.

        Raises:
            grpc.RpcError: it failed.
            grpc.FutureCancelledError: it was cancelled here.
        """
        return call.result()

    async def message(self, call: Any) -> Any:
        """The next response of a streaming call, None after the last one. Raises as `answer` does."""
        return next(call, None)

    async def until(self, event: Any, seconds: float) -> bool:
        """Wait for an event, so long at most; returns whether it came."""
        return bool(event.wait(seconds))

    async def aside(self, function: Callable[[], T]) -> T:
        """The result of a function that computes for some 100 ms."""
        return function()

    async def together(
        self, works: Sequence[Work[T]], limit: int, done: Callable[[int], None], give_up: Work[None]
    ) -> list[T]:
        """The results of works side by side, in order.

        Args:
            works: what is done.
            limit: so many are under way at a time.
            done: called with how many are done, after each, where this was called.
            give_up: makes all come to an end; used if one fails or the wait is interrupted.
        """
        # Even a single one: Ctrl-C interrupts the calling thread anywhere, a call that begins there would be lost.
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
    """Waits in the running event loop, as `Blocking` does in a thread."""

    event = asyncio.Event

    def channels(self) -> Any:
        """See `Blocking`, as for all methods."""
        from grpc import aio

        return aio

    async def answer(self, call: Any) -> Any:
        """The response of a unary call."""
        return await _shielded(call)

    async def message(self, call: Any) -> Any:
        """The next response of a streaming call."""
        response = await _shielded(call.read())
        return None if response is self.channels().EOF else response

    async def until(self, event: Any, seconds: float) -> bool:
        """Wait for an event."""
        try:
            return bool(await asyncio.wait_for(event.wait(), seconds))
        except asyncio.TimeoutError:
            return False

    async def aside(self, function: Callable[[], T]) -> T:
        """The result of a function."""
        return await asyncio.to_thread(function)

    async def together(
        self, works: Sequence[Work[T]], limit: int, done: Callable[[int], None], give_up: Work[None]
    ) -> list[T]:
        """The results of works side by side."""
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
    """What a call gives; it is not cancelled with the task that waits for it, for the server is told first."""

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
    """Perhaps nobody asks for this answer any more, or for why there is none."""
    if not answer.cancelled():
        answer.exception()
