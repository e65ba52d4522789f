"""A job in the sampler. NumPy only."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lfdm_export.batching.jobs import Callbacks, Float32, Latent, SampleJob, Timings


@dataclass(eq=False)
class LiveJob:
    """A job that has not ended yet. Only the loop changes it, except for `cancel_requested`.

    Attributes:
        job: the request.
        callbacks: its callbacks.
        number: submission number.
        submitted: time of submission.
        ticks_before: ticks that had begun before submission.
        step: steps done.
        joined: start of the first step; None while the job waits for it.
        latent, history: its state on the host (3, T, h, w) and (2, 3, T, h, w) while it is in no slot; in the end its
            latent.
        paused: its state on a device while it is in no row there.
        next_noise: the draw of its next step, started early; None if the step draws none, or no draw was started.
        cancel_requested: whether the job was cancelled.
        asked: time of the last call of `is_cancelled`.
        ended: whether its outcome is decided; its last callback may be pending.
        previews: the newest x0 estimate with its steps, not yet delivered: slow receivers skip older ones.
    """

    job: SampleJob
    callbacks: Callbacks
    number: int
    submitted: float
    ticks_before: int
    step: int = 0
    joined: float | None = None
    latent: Latent | None = None
    history: Float32 | None = None
    paused: Any = None
    next_noise: Future[Float32] | None = None
    cancel_requested: bool = False
    asked: float = -np.inf
    ended: bool = False
    previews: deque[tuple[int, Latent]] = field(default_factory=lambda: deque(maxlen=1))

    @property
    def steps_left(self) -> int:
        """Remaining steps."""
        return self.job.table.steps - self.step

    @property
    def step_index(self) -> int:
        """The row of its table that it takes now; a finished job in a batch of constant size repeats its last."""
        return min(self.step, self.job.table.steps - 1)

    @property
    def guided(self) -> bool:
        """Whether the step that it takes now needs both branches of guidance."""
        return self.job.is_guided(self.step_index)

    def seconds_from(self, step: int, pace: Mapping[bool, float]) -> float:
        """Seconds of its steps from one on, by those of a step without and with guidance."""
        guided = self.job.guided_from(step)
        return guided * pace[True] + (self.job.table.steps - step - guided) * pace[False]

    def timings(self, now: float) -> Timings:
        """Where the time went so far."""
        joined = now if self.joined is None else self.joined
        return Timings(joined - self.submitted, now - joined, self.step)
