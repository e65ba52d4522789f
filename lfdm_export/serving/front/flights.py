"""Requests in flight: how many are allowed, how each ends, and how to wait for all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from lfdm_export.protocol.contract import DRAINING_MESSAGE, QUEUE_FULL_MESSAGE
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.refusal import RefusedError, unavailable


@dataclass(eq=False)
class Flight:
    """A forwarded request.

    Attributes:
        model: name of the model that runs it.
        request_id: id to cancel it by.
        give_up: cancels the call that waits for it.
        unnamed: whether its client gave no id.
        fault: why the front gave it up; None if it did not.
    """

    model: str
    request_id: str
    give_up: Callable[[], object]
    unnamed: bool = False
    fault: RefusedError | None = None

    async def result(self, call: Awaitable[Any]) -> Any:
        """The result of the call.

        Raises:
            RefusedError: the front gave the request up.
        """
        try:
            return await call
        except asyncio.CancelledError:
            if self.fault is not None:
                raise self.fault from None
            raise


@dataclass(eq=False)
class Flights:
    """All flights of one front. Use it only on the front's event loop."""

    limits: FrontLimits
    draining: bool = False
    #: Total bytes of all requests so far.
    ever_held: int = 0
    _flying: set[Flight] = field(default_factory=set)
    _held: int = 0
    _landed: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Count the memory of one request: yields a function that adds bytes; leaving subtracts them again.

        Raises:
            RefusedError: raised by the yielded function if all requests together hold too many bytes.
        """
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            if self._held + count > self.limits.held_bytes:
                raise unavailable(f"{QUEUE_FULL_MESSAGE}: requests hold {self._held:,} bytes; send it again later")
            self._held, mine = self._held + count, mine + count
            self.ever_held += max(0, count)

        try:
            yield hold
        finally:
            self._held -= mine

    def begin(self, model: str, request_id: str, give_up: Callable[[], object], *, unnamed: bool) -> Flight:
        """Register a request before it is forwarded.

        Raises:
            RefusedError: the maximum number is in flight, or the server is stopping.
        """
        if self.draining:
            raise unavailable(f"{DRAINING_MESSAGE}: it takes no more requests; send it again to another one, or later")
        if len(self._flying) >= self.limits.in_flight:
            raise unavailable(f"{QUEUE_FULL_MESSAGE}: {len(self._flying)} requests are in flight; send it again later")
        flight = Flight(model, request_id, give_up, unnamed)
        self._flying.add(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """Remove a request that is answered or abandoned."""
        self._flying.discard(flight)
        if not self._flying:
            self._landed.set()

    def knows(self, request_id: str) -> bool:
        """Whether a request with that id is in flight."""
        return any(flight.request_id == request_id for flight in self._flying)

    def lose(self, sentence: str, model: str | None = None) -> int:
        """Give up all requests, or those of one model: no answer will come.

        Args:
            sentence: the error message for their clients.
            model: name of the model; None for all.

        Returns:
            How many requests were given up.
        """
        lost = [flight for flight in self._flying if model in (None, flight.model)]
        for flight in lost:
            flight.fault = unavailable(sentence)
            flight.give_up()
        return len(lost)

    async def drain(self, seconds: float) -> bool:
        """Accept no more requests, and wait for those in flight.

        Returns:
            Whether all have ended.
        """
        self.draining = True
        self._landed.clear()
        if self._flying:
            try:
                await asyncio.wait_for(self._landed.wait(), seconds)
            except asyncio.TimeoutError:
                return False
        return True
