"""One gRPC channel for threads: calls that are begun anew where that is safe, and that can be given up."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from lfdm_export.client.calls import Calls
from lfdm_export.client.faults import Attempts, Fault
from lfdm_export.client.settings import Settings, import_grpc, import_protocol
from lfdm_export.errors import InputError, LfdmExportError
from lfdm_export.protocol.contract import RequestCancelledError

logger = logging.getLogger(__name__)
#: Seconds that telling the server of a request that is given up may take.
_TELLING = 2.0
#: Seconds until it is told again.
_AGAIN = 0.05


@dataclass(eq=False)
class Flight:
    """A request that is under way: its attempts, and what gives it up.

    Attributes:
        request_id: of the request; "" for one that the server need not be told of.
        attempts: those made, and the time left.
        cancelled: set once there are to be no more attempts.
        over: whether the last one is to end too.
        begun: whether an attempt was begun.
        call: gRPC's, of the last attempt.
        lock: held where `cancelled` and `begun` must not change.
    """

    request_id: str
    attempts: Attempts
    cancelled: threading.Event = field(default_factory=threading.Event)
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

    def stop(self) -> None:
        """Begin no more attempts."""
        with self.lock:
            self.cancelled.set()

    def give_up(self) -> None:
        """End it, here."""
        self.stop()
        self.over = True
        if self.call is not None:
            self.call.cancel()

    def cancellation(self) -> RequestCancelledError:
        """The error that says so."""
        return RequestCancelledError(f"the request {self.request_id or 'of the stream'} was cancelled here")


class Connection:
    """A channel, and the requests that are under way on it. For any number of threads."""

    def __init__(self, address: str, settings: Settings) -> None:
        """Open lazily: nothing is sent yet.

        Raises:
            InputError: the address or a file of the settings cannot be used.
            MissingDependencyError: gRPC or Triton's client is not installed.
        """
        self.address, self.settings = settings.check_address(address), settings
        self.calls = Calls(self.address, settings)
        self.grpc, (_, stubs) = import_grpc(), import_protocol()
        options = settings.channel_options(self.address)
        if settings.tls is None:
            self._channel = self.grpc.insecure_channel(self.address, options)
        else:
            credentials = settings.tls.credentials()
            self._channel = self.grpc.secure_channel(self.address, credentials, options)
        self.stub = stubs.GRPCInferenceServiceStub(self._channel)
        self._lock = threading.Lock()
        self._flights: set[Flight] = set()
        self._closed = False

    def close(self) -> None:
        """Give up what is under way, on the server too, and close the channel."""
        with self._lock:
            self._closed, flights = True, list(self._flights)
        self.abandon(flights)
        self._channel.close()

    def flight(self, request_id: str, seconds: float) -> Flight:
        """A new request, which has so many seconds from now.

        Raises:
            InputError: it has none.
        """
        return Flight(request_id, Attempts(self.settings.retry, seconds))

    @contextlib.contextmanager
    def under_way(self, flights: Sequence[Flight]) -> Iterator[None]:
        """Known to `give_up` and `close` for as long.

        Raises:
            InputError: the channel is closed.
        """
        with self._lock:
            if self._closed:
                raise InputError("the client is closed; open a new one")
            self._flights.update(flights)
        try:
            yield
        finally:
            with self._lock:
                self._flights.difference_update(flights)

    def unary(self, method: str, make_request: Callable[[float], Any], flight: Flight) -> Any:
        """The response of a unary call, begun anew where that is safe.

        Args:
            method: of the stub.
            make_request: given the seconds that the call has.
            flight: of the request.

        Raises:
            LfdmExportError: what its end means.
        """

        def begin(seconds: float) -> Any:
            return getattr(self.stub, method).future(
                make_request(seconds),
                timeout=seconds,
                metadata=self.settings.metadata(),
                compression=self.settings.grpc_compression(),
            )

        while True:
            try:
                return flight.start(begin).result()
            except (self.grpc.RpcError, self.grpc.FutureCancelledError) as error:
                fault = self.fault(flight, error)
            self.pause_or_raise(flight, fault)

    def fault(self, flight: Flight, error: Exception, *, answered: bool = False) -> Fault:
        """How a call ended that raised gRPC's `error`.

        Raises:
            RequestCancelledError: it was given up.
        """
        if flight.cancelled.is_set() or isinstance(error, self.grpc.FutureCancelledError):
            raise flight.cancellation() from None
        return self.calls.fault(error, request_id=flight.request_id, answered=answered)

    def pause_or_raise(self, flight: Flight, fault: Fault) -> None:
        """Wait for the next attempt, or raise what the end of the last one means.

        Raises:
            LfdmExportError: there is to be no other attempt.
        """
        pause = flight.attempts.pause_after(fault)
        logger.info("%s; attempt %d in %.1f s", fault.error, flight.attempts.made + 1, pause)
        if flight.cancelled.wait(pause):
            raise flight.cancellation()

    def cancel(self, request_id: str, seconds: float) -> bool:
        """Give up a request, on the server and here.

        Cancellation does not reach into a running ensemble, so the server is told; again and again while it does not
        know of a request that is under way, for it may not have come to the sampler yet.

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
                try:
                    response = self.stub.ModelInfer(
                        self.calls.cancel_request(request_id),
                        timeout=max(end - time.monotonic(), 1e-3),
                        metadata=self.settings.metadata(),
                    )
                except self.grpc.RpcError as error:
                    raise self.calls.fault(error, request_id=request_id).error from None
                known = self.calls.cancel_answer(response)
                if known or not any(flight.pending for flight in flights) or time.monotonic() + _AGAIN > end:
                    return known
                time.sleep(_AGAIN)
        finally:
            for flight in flights:
                flight.give_up()

    def abandon(self, flights: Sequence[Flight]) -> None:
        """Give requests up; whether the server can be told of all of them in time is no matter."""
        for flight in flights:
            flight.stop()
        end = time.monotonic() + _TELLING
        for flight in flights:
            if flight.request_id and flight.pending:
                try:
                    self.cancel(flight.request_id, end - time.monotonic())
                except (LfdmExportError, ValueError) as error:  # ValueError: the channel is closed
                    logger.debug("%s could not be told to cancel %s: %s", self.address, flight.request_id, error)
            flight.give_up()
