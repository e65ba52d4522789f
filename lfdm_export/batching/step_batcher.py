"""Samples that share an engine, step by step: requests join and leave the running batch at any denoising step.

One loop, on its own thread, selects the jobs for each step (`lfdm_export.batching.order`), whatever their step counts,
samplers, guidance and seeds, runs one step of all of them, and releases those that are done. Jobs that need
both branches of guidance run through `step_guided`, the others through `step`, one after the other: guidance costs
twice as much on a CPU (29 against 16 ms per step of the small model), so one graph for all jobs would double the cost
of jobs without it. NumPy only; independent of servers.

Number of slots: as many as batching makes cheaper, which `lfdm_export.batching.slots` decides from measured steps. On a
CPU, where batching saves nothing, one slot, which always works on the job that is due first, gives the best tail
latency and the most clips within their deadlines.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np

from lfdm_export.batching.delivery import Delivery
from lfdm_export.batching.device_rows import DeviceRows
from lfdm_export.batching.jobs import Callbacks, Float32, Latent, QueueFullError, Sampled, SampleJob, StoppingError
from lfdm_export.batching.live_job import LiveJob
from lfdm_export.batching.noise_ahead import NoiseAhead
from lfdm_export.batching.observer import Observer, Stats, tell
from lfdm_export.batching.order import DueFirst, Policy
from lfdm_export.batching.rows import Rows, Stages
from lfdm_export.batching.seating import Seating
from lfdm_export.batching.step_loop import StepLoop
from lfdm_export.engines.device_chain import DeviceChain, DeviceEncoded
from lfdm_export.errors import EngineError, InputError
from lfdm_export.protocol.contract import DRAINING_MESSAGE, QUEUE_FULL_MESSAGE
from lfdm_export.sampling.noise import check_seeds
from lfdm_export.sampling.options import finite_number
from lfdm_export.stages import Geometry, stage_specs

logger = logging.getLogger(__name__)

#: Seconds between two checks of jobs that the policy keeps waiting for others.
_IDLE_LOOK = 0.005
# The stages of a step: without and with guidance.
UNGUIDED, GUIDED = "step", "step_guided"


class Ticket:
    """A submitted job, as its caller sees it."""

    def __init__(self, batcher: StepBatcher, live: LiveJob) -> None:
        self._batcher, self._live = batcher, live

    def cancel(self) -> bool:
        """Cancel the job before its next step; `on_error` is then called with `RequestCancelledError`.

        Any thread may call this. A job whose last step is done may still finish.

        Returns:
            Whether the job had not ended yet.
        """
        return self._batcher._cancel(self._live)

    @property
    def ended(self) -> bool:
        """Whether the outcome is decided; the callback may be pending."""
        return self._live.ended


class StepBatcher:
    """Draws samples for many callers at once. Any thread may call any method.

    A sample equals that of `Pipeline.sample` for the same seed and settings. Other jobs in its steps change at most the
    last bits, and nothing with `fixed_batch`.

    Callbacks run on one delivery thread, never on the loop, so decoding and sending delay no step;
    a slow callback delays the others. A job counts toward the limit until its last callback has returned, so
    samples that no receiver takes do not accumulate.
    """

    def __init__(
        self,
        stages: Stages | DeviceChain[Any],
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
            stages: runs `step` and `step_guided`; used by the loop thread only. With a chain on a device the states
                stay there, jobs have an encoding there as their context, and their results are there.
            geometry: geometry of the bundle.
            null_embedding: (text_width,) float32, from the bundle.
            slots: maximum number of samples per step; the module docstring says how many.
            queue_limit: maximum number of jobs beyond the slots; more are rejected.
            fixed_batch: run every step at the full batch of `slots`, so that other jobs change no bits of a sample.
            policy: decides which jobs take a step; None for `DueFirst`.
            observer: receives events.
            clock: clock in seconds, also for deadlines.

        Raises:
            InputError: an argument is out of range.
        """
        _check_options(slots, queue_limit, fixed_batch, geometry)
        self._geometry, self._slots, self._limit = geometry, slots, slots + queue_limit
        self._observer, self._clock = observer, clock
        self._most_steps = stages.most_steps if isinstance(stages, DeviceChain) else None
        side = geometry.latent_size
        self._noise = NoiseAhead((3, geometry.frames, side, side))

        def rows(stage: str) -> Seating:
            if isinstance(stages, DeviceChain):
                return DeviceRows(stages, stage, null_embedding, slots, fixed_batch=fixed_batch)
            guided = stage == GUIDED
            return Rows(
                stages, stage, geometry, null_embedding, slots, self._noise, guided=guided, fixed_batch=fixed_batch
            )

        self._delivery = Delivery("lfdm-delivery")
        self._loop = StepLoop(
            rows(UNGUIDED),
            rows(GUIDED),
            slots=slots,
            policy=policy or DueFirst(),
            deliver=self._deliver,
            observer=observer,
            clock=clock,
        )
        self._changed = threading.Condition()  # guards the fields below
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
        on_preview: Callable[[int, Latent], None] | None = None,
        on_progress: Callable[[int], None] | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> Ticket:
        """Submit a sample to draw. Exactly one of `on_done` and `on_error` is called, as the last callback of the job.

        Args:
            job: the request.
            on_done: called with the sample.
            on_error: called with the reason for a failure: `RequestCancelledError`, `DeadlineExceededError` (the
                deadline has passed, or is too near for the remaining steps at the fastest recent pace),
                `StoppingError`, or another error.
            on_preview: called with the steps done and the x0 estimate after every
                `preview_every` steps except the last; a slow receiver gets the newest and skips older ones.
            on_progress: called with the steps done after every `progress_every` steps.
            is_cancelled: called by the loop before each step of the job; must return immediately.

        Raises:
            InputError: the job does not match the model.
            QueueFullError: the queue is full.
            StoppingError: the sampler is draining or closed.
            EngineError: the loop has failed.
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
        """Accept no more jobs and wait for the current ones.

        Args:
            timeout: seconds; None waits without limit.

        Returns:
            Whether all jobs have ended and all callbacks returned.
        """
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: self._outstanding == 0, timeout)

    def close(self, timeout: float = 30.0) -> None:
        """Stop now: finish the current step, and end the remaining jobs with a `StoppingError`.

        Args:
            timeout: seconds to wait per thread (two threads).
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
        """What was done so far."""
        loop = self._loop
        with self._changed:
            waiting = max(0, len(loop.live) + len(self._arrivals) - loop.counts.running)
            return Stats(
                slots=self._slots,
                waiting=waiting,
                outstanding=self._outstanding,
                submitted=self._submitted,
                rejected=self._rejected,
                **vars(loop.counts),
            )

    @property
    def alive(self) -> bool:
        """Whether submitted jobs will run; False after `close` or when a thread has failed."""
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
        given: list[tuple[str, Float32, tuple[int, ...]]] = [("embedding", job.embedding, (geometry.text_width,))]
        if (self._most_steps is not None) != isinstance(job.context, DeviceEncoded):
            where = "the host" if self._most_steps is None else "the device of the sampler"
            raise InputError(f"context: found {type(job.context).__name__}, expected an encoding on {where}")
        if not isinstance(job.context, DeviceEncoded):
            given.insert(0, ("context", job.context, (1, geometry.context_channels, side, side)))
        for name, array, shape in given:
            if array.dtype != np.float32 or array.shape != shape:
                raise InputError(f"{name}: found {array.dtype} {array.shape}, expected float32 {shape}")
            if not np.isfinite(array).all():
                raise InputError(f"{name}: found values that are not finite, expected finite ones; make it again")
        job.table.check()
        if self._most_steps is not None and job.table.steps > self._most_steps:
            raise InputError(
                f"steps: found {job.table.steps}, expected at most {self._most_steps}, the training steps of the "
                "model; ask for fewer"
            )
        finite_number(job.guidance_scale, "guidance_scale")
        guided = job.guided_steps
        if guided is not None and (guided.dtype != np.bool_ or guided.shape != (job.table.steps,)):
            raise InputError(f"guided: found {guided.dtype} {guided.shape}, expected bool ({job.table.steps},)")
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

    # --- On the batcher's own threads -------------------------------------------------------------

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
        """Wait until there is work; False when the loop must end."""
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
