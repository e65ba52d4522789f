"""What the sampler reports about its work: events for metrics, and a snapshot."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from lfdm_export.batching.jobs import Outcome, Timings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tick:
    """One step of all jobs in a slot.

    Attributes:
        running: slots in use.
        slots: number of slots.
        waiting: jobs without a slot, paused ones included.
        seconds: duration of the tick.
        engine_seconds: part of it spent in the stages.
        noise_seconds: part of it spent drawing noise.
    """

    running: int
    slots: int
    waiting: int
    seconds: float
    engine_seconds: float
    noise_seconds: float


class Observer(Protocol):
    """Receives events on the threads that do the work, `rejected` on the thread of `submit`. Methods must be quick."""

    def rejected(self) -> None:
        """A job was refused because the queue is full."""

    def joined(self, queued: float, ticks: int) -> None:
        """A job got its first slot after `queued` seconds, in which `ticks` ticks began."""

    def ticked(self, tick: Tick) -> None:
        """A tick ended."""

    def ended(self, outcome: Outcome, timings: Timings) -> None:
        """A job ended."""


@dataclass
class Counts:
    """What the loop of a sampler has done since its start, and does now.

    Attributes:
        running: jobs in a slot at the last tick.
        finished, failed, cancelled, expired: numbers of jobs.
        ticks: number of ticks.
        steps: sum of the steps of all jobs.
        seconds, engine_seconds, noise_seconds: sums over all ticks.
        queued_seconds: sum of the waits for a first slot.
        in_tick_since: clock at the start of the current tick; None between ticks. A long time ago means a hung engine.
    """

    running: int = 0
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


@dataclass(kw_only=True)
class Stats(Counts):
    """A snapshot of a sampler: the counts of its loop, and its queue.

    Attributes:
        slots: number of slots.
        waiting: jobs without a slot.
        outstanding: jobs whose last callback has not returned, including running and waiting ones.
        submitted, rejected: numbers of jobs.
    """

    slots: int
    waiting: int
    outstanding: int
    submitted: int
    rejected: int


def tell(event: Callable[[], None]) -> None:
    """Call an observer; its exceptions are logged and stop nothing."""
    try:
        event()
    except Exception:
        logger.exception("the observer failed")
