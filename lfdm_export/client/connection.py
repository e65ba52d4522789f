"""One gRPC channel, whose calls are retried where that is safe, and can be cancelled."""

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
#: Seconds that the server's cancellation of a request may take.
_TELLING = 2.0
#: Seconds between attempts to cancel.
_AGAIN = 0.05


@dataclass(eq=False)
class Flight:
    """A request in progress: its attempts, and its cancellation. Thread-safe if its connection is.

    Attributes:
        request_id: ID of the request; "" for none.
        attempts: counter of attempts and of the time left.
        notify: whether a cancellation must also be sent to the server: gRPC's does not reach into an ensemble.
        cancelled: event that is set when no more attempts may start.
        why: reason for the cancellation.
        over: whether the last attempt must end too.
        begun: whether an attempt has started.
        call: gRPC call of the last attempt.
        lock: held while `cancelled` and `begun` must not change.
    """

    request_id: str
    attempts: Attempts
    notify: bool
    cancelled: threading.Event | asyncio.Event
    why: str = ""
    over: bool = False
    begun: bool = False
    call: Any = None
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pending(self) -> bool:
        """Whether the server may have received the request, or may receive it soon."""
        return self.begun and (self.call is None or not self.call.done())

    def start(self, begin: Callable[[float], Any]) -> Any:
        """Start the next attempt and return its call.

        Args:
            begin: starts a call, given its timeout in seconds.

        Raises:
            RequestCancelledError: the request was cancelled.
        """
        with self.lock:
            if self.cancelled.is_set():
                raise self.cancellation()
            self.begun = True
        self.call = begin(self.attempts.begin())
        if self.over:  # set by another thread meanwhile
            self.call.cancel()
        return self.call

    def stop(self, why: str = "") -> None:
        """Start no more attempts."""
        with self.lock:
            self.why = self.why or why or f"the request {self.request_id} was cancelled here"
            self.cancelled.set()

    def give_up(self) -> None:
        """Cancel the request in this client."""
        self.stop()
        self.over = True
        if self.call is not None:
            self.call.cancel()

    def cancellation(self) -> RequestCancelledError:
        """Return the error that reports the cancellation."""
        return RequestCancelledError(self.why)


class Connection:
    """A channel and its requests in progress. For threads or for asyncio, as its `waiting` is."""

    def __init__(self, address: str, settings: Settings, waiting: Waiting) -> None:
        """Validate the address and the settings; the first call opens the channel.

        Raises:
            InputError: the address or a file named in the settings is invalid.
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
        """Cancel the requests in progress, on the server too, and close the channel."""
        with self._lock:
            self._closed, flights = True, list(self._flights)
        await self.abandon(flights, "the client was closed meanwhile")
        with self._lock:
            channel, self._channel, self._stub = self._channel, None, None
        closing = None if channel is None else channel.close()
        if closing is not None:  # only asyncio's channels return an awaitable
            await closing

    def flight(self, request_id: str, seconds: float, *, notify: bool = False) -> Flight:
        """Register a new request with a timeout of `seconds` from now.

        Raises:
            InputError: `seconds` leaves no time.
        """
        return Flight(request_id, Attempts(self.settings.retry, seconds), notify, self.waiting.event())

    @contextlib.contextmanager
    def under_way(self, *flights: Flight) -> Iterator[None]:
        """Let `cancel` and `close` find these requests within the context.

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
        """Start a call with a timeout of `seconds`.

        Args:
            method: name of the stub's method.
            request: a message, or an iterator over messages for a streaming method.
            seconds: time until the deadline.

        Raises:
            InputError: the channel is closed.
        """
        with self._lock:
            if self._stub is None or self._process != os.getpid():  # gRPC channels do not survive a fork
                self._stub, self._process = self._open(), os.getpid()
            call = getattr(self._stub, method)
        # Blocking unary calls need `future` to start without waiting; all other calls start when called.
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
        """Return the response of a unary call, retried where that is safe.

        Args:
            method: name of the stub's method.
            make_request: builds the message, given the call's timeout in seconds.
            flight: the request in progress.

        Raises:
            LfdmExportError: the call failed; the class depends on its status.
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
        """Classify the gRPC `error` that a call raised.

        Raises:
            RequestCancelledError: the request was cancelled.
        """
        if flight.cancelled.is_set():
            raise flight.cancellation() from None
        return self.calls.fault(error, request_id=flight.request_id, answered=answered)

    async def pause_or_raise(self, flight: Flight, fault: Fault) -> None:
        """Wait before the next attempt, or raise the error of the last one.

        Raises:
            LfdmExportError: no attempt is left.
        """
        pause = flight.attempts.pause_after(fault)
        logger.info("%s; attempt %d in %.1f s", fault.error, flight.attempts.made + 1, pause)
        if await self.waiting.until(flight.cancelled, pause):
            raise flight.cancellation()

    async def cancel(self, request_id: str, seconds: float) -> bool:
        """Cancel a request, on the server and in this client.

        The cancellation is repeated while the server does not know a request in progress: the request may not have
        reached the sampler yet.

        Args:
            request_id: ID of the request.
            seconds: timeout of the cancellation.

        Returns:
            Whether the request was queued or running on the server.

        Raises:
            ServerError: the cancellation does not reach the server.
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
        """Cancel requests; ignore cancellations that do not reach the server in time."""
        for flight in flights:
            flight.stop(why)
        end = time.monotonic() + _TELLING
        for flight in flights:
            if flight.notify and flight.pending:
                try:
                    await self.cancel(flight.request_id, end - time.monotonic())
                except (LfdmExportError, ValueError) as error:  # ValueError: the channel is closed
                    logger.debug("%s was not notified of the end of %s: %s", self.address, flight.request_id, error)
            flight.give_up()


def _closed() -> InputError:
    return InputError("the client is closed; open a new one")
