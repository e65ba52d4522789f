"""The steps of all jobs of a sampler. No threads: `lfdm_export.batching.step_batcher` has them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias

from lfdm_export.batching.jobs import DeadlineExceededError, Outcome, Sampled
from lfdm_export.batching.live_job import LiveJob
from lfdm_export.batching.observer import Counts, Observer, Tick, tell
from lfdm_export.batching.order import Policy, Queue
from lfdm_export.batching.seating import Ran, Seating
from lfdm_export.errors import EngineError, LfdmExportError, not_finite
from lfdm_export.protocol.contract import DEADLINE_MESSAGE, RequestCancelledError

logger = logging.getLogger(__name__)

#: Number of recent steps of which the fastest decides which deadlines cannot be met.
_RECENT_STEPS = 256
#: Seconds between two checks whether a waiting job was cancelled; a running one is checked before each step.
_ASK_EVERY = 0.1
#: Passes a callback to the thread that calls it; the flag says whether it is the last one of the job.
Deliver: TypeAlias = Callable[[Callable[[], None], bool], None]


class StepLoop:
    """Selects jobs for the next step, runs it, and ends jobs. For one thread; other threads may read the counts."""

    def __init__(
        self,
        unguided: Seating,
        guided: Seating,
        *,
        slots: int,
        policy: Policy,
        deliver: Deliver,
        observer: Observer | None,
        clock: Callable[[], float],
    ) -> None:
        """Start without jobs.

        Args:
            unguided: rows of `step`.
            guided: rows of `step_guided`.
            slots: maximum number of jobs per step.
            policy: decides which jobs take a step.
            deliver: receives callbacks.
            observer: receives events.
            clock: clock in seconds.
        """
        self._rows = {False: unguided, True: guided}
        self._slots, self._policy, self._deliver, self._observer, self._clock = slots, policy, deliver, observer, clock
        self._recent = {guided: deque[float](maxlen=_RECENT_STEPS) for guided in (False, True)}
        #: Seconds of the fastest recent step, by whether it is guided; 0 before the first step.
        self.pace = {False: 0.0, True: 0.0}
        self.counts = Counts()
        #: Jobs that have not ended, by arrival.
        self.live: list[LiveJob] = []
        # Jobs whose steps are all done, and that the policy has not released yet.
        self._finished: list[LiveJob] = []

    def step(self) -> bool:
        """End jobs that must end, then run one step of the selected jobs.

        Returns:
            Whether a job took a step; else the policy waits for more jobs, or there are none.
        """
        self._end_given_up()
        chosen = self._policy.choose(self._queue())
        if chosen:
            self._tick(chosen)
        return bool(chosen)

    def give_up(self, error: Exception) -> None:
        """End every job with an error."""
        for live in list(self.live):
            self._end(live, "failed", error)
        self._answer()

    def _end_given_up(self) -> None:
        """End jobs that were cancelled or are too late, running ones too if the policy allows it."""
        now = self._clock()
        for live in list(self.live):
            if live.joined is not None and not self._policy.stops:
                continue
            try:
                cancelled = live.cancel_requested or self._ask(live, now)
            except Exception as error:  # noqa: BLE001 - the caller's function; fails this job alone
                self._end(live, "failed", error)
                continue
            if cancelled:
                self._end(live, "cancelled", RequestCancelledError("the request was cancelled"))
            elif live.job.deadline is not None:
                least = live.seconds_from(live.step, self.pace)
                late = _lateness(live, live.job.deadline - now, least)
                if late is not None:
                    self._end(live, "expired", DeadlineExceededError(f"{DEADLINE_MESSAGE}: {late}"))

    def _ask(self, live: LiveJob, now: float) -> bool:
        if live.callbacks.is_cancelled is None or (live.joined is None and now - live.asked < _ASK_EVERY):
            return False
        live.asked = now
        return live.callbacks.is_cancelled()

    def _tick(self, chosen: list[LiveJob]) -> None:
        """One step of the chosen jobs."""
        counts, started = self.counts, time.perf_counter()
        counts.in_tick_since = now = self._clock()
        counts.running, waiting = len(chosen), len(self.live) - sum(not live.ended for live in chosen)
        for live in chosen:
            if live.joined is None:
                self._join(live, now)
        counts.ticks += 1
        takes = {guided: [live for live in chosen if live.guided is guided] for guided in self._rows}
        self._leave(takes)
        ran = [self._step_rows(guided, jobs) for guided, jobs in takes.items()]
        self._answer()
        if not self.live:  # no job will replace those that just ended
            for rows in self._rows.values():
                rows.seat([])
        engine, noise = sum(one.engine for one in ran), sum(one.noise for one in ran)
        seconds = time.perf_counter() - started
        counts.seconds, counts.engine_seconds = counts.seconds + seconds, counts.engine_seconds + engine
        counts.noise_seconds += noise
        counts.in_tick_since = None
        counts.running = sum(not live.ended for live in chosen)
        if self._observer is not None:
            tick = Tick(len(chosen), self._slots, waiting, seconds, engine, noise)
            tell(partial(self._observer.ticked, tick))

    def _join(self, live: LiveJob, now: float) -> None:
        live.joined, queued = now, now - live.submitted
        self.counts.queued_seconds += queued
        if self._observer is not None:
            tell(partial(self._observer.joined, queued, self.counts.ticks - live.ticks_before))

    def _leave(self, takes: Mapping[bool, list[LiveJob]]) -> None:
        """Take jobs whose guidance begins or ends now out of their rows, before the other rows take them."""
        for guided, rows in self._rows.items():
            stay = [live for live in rows.jobs if live not in takes[not guided]]
            if len(stay) < len(rows.jobs):
                try:
                    rows.seat(stay)
                except Exception as error:
                    logger.exception("jobs could not leave their rows, and %d are lost", len(rows.jobs))
                    self._fail(rows, [], error)

    def _step_rows(self, guided: bool, jobs: list[LiveJob]) -> Ran:
        """One step of the jobs of one stage; if it fails, each job repeats it alone, so that no other is affected."""
        rows = self._rows[guided]
        try:
            rows.seat(jobs)
        except Exception as error:
            logger.exception("jobs could not be seated, and %d are lost", len(jobs))
            return self._fail(rows, jobs, error)
        if not jobs:
            return Ran(0.0, 0.0)
        try:
            ran = rows.step()
        except Exception as error:
            if len(jobs) == 1 or not self._policy.stops:
                logger.exception("a step failed, and %d jobs with it", len(jobs))
                return self._fail(rows, jobs, error)
            logger.warning("a step of %d jobs failed (%r): each takes it alone", len(jobs), error)
            for live in jobs:
                live.next_noise = None  # it already belongs to the step after this one
            alone = [self._step_rows(guided, [live]) for live in jobs]
            return Ran(sum(one.engine for one in alone), sum(one.noise for one in alone))
        recent = self._recent[guided]
        if ran.engine:  # a device reports the step before, if any
            recent.append(ran.engine + ran.noise)
            self.pace[guided] = min(recent)
        for row, (live, finite) in enumerate(zip(rows.jobs, rows.finite(), strict=True)):
            self._after_step(live, rows, row, finite)
        return ran

    def _fail(self, rows: Seating, jobs: list[LiveJob], error: Exception) -> Ran:
        """End these jobs and all others in the rows."""
        wrapped = error if isinstance(error, LfdmExportError) else EngineError(f"a step failed: {error!r}")
        for live in {*jobs, *rows.jobs}:
            if not live.ended:
                self._end(live, "failed", wrapped)
        rows.clear()
        return Ran(0.0, 0.0)

    def _after_step(self, live: LiveJob, rows: Seating, row: int, finite: bool) -> None:
        job, callbacks = live.job, live.callbacks
        if live.ended:
            return
        live.step += 1
        self.counts.steps += 1
        if not finite:
            self._end(live, "failed", not_finite(f"step {live.step} of {job.table.steps} gave"))
        elif not live.steps_left:
            live.latent = rows.latent(row)
            live.ended = True
            self.live.remove(live)
            self._finished.append(live)
            self._answer()
        else:
            if callbacks.progress is not None and job.progress_every and live.step % job.progress_every == 0:
                self._deliver(partial(callbacks.progress, live.step), False)
            if callbacks.preview is not None and job.preview_every and live.step % job.preview_every == 0:
                live.previews.append((live.step, rows.estimate(row)))
                self._deliver(partial(_call_with_preview, live), False)

    def _queue(self) -> Queue:
        return Queue(self.live, self._finished, self._slots, self._clock(), self.pace)

    def _answer(self) -> None:
        """Release the jobs whose steps are all done, if the policy allows it."""
        for live in list(self._policy.answered(self._queue())):
            self._finished.remove(live)
            self._end(live, "finished", None)

    def _end(self, live: LiveJob, outcome: Outcome, error: Exception | None) -> None:
        """Release a job, and queue its last callback."""
        live.ended = True
        if live in self.live:
            self.live.remove(live)
        timings = live.timings(self._clock())
        setattr(self.counts, outcome, getattr(self.counts, outcome) + 1)
        if self._observer is not None:
            tell(partial(self._observer.ended, outcome, timings))
        if error is not None:
            self._deliver(partial(live.callbacks.error, error), True)
        elif live.latent is not None:
            self._deliver(partial(live.callbacks.done, Sampled(live.latent, timings)), True)
        live.latent = live.history = live.paused = None


def _call_with_preview(live: LiveJob) -> None:
    if live.callbacks.preview is not None and live.previews and not live.ended:
        live.callbacks.preview(*live.previews.popleft())


def _lateness(live: LiveJob, seconds_left: float, least: float) -> str | None:
    """Why a deadline is missed; None if it may still be met.

    Args:
        live: the job.
        seconds_left: seconds until the deadline.
        least: seconds of its remaining steps at the pace of the fastest recent ones; 0 if unknown.
    """
    steps = live.job.table.steps
    if seconds_left <= 0:
        return f"{live.step} of {steps} steps were done; allow more time, or use fewer steps"
    if least <= seconds_left:
        return None
    return (
        f"found {seconds_left:.3g} s left for {live.steps_left} of {steps} steps, expected {least:.3g} s at least; "
        "allow more time, or use fewer steps"
    )
