"""Samples that share an engine, step by step: requests join and leave the running batch at any denoising step.

One loop, on a thread of its own, takes the jobs whose turn it is at each step (`lfdm_export.batching.order`), whatever
their step counts, samplers, guidance and seeds, runs one step of all of them, and lets go who is done. Jobs that need
both branches of guidance run through `step_guided`, the others through `step`, one after the other: guidance costs
twice as much on a CPU (29 against 16 ms a step of the small model), so that one graph for all would double the price
of those without it. NumPy only; knows nothing of servers.

How many slots: as many as batching makes cheaper. On a CPU it makes nothing cheaper: a step of the small model takes
15.8 ms of processor time for one sample, 14.8 ms a sample for four, 16.0 for eight, 17.2 for sixteen. More slots then
only make everybody finish late; one slot, which always works on what is due first, gives the best tail and the most
clips within their deadlines. On a GPU, where small batches should cost hardly more than one sample, 8 is a start; not
measured.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import fields
from types import TracebackType

import numpy as np

from lfdm_export.batching.delivery import Delivery
from lfdm_export.batching.jobs import Callbacks, Float32, QueueFullError, Sampled, SampleJob, StoppingError
from lfdm_export.batching.live_job import LiveJob
from lfdm_export.batching.noise_ahead import NoiseAhead
from lfdm_export.batching.observer import Observer, Stats, tell
from lfdm_export.batching.order import DueFirst, Policy
from lfdm_export.batching.rows import Rows, Stages
from lfdm_export.batching.step_loop import Counts, StepLoop
from lfdm_export.errors import EngineError, InputError
from lfdm_export.protocol.contract import DRAINING_MESSAGE, QUEUE_FULL_MESSAGE
from lfdm_export.sampling.noise import check_seeds
from lfdm_export.sampling.options import finite_number
from lfdm_export.stages import Geometry, stage_specs

logger = logging.getLogger(__name__)

#: Seconds between two looks at jobs that the policy lets wait for others.
_IDLE_LOOK = 0.005
# The stages of a step: without guidance, and with it.
UNGUIDED, GUIDED = "step", "step_guided"


class Ticket:
    """A submitted job, for who submitted it."""

    def __init__(self, batcher: StepBatcher, live: LiveJob) -> None:
        self._batcher, self._live = batcher, live

    def cancel(self) -> bool:
        """Give the job up before its next step; its `on_error` is then called with `RequestCancelledError`.

        From any thread. A job whose last step is done may still end well.

        Returns:
            Whether it had not ended yet.
        """
        return self._batcher._cancel(self._live)

    @property
    def ended(self) -> bool:
        """Whether its fate is decided; the callback may be still to come."""
        return self._live.ended


class StepBatcher:
    """Draws samples for many callers at once. All methods may be called from any thread.

    A sample is what `Pipeline.sample` gives for the same seed and settings. With whom it shares steps shows in the last
    bits at most, and with `fixed_batch` not at all.

    Callbacks are called from one delivery thread, never from the loop, so that decoding and sending hold up no step;
    a slow one holds up other callbacks. A job counts against the bound until its last callback has returned, so that
    samples which nobody takes do not pile up.
    """

    def __init__(
        self,
        stages: Stages,
        geometry: Geometry,
        null_embedding: Float32,
        *,
        slots: int = 1,
        queue_limit: int = 64,
        fixed_batch: bool = False,
        policy: Policy | None = None,
        observer: Observer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the loop.

        Args:
            stages: runs `step` and `step_guided`; used by the loop's thread alone.
            geometry: of the bundle.
            null_embedding: (text_width,) float32, the bundle's.
            slots: samples in one step at most; see the module for how many.
            queue_limit: jobs beyond the slots that may be there; more are refused.
            fixed_batch: run every step at the full batch of `slots`, so that a sample has the same bits in any company.
            policy: decides who takes a step; None for `DueFirst`.
            observer: is told what happens.
            clock: seconds; deadlines are on it.

        Raises:
            InputError: an argument is out of range.
        """
        _check_options(slots, queue_limit, fixed_batch, geometry)
        self._geometry, self._slots, self._limit = geometry, slots, slots + queue_limit
        self._observer, self._clock = observer, clock
        side = geometry.latent_size
        self._noise = NoiseAhead((3, geometry.frames, side, side))
        unguided, guided = (
            Rows(
                stages,
                stage,
                geometry,
                null_embedding,
                slots,
                self._noise,
                guided=stage == GUIDED,
                fixed_batch=fixed_batch,
            )
            for stage in (UNGUIDED, GUIDED)
        )
        self._delivery = Delivery("lfdm-delivery")
        self._loop = StepLoop(
            unguided,
            guided,
            slots=slots,
            policy=policy or DueFirst(),
            deliver=self._deliver,
            observer=observer,
            clock=clock,
        )
        self._changed = threading.Condition()  # guards what follows
        self._arrivals: list[LiveJob] = []
        self._outstanding = self._submitted = self._rejected = 0
        self._draining = self._closing = False
        self._death: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="lfdm-sampler", daemon=True)
        self._thread.start()

    # --- For callers ------------------------------------------------------------------------------

    def submit(
        self,
        job: SampleJob,
        *,
        on_done: Callable[[Sampled], None],
        on_error: Callable[[Exception], None],
        on_preview: Callable[[int, Float32], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> Ticket:
        """Have a sample drawn. Exactly one of `on_done` and `on_error` will be called, as the job's last callback.

        Args:
            job: what is asked.
            on_done: called with the sample.
            on_error: called with why there is none: `RequestCancelledError`, `DeadlineExceededError` (the deadline has
                passed, or the steps left take longer than the time left at the fastest recent pace), `StoppingError`,
                or what went wrong.
            on_preview: called with steps done and the x0 estimate (1, 3, T, h, w) float32 after each
                `preview_every` steps, the last aside; who is slow gets the newest, and misses those before it.
            on_progress: called with the steps done after each `progress_every` steps.
            is_cancelled: asked by the loop before each step of the job; must answer at once.

        Raises:
            InputError: the job does not fit the model.
            QueueFullError: too many jobs are there.
            StoppingError: the sampler is draining or closed.
            EngineError: the loop has died.
        """
        self._check(job)
        callbacks = Callbacks(on_done, on_error, on_preview, on_progress, is_cancelled)
        with self._changed:
            self._check_open()
            if self._outstanding < self._limit:
                return Ticket(self, self._admit(job, callbacks))
            self._rejected += 1
        if self._observer is not None:
            tell(self._observer.rejected)
        raise QueueFullError(f"{QUEUE_FULL_MESSAGE}: {self._limit} requests are being worked on; send it again later")

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more jobs and wait for those that are there.

        Args:
            timeout: seconds; None to wait as long as it takes.

        Returns:
            Whether all have ended and been delivered.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._outstanding == 0, timeout)

    def close(self, timeout: float = 30.0) -> None:
        """End now: the step that runs is finished, jobs that are left get a `StoppingError`.

        Args:
            timeout: seconds to wait for each of the two threads.
        """
        with self._changed:
            self._draining = self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if not self._thread.is_alive():
            self._noise.close()
        if self._thread.is_alive() or not self._delivery.close(timeout):
            logger.error("the sampler's threads did not end within %.0f s; they are left behind", timeout)

    def stats(self) -> Stats:
        """What was done up to now."""
        loop = self._loop
        counts = {field.name: getattr(loop.counts, field.name) for field in fields(Counts)}
        with self._changed:
            waiting = max(0, len(loop.live) + len(self._arrivals) - loop.counts.running)
            return Stats(
                slots=self._slots,
                waiting=waiting,
                outstanding=self._outstanding,
                submitted=self._submitted,
                rejected=self._rejected,
                **counts,
            )

    @property
    def alive(self) -> bool:
        """Whether jobs that are submitted will be worked on; False after `close` or when a thread has died."""
        return self._death is None and self._thread.is_alive() and self._delivery.alive and not self._closing

    def __enter__(self) -> StepBatcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    # --- On the callers' threads ------------------------------------------------------------------

    def _check(self, job: SampleJob) -> None:
        geometry = self._geometry
        side = geometry.latent_size
        for name, array, shape in (
            ("context", job.context, (1, geometry.context_channels, side, side)),
            ("embedding", job.embedding, (geometry.text_width,)),
        ):
            if array.dtype != np.float32 or array.shape != shape:
                raise InputError(f"{name}: found {array.dtype} {array.shape}, expected float32 {shape}")
            if not np.isfinite(array).all():
                raise InputError(f"{name}: found values that are not finite, expected finite ones; make it again")
        job.table.check()
        finite_number(job.guidance_scale, "guidance_scale")
        check_seeds([job.seed])
        for name, every in (("preview_every", job.preview_every), ("progress_every", job.progress_every)):
            if every is not None and every < 1:
                raise InputError(f"{name}: found {every}, expected 1 or more, or none")

    def _check_open(self) -> None:
        if self._death is not None:
            raise EngineError(f"the sampler's loop has died ({self._death!r}); start the server again")
        if self._draining:
            raise StoppingError(
                f"{DRAINING_MESSAGE}: it takes no more requests; send it again to another one, or later"
            )

    def _admit(self, job: SampleJob, callbacks: Callbacks) -> LiveJob:
        live = LiveJob(job, callbacks, self._submitted, self._clock(), self._loop.counts.ticks)
        self._submitted += 1
        self._outstanding += 1
        self._arrivals.append(live)
        self._changed.notify_all()
        return live

    def _cancel(self, live: LiveJob) -> bool:
        with self._changed:
            if live.ended:
                return False
            live.cancel_requested = True
            self._changed.notify_all()
            return True

    # --- On threads of its own --------------------------------------------------------------------

    def _run(self) -> None:
        """The loop."""
        try:
            while self._take_arrivals():
                if not self._loop.step():
                    time.sleep(_IDLE_LOOK)
            self._give_up(StoppingError(f"{DRAINING_MESSAGE}, and gave the request up; send it again later"))
        except BaseException as error:
            logger.critical("the sampler's loop died", exc_info=True)
            self._death = error
            self._give_up(EngineError(f"the sampler's loop died ({error!r}); start the server again"))

    def _take_arrivals(self) -> bool:
        """Wait until there is something to do; False when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrivals or self._loop.live or self._closing)
            self._loop.live.extend(self._arrivals)
            self._arrivals.clear()
            return not self._closing

    def _give_up(self, error: Exception) -> None:
        with self._changed:
            self._draining = True
            self._loop.live.extend(self._arrivals)
            self._arrivals.clear()
            self._changed.notify_all()
        self._loop.give_up(error)

    def _deliver(self, callback: Callable[[], None], last: bool) -> None:
        def call() -> None:
            try:
                callback()
            finally:
                if last:
                    with self._changed:
                        self._outstanding -= 1
                        self._changed.notify_all()

        self._delivery.call(call)


def _check_options(slots: int, queue_limit: int, fixed_batch: bool, geometry: Geometry) -> None:
    if slots < 1 or queue_limit < 0:
        raise InputError(f"found {slots} slots and queue_limit {queue_limit}, expected 1 and 0 or more")
    most = stage_specs(geometry)[GUIDED].batch[2]
    if fixed_batch and slots > most:
        raise InputError(
            f"slots: found {slots}, expected at most {most} with fixed_batch, the most that {GUIDED} runs at once"
        )
