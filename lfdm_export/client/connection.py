"""One gRPC channel: calls that are begun anew where that is safe, and that can be given up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfdm_export.client.calls import Calls
from lfdm_export.client.faults import Attempts, Fault
from lfdm_export.client.settings import Settings, import_grpc, import_protocol
from lfdm_export.client.waiting import Waiting
from lfdm_export.errors import InputError, LfdmExportError
from lfdm_export.protocol.contract import RequestCancelledError

logger = logging.getLogger(__name__)
#: Seconds that telling the server of a request that is given up may take.
_TELLING = 2.0
#: Seconds until it is told again.
_AGAIN = 0.05


@dataclass(eq=False)
class Flight:
    """A request that is under way: its attempts, and what gives it up. For any thread, if its connection is.

    Attributes:
        request_id: of the request; "" for none.
        attempts: those made, and the time left.
        told: whether the server must be told that it is given up: cancellation does not reach into an ensemble.
        cancelled: set once there are to be no more attempts.
        why: it was cancelled.
        over: whether the last attempt is to end too.
        begun: whether an attempt was begun.
        call: gRPC's, of the last attempt.
        lock: held where `cancelled` and `begun` must not change.
    """

    request_id: str
    attempts: Attempts
    told: bool
    cancelled: threading.Event | asyncio.Event
    why: str = ""
    over: bool = False
    begun: bool = False
    call: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pending(self) -> bool:
        """Whether the server may have it, now or soon."""
        return self.begun and (self.call is None or not self.call.done())

    def start(self, begin: Callable[[float], Any]) -> Any:
        """The next attempt's call.

        Args:
            begin: begins it, given the seconds that it has.

        Raises:
            RequestCancelledError: there is to be none.
        """
        with self.lock:
            if self.cancelled.is_set():
                raise self.cancellation()
            self.begun = True
        self.call = begin(self.attempts.begin())
        if self.over:  # since a moment ago
            self.call.cancel()
        return self.call

    def stop(self, why: str = "") -> None:
        """Begin no more attempts."""
        with self.lock:
            self.why = self.why or why or f"the request {self.request_id} was cancelled here"
            self.cancelled.set()

    def give_up(self) -> None:
        """End it, here."""
        self.stop()
        self.over = True
        if self.call is not None:
            self.call.cancel()

    def cancellation(self) -> RequestCancelledError:
        """The error that says so."""
        return RequestCancelledError(self.why)


class Connection:
    """A channel, and the requests that are under way on it. For what its `waiting` is for."""

    def __init__(self, address: str, settings: Settings, waiting: Waiting) -> None:
        """Check everything; the channel is made by the first call.

        Raises:
            InputError: the address or a file of the settings cannot be used.
            MissingDependencyError: gRPC or Triton's client is not installed.
        """
        self.address, self.settings, self.waiting = settings.check_address(address), settings, waiting
        self.calls = Calls(self.address, settings)
        self.grpc, (_, self._stubs) = import_grpc(), import_protocol()
        self._credentials = None if settings.tls is None else settings.tls.credentials()
        self._channel: Any = None
        self._stub: Any = None
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._flights: set[Flight] = set()
        self._closed = False

    async def close(self) -> None:
        """Give up what is under way, on the server too, and close the channel."""
        with self._lock:
            self._closed, flights = True, list(self._flights)
        await self.abandon(flights, "the client was closed meanwhile")
        with self._lock:
            channel, self._channel, self._stub = self._channel, None, None
        closing = None if channel is None else channel.close()
        if closing is not None:  # asyncio's
            await closing

    def flight(self, request_id: str, seconds: float, *, told: bool = False) -> Flight:
        """A new request, which has so many seconds from now.

        Raises:
            InputError: it has none.
        """
        return Flight(request_id, Attempts(self.settings.retry, seconds), told, self.waiting.event())

    @contextlib.contextmanager
    def under_way(self, *flights: Flight) -> Iterator[None]:
        """Known to `cancel` and `close` for as long.

        Raises:
            InputError: the channel is closed.
        """
        with self._lock:
            if self._closed:
                raise _closed()
            self._flights.update(flights)
        try:
            yield
        finally:
            with self._lock:
                self._flights.difference_update(flights)

    def begin(self, method: str, request: Any, seconds: float) -> Any:
        """Begin a call, which has so many seconds.

        Args:
            method: of the stub.
            request: a message, or an iterator over messages for a streaming method.
            seconds: until its deadline.

        Raises:
            InputError: the channel is closed.
        """
        with self._lock:
            if self._stub is None or self._process != os.getpid():  # gRPC's channels do not come through a fork
                self._stub, self._process = self._open(), os.getpid()
            call = getattr(self._stub, method)
        # What gRPC's unary calls of threads begin at once by; all others just begin.
        return getattr(call, "future", call)(
            request,
            timeout=seconds,
            metadata=self.settings.metadata(),
            compression=self.settings.grpc_compression(),
        )

    def _open(self) -> Any:
        if self._closed:
            raise _closed()
        channels, options = self.waiting.channels(), self.settings.channel_options(self.address)
        if self._credentials is None:
            self._channel = channels.insecure_channel(self.address, options)
        else:
            self._channel = channels.secure_channel(self.address, self._credentials, options)
        return self._stubs.GRPCInferenceServiceStub(self._channel)

    async def unary(self, method: str, make_request: Callable[[float], Any], flight: Flight) -> Any:
        """The response of a unary call, begun anew where that is safe.

        Args:
            method: of the stub.
            make_request: given the seconds that the call has.
            flight: of the request.

        Raises:
            LfdmExportError: what its end means.
        """
        while True:
            try:
                call = flight.start(lambda seconds: self.begin(method, make_request(seconds), seconds))
                return await self.waiting.answer(call)
            except (self.grpc.RpcError, self.grpc.FutureCancelledError) as error:
                fault = self.fault(flight, error)
            except BaseException:  # Ctrl-C, or a cancelled task
                await self.abandon([flight])
                raise
            await self.pause_or_raise(flight, fault)

    def fault(self, flight: Flight, error: Exception, *, answered: bool = False) -> Fault:
        """How a call ended that raised gRPC's `error`.

        Raises:
            RequestCancelledError: it was given up.
        """
        if flight.cancelled.is_set():
            raise flight.cancellation() from None
        return self.calls.fault(error, request_id=flight.request_id, answered=answered)

    async def pause_or_raise(self, flight: Flight, fault: Fault) -> None:
        """Wait for the next attempt, or raise what the end of the last one means.

        Raises:
            LfdmExportError: there is to be no other attempt.
        """
        pause = flight.attempts.pause_after(fault)
        logger.info("%s; attempt %d in %.1f s", fault.error, flight.attempts.made + 1, pause)
        if await self.waiting.until(flight.cancelled, pause):
            raise flight.cancellation()

    async def cancel(self, request_id: str, seconds: float) -> bool:
        """Give up a request, on the server and here.

        The server is told again and again while it does not know of a request that is under way, for it may not have
        come to the sampler yet.

        Args:
            request_id: of the request.
            seconds: that this may take.

        Returns:
            Whether the server had it waiting or running.

        Raises:
            ServerError: the server cannot be told.
        """
        with self._lock:
            flights = [flight for flight in self._flights if flight.request_id == request_id]
        for flight in flights:
            flight.stop()
        end = time.monotonic() + seconds
        try:
            while True:
                request = self.calls.cancel_request(request_id)
                call = self.begin("ModelInfer", request, max(end - time.monotonic(), 1e-3))
                try:
                    known = self.calls.cancel_answer(await self.waiting.answer(call))
                except self.grpc.RpcError as error:
                    raise self.calls.fault(error, request_id=request_id).error from None
                if known or not any(flight.pending for flight in flights) or time.monotonic() + _AGAIN > end:
                    return known
                await self.waiting.until(self.waiting.event(), _AGAIN)
        finally:
            for flight in flights:
                flight.give_up()

    async def abandon(self, flights: Sequence[Flight], why: str = "") -> None:
        """Give requests up; whether the server can be told of all of them in time is no matter."""
        for flight in flights:
            flight.stop(why)
        end = time.monotonic() + _TELLING
        for flight in flights:
            if flight.told and flight.pending:
                try:
                    await self.cancel(flight.request_id, end - time.monotonic())
                except (LfdmExportError, ValueError) as error:  # ValueError: the channel is closed
                    logger.debug("%s could not be told to cancel %s: %s", self.address, flight.request_id, error)
            flight.give_up()


def _closed() -> InputError:
    return InputError("the client is closed; open a new one")
