"""Requests that are on their way: how many there may be, what ends them, and who waits for them."""

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
    """A request that was handed on.

    Attributes:
        model: that has it.
        request_id: by which it can be cancelled.
        give_up: ends the call that waits for it.
        unnamed: whether its client gave no id.
        fault: why it was given up from here; None as long as it was not.
    """

    model: str
    request_id: str
    give_up: Callable[[], object]
    unnamed: bool = False
    fault: RefusedError | None = None

    async def result(self, call: Awaitable[Any]) -> Any:
        """What the call gives, or why it was given up from here.

        Raises:
            RefusedError: it was.
        """
        try:
            return await call
        except asyncio.CancelledError:
            if self.fault is not None:
                raise self.fault from None
            raise


@dataclass(eq=False)
class Flights:
    """Those of one front; for its event loop alone."""

    limits: FrontLimits
    draining: bool = False
    #: Bytes of all requests up to now.
    ever_held: int = 0
    _flying: set[Flight] = field(default_factory=set)
    _held: int = 0
    _landed: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def holding(self) -> Iterator[Callable[[int], None]]:
        """Memory of one request: gives what counts more bytes, which are let go at the end.

        Raises:
            RefusedError: by what it gives, if requests hold as many as they may.
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
        """Note a request that is about to be handed on.

        Raises:
            RefusedError: there are as many as there may be, or the server is stopping.
        """
        if self.draining:
            raise unavailable(f"{DRAINING_MESSAGE}: it takes no more requests; send it again to another one, or later")
        if len(self._flying) >= self.limits.in_flight:
            raise unavailable(f"{QUEUE_FULL_MESSAGE}: {len(self._flying)} requests are in flight; send it again later")
        flight = Flight(model, request_id, give_up, unnamed)
        self._flying.add(flight)
        return flight

    def end(self, flight: Flight) -> None:
        """It has its answer, or nobody wants one any more."""
        self._flying.discard(flight)
        if not self._flying:
            self._landed.set()

    def knows(self, request_id: str) -> bool:
        """Whether a request of that id is in flight."""
        return any(flight.request_id == request_id for flight in self._flying)

    def lose(self, sentence: str, model: str | None = None) -> int:
        """Give up what a model has, or everything: there will be no answer.

        Returns:
            How many requests are told so.
        """
        lost = [flight for flight in self._flying if model in (None, flight.model)]
        for flight in lost:
            flight.fault = unavailable(sentence)
            flight.give_up()
        return len(lost)

    async def drain(self, seconds: float) -> bool:
        """Begin no more, and wait for those that are there.

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
