"""What the sampler tells about its work: events for metrics, and a snapshot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lfdm_export.batching.jobs import Outcome, Timings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tick:
    """One step of everybody who had a slot.

    Attributes:
        running: slots in use.
        slots: slots that there are.
        waiting: jobs that had none, paused ones included.
        seconds: of the whole tick.
        engine_seconds: of it, spent in the stages.
        noise_seconds: of it, spent drawing noise.
    """

    running: int
    slots: int
    waiting: int
    seconds: float
    engine_seconds: float
    noise_seconds: float


class Observer(Protocol):
    """Is told what happens. Called on the threads at work, `rejected` on that of `submit`: must be quick."""

    def rejected(self) -> None:
        """A job was refused because the queue is full."""

    def joined(self, queued: float, ticks: int) -> None:
        """A job got its first slot after so many seconds, in which so many ticks began."""

    def ticked(self, tick: Tick) -> None:
        """A step of everybody was done."""

    def ended(self, outcome: Outcome, timings: Timings) -> None:
        """A job ended."""


@dataclass(frozen=True)
class Stats:
    """What a sampler has done since it began, and is doing.

    Attributes:
        slots: that there are.
        running: jobs in a slot at the last tick.
        waiting: jobs without one.
        outstanding: jobs whose last callback has not returned, running and waiting ones included.
        submitted, rejected, finished, failed, cancelled, expired: jobs, counted.
        ticks: steps of everybody.
        steps: steps of single jobs.
        seconds, engine_seconds, noise_seconds: of all ticks.
        queued_seconds: that the jobs waited for their first slot, summed.
        in_tick_since: clock when the tick that runs now began; None between ticks. One long ago means a hung engine.
    """

    slots: int
    running: int = 0
    waiting: int = 0
    outstanding: int = 0
    submitted: int = 0
    rejected: int = 0
    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    expired: int = 0
    ticks: int = 0
    steps: int = 0
    seconds: float = 0.0
    engine_seconds: float = 0.0
    noise_seconds: float = 0.0
    queued_seconds: float = 0.0
    in_tick_since: float | None = None


def tell(event: Callable[[], None]) -> None:
    """Call an observer; its mistakes are logged and stop nothing."""
    try:
        event()
    except Exception:
        logger.exception("the observer failed")
