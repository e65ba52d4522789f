"""A job inside the sampler. NumPy only."""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from lfdm_export.batching.jobs import Callbacks, Float32, SampleJob, Timings


@dataclass(eq=False)
class LiveJob:
    """A job that has not ended yet. Only the loop changes it, but for `cancel_requested`.

    Attributes:
        job: what was asked.
        callbacks: what is called.
        number: counts submissions.
        submitted: time of submission.
        ticks_before: ticks that had begun by then.
        step: steps done.
        joined: when its first step began; None as long as it waits.
        latent, history: its state (3, T, h, w) and (2, 3, T, h, w) while it is in no slot.
        next_noise: the draw of its next step, begun early; None if that takes none, or none was begun.
        cancel_requested: somebody cancelled it.
        asked: when `is_cancelled` was last asked.
        ended: how its fate was decided; its callback may still be outstanding.
        previews: the newest x0 estimate with its steps, not yet delivered: slow receivers skip the older ones.
    """

    job: SampleJob
    callbacks: Callbacks
    number: int
    submitted: float
    ticks_before: int
    step: int = 0
    joined: float | None = None
    latent: Float32 | None = None
    history: Float32 | None = None
    next_noise: Future[Float32] | None = None
    cancel_requested: bool = False
    asked: float = -np.inf
    ended: bool = False
    previews: deque[tuple[int, Float32]] = field(default_factory=lambda: deque(maxlen=1))

    @property
    def steps_left(self) -> int:
        """Steps that are still to be taken."""
        return self.job.table.steps - self.step

    def timings(self, now: float) -> Timings:
        """Where its time went up to now."""
        joined = now if self.joined is None else self.joined
        return Timings(joined - self.submitted, now - joined, self.step)
