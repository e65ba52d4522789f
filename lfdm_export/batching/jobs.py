"""One sample to be drawn: what is asked, what comes of it, and how it can end otherwise. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.protocol.contract import OverloadedError
from lfdm_export.sampling.options import AS_TRAINED, takes_both_branches
from lfdm_export.sampling.rows import SamplerTable

Float32: TypeAlias = NDArray[np.float32]
#: How a job ends, always in exactly one way.
Outcome = Literal["finished", "failed", "cancelled", "expired"]


class QueueFullError(OverloadedError):
    """As many jobs are waiting as may."""


class StoppingError(OverloadedError):
    """The sampler takes no more jobs, or gave up those that it had, because it is being stopped."""


class DeadlineExceededError(OverloadedError):
    """A job's deadline has passed, or can no longer be met."""


@dataclass(frozen=True, eq=False)
class SampleJob:
    """One sample to be drawn. The arrays must not change until the job has ended.

    Attributes:
        context: (1, C, h, w) float32, what `encode` gave.
        embedding: (text_width,) float32.
        table: the sampler, its steps and timesteps.
        guidance_scale: 0 for the unconditional prediction, 1 for the conditional one; others cost two network runs.
        seed: 0 … 2^64 - 1; the sample depends on nothing else that is random.
        priority: higher goes first; see `lfdm_export.batching.order`.
        deadline: on the clock of the sampler, `time.monotonic` in seconds; None for none.
        preview_every: a preview after each so many steps; None for none.
        progress_every: a report after each so many steps; None for none.
    """

    context: Float32
    embedding: Float32
    table: SamplerTable
    guidance_scale: float = AS_TRAINED
    seed: int = 0
    priority: int = 0
    deadline: float | None = None
    preview_every: int | None = None
    progress_every: int | None = None

    @property
    def guided(self) -> bool:
        """Whether a step needs both of guidance's branches."""
        return takes_both_branches(self.guidance_scale)


@dataclass(frozen=True)
class Timings:
    """Where a sample's time went.

    Attributes:
        queued: seconds from submission to its first step.
        sampling: seconds from there to its end, pauses included.
        steps: that were taken.
    """

    queued: float
    sampling: float
    steps: int


@dataclass(frozen=True, eq=False)
class Sampled:
    """A finished sample.

    Attributes:
        latent: (1, 3, T, h, w) float32, finite; the receiver's own.
        timings: where its time went.
    """

    latent: Float32
    timings: Timings


@dataclass(frozen=True, eq=False)
class Callbacks:
    """What is called for a job, all from one thread that is not the loop's, in order; see `StepBatcher.submit`.

    Attributes:
        done: with the sample.
        error: with the reason, instead of `done`.
        preview: with the steps done and the x0 estimate (1, 3, T, h, w) float32.
        progress: with the steps done.
        is_cancelled: asked by the loop itself; must not block.
    """

    done: Callable[[Sampled], None]
    error: Callable[[Exception], None]
    preview: Callable[[int, Float32], None] | None = None
    progress: Callable[[int], None] | None = None
    is_cancelled: Callable[[], bool] | None = None
