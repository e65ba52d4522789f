"""Streams: the events of a clip during its generation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Iterator
from types import TracebackType
from typing import Any

from lfdm_export.client.connection import Connection
from lfdm_export.client.events import Assembly, Event
from lfdm_export.client.jobs import Job, Plan
from lfdm_export.client.waiting import finish
from lfdm_export.pictures.clip import Clip
from lfdm_export.protocol.model_facts import ModelFacts


class AsyncStream:
    """A clip that is being generated: iterate over its events.

    Example:
        >>> async with client.stream("face.jpg", label="happiness", progress_every=1) as stream:
        ...     async for event in stream:
        ...         print(event)

    Attributes:
        request_id: ID of the request.
        seed: seed of the noise.
        events: iterator over the events.
    """

    def __init__(self, connection: Connection, plan: Plan, job: Job, facts: ModelFacts, seconds: float) -> None:
        """Created by `lfdm_export.client.AsyncClient.stream`."""
        self.request_id, (self.seed,) = job.request_id, plan.seeds
        self._connection, self._plan, self._job = connection, plan, job
        self._assembly = Assembly(plan, job, facts)
        self._flight = connection.flight(job.request_id, seconds)
        self.events = self._run()

    def __repr__(self) -> str:
        return f"<AsyncStream {self.request_id}: seed {self.seed}, {self._assembly.state()}>"

    async def __aenter__(self) -> AsyncStream:
        """Return the stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel the request, unless it is done."""
        await self.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        """Iterate over the events, up to and including `Done`."""
        return self.events

    async def close(self) -> None:
        """Cancel the request, unless it is done."""
        self._flight.give_up()

    def clip(self) -> Clip:
        """Return the clip after `Done`, without warped images and latent.

        Raises:
            ServerError: `Done` has not arrived.
        """
        return self._assembly.clip()

    async def _run(self) -> AsyncGenerator[Event, None]:
        connection, flight, answered = self._connection, self._flight, False
        calls, waiting = connection.calls, connection.waiting
        with connection.under_way(flight):
            while True:
                call = flight.start(self._begin)
                try:
                    while (response := await waiting.message(call)) is not None:
                        if response.error_message:
                            fault = calls.stream_fault(response.error_message, self._job, answered=answered)
                            break
                        tensors = calls.stream_answer(response)
                        answered = True
                        yield self._assembly.take(tensors)
                    else:
                        self._assembly.clip()  # raises if the stream ended too early
                        return
                except (connection.grpc.RpcError, connection.grpc.FutureCancelledError) as error:
                    fault = connection.fault(flight, error, answered=answered)
                finally:
                    call.cancel()
                await connection.pause_or_raise(flight, fault)

    def _begin(self, seconds: float) -> Any:
        request = self._connection.calls.stream_request(self._job, self._plan, seconds)
        return self._connection.begin("ModelStreamInfer", iter((request,)), seconds)


class OpeningStream:
    """Returned by `lfdm_export.client.AsyncClient.stream`: enter it with `async with`, or await it."""

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, AsyncStream]]) -> None:
        """Store `begin`, which runs on entering or awaiting."""
        self.begin = begin
        self._stream: AsyncStream | None = None

    def __repr__(self) -> str:
        return "<OpeningStream: write `async with client.stream(...) as stream`>"

    def __await__(self) -> Generator[Any, None, AsyncStream]:
        """Return the stream; the caller closes it."""
        return self.begin().__await__()

    async def __aenter__(self) -> AsyncStream:
        """Return the stream."""
        self._stream = await self.begin()
        return self._stream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel the request, unless it is done."""
        if self._stream is not None:
            await self._stream.close()


class Stream:
    """A clip that is being generated: iterate over its events.

    Example:
        >>> with client.stream("face.jpg", label="happiness", progress_every=1) as stream:
        ...     for event in stream:
        ...         print(event)
        ...     stream.clip().save("happiness.gif")

    Attributes:
        request_id: ID of the request.
        seed: seed of the noise.
    """

    def __init__(self, stream: AsyncStream) -> None:
        """Created by `lfdm_export.client.Client.stream`."""
        self.request_id, self.seed = stream.request_id, stream.seed
        self._stream = stream
        self._events = self._run()

    def __repr__(self) -> str:
        return repr(self._stream).replace("AsyncStream", "Stream", 1)

    def __enter__(self) -> Stream:
        """Return the stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Cancel the request, unless it is done."""
        self.close()

    def __iter__(self) -> Iterator[Event]:
        """Iterate over the events, up to and including `Done`."""
        return self._events

    def close(self) -> None:
        """Cancel the request, unless it is done; thread-safe."""
        finish(self._stream.close())

    def clip(self) -> Clip:
        """Return the clip after `Done`, without warped images and latent.

        Raises:
            ServerError: `Done` has not arrived.
        """
        return self._stream.clip()

    def _run(self) -> Iterator[Event]:
        events = self._stream.events
        try:
            while (event := finish(_next(events))) is not None:
                yield event
        finally:
            finish(_end(events))


async def _next(events: AsyncGenerator[Event, None]) -> Event | None:
    return await anext(events, None)


async def _end(events: AsyncGenerator[Event, None]) -> None:
    await events.aclose()
