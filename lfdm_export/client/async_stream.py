"""A clip in the making, for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from types import TracebackType
from typing import Any

from lfdm_export.client.async_connection import AsyncConnection
from lfdm_export.client.events import Assembly, Event
from lfdm_export.client.jobs import Job, Plan
from lfdm_export.pictures.clip import Clip
from lfdm_export.protocol.contract import RequestCancelledError
from lfdm_export.protocol.model_facts import ModelFacts


class OpeningStream:
    """What `lfdm_export.client.AsyncClient.stream` gives: for `async with`, or to be awaited."""

    def __init__(self, begin: Callable[[], Coroutine[Any, Any, AsyncStream]]) -> None:
        """Nothing begins before it is entered or awaited."""
        self._begin = begin
        self._stream: AsyncStream | None = None

    def __repr__(self) -> str:
        return "<OpeningStream: write `async with client.stream(...) as stream`>"

    def __await__(self) -> Generator[Any, None, AsyncStream]:
        """The stream, whose caller closes it."""
        return self._begin().__await__()

    async def __aenter__(self) -> AsyncStream:
        """The stream."""
        self._stream = await self._begin()
        return self._stream

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the request up, unless it is done."""
        if self._stream is not None:
            await self._stream.close()


class AsyncStream:
    """One clip in the making: iterate over its events.

    Examples:
        >>> async with client.stream("face.jpg", label="happiness", progress_every=1) as stream:
        ...     async for event in stream:
        ...         print(event)

    Attributes:
        request_id: of the request.
        seed: of its noise.
    """

    def __init__(self, connection: AsyncConnection, plan: Plan, job: Job, facts: ModelFacts, seconds: float) -> None:
        """Use `lfdm_export.client.AsyncClient.stream`."""
        self.request_id, (self.seed,) = job.request_id, plan.seeds
        self._connection, self._plan, self._job = connection, plan, job
        self._assembly = Assembly(plan, job, facts)
        self._attempts = connection.attempts(seconds)
        self._call: Any = None
        self._closed = False
        self._events = self._run()

    def __repr__(self) -> str:
        return f"<AsyncStream {self.request_id}: seed {self.seed}, {self._assembly.state()}>"

    async def __aenter__(self) -> AsyncStream:
        """The stream itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the request up, unless it is done."""
        await self.close()

    def __aiter__(self) -> AsyncIterator[Event]:
        """The events, up to and with `Done`."""
        return self._events

    async def close(self) -> None:
        """Give the request up, unless it is done."""
        self._closed = True
        if self._call is not None:
            self._call.cancel()

    def clip(self) -> Clip:
        """The clip, once `Done` has come; without warped images and latent.

        Raises:
            ServerError: it has not come.
        """
        return self._assembly.clip()

    async def _run(self) -> AsyncIterator[Event]:
        connection, answered = self._connection, False
        while True:
            self._check_open()
            seconds = self._attempts.begin()
            self._call = connection.stub.ModelStreamInfer(
                iter((connection.calls.stream_request(self._job, self._plan, seconds),)),
                timeout=seconds,
                metadata=connection.settings.metadata(),
                compression=connection.settings.grpc_compression(),
            )
            try:
                async for response in self._call:
                    if response.error_message:
                        fault = connection.calls.stream_fault(response.error_message, self._job, answered=answered)
                        break
                    tensors = connection.calls.stream_answer(response)
                    answered = True
                    yield self._assembly.take(tensors)
                else:
                    self._check_open()
                    self._assembly.clip()  # raises if the end came too early
                    return
            except connection.grpc.RpcError as error:
                self._check_open()
                fault = connection.calls.fault(error, request_id=self.request_id, answered=answered)
            except asyncio.CancelledError:  # of the call by `close`, or of the caller's own task
                self._check_open()
                raise
            finally:
                self._call.cancel()
            await connection.pause_or_raise(self._attempts, fault)

    def _check_open(self) -> None:
        if self._closed:
            raise RequestCancelledError(f"the request {self.request_id} was cancelled here") from None
