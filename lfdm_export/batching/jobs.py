"""One sample to be drawn: its job, its result, and its errors. NumPy only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.protocol.contract import OverloadedError
from lfdm_export.sampling.options import AS_TRAINED, takes_both_branches
from lfdm_export.sampling.rows import SamplerTable

Float32: TypeAlias = NDArray[np.float32]
#: A latent (1, 3, T, h, w) and a context (1, C, h, w), float32. If the batch is on a device, these are
#: `lfdm_export.engines.device_batch.DeviceLatent` and `lfdm_export.engines.device_chain.DeviceEncoded`.
Latent: TypeAlias = Any
Context: TypeAlias = Any
#: How a job ends, always in exactly one of these ways.
Outcome = Literal["finished", "failed", "cancelled", "expired"]


class QueueFullError(OverloadedError):
    """The queue is full."""


class StoppingError(OverloadedError):
    """The sampler is stopping: it accepts no more jobs, and ends those that it has."""


class DeadlineExceededError(OverloadedError):
    """The deadline of a job has passed, or can no longer be met."""


@dataclass(frozen=True, eq=False)
class SampleJob:
    """One sample to be drawn. The arrays must not change until the job has ended.

    Attributes:
        context: (1, C, h, w) float32, an output of `encode`; or an encoding on the device where the batch is.
        embedding: (text_width,) float32.
        table: the sampler, with its steps and timesteps.
        guidance_scale: 0 for the unconditional prediction, 1 for the conditional one; others run the network twice.
        seed: 0 … 2^64 - 1; the only source of randomness in the sample.
        priority: higher runs first, as `lfdm_export.batching.order` describes.
        deadline: on the clock of the sampler, `time.monotonic` in seconds; None for none.
        preview_every: steps between previews; None for none.
        progress_every: steps between progress reports; None for none.
        guided_steps: (S,) bool, where guidance acts; other steps take the conditional prediction. None for all.
    """

    context: Context
    embedding: Float32
    table: SamplerTable
    guidance_scale: float = AS_TRAINED
    seed: int = 0
    priority: int = 0
    deadline: float | None = None
    preview_every: int | None = None
    progress_every: int | None = None
    guided_steps: NDArray[np.bool_] | None = None

    @property
    def guided(self) -> bool:
        """Whether any step needs both branches of guidance."""
        return self.guided_from(0) > 0

    def guided_from(self, step: int) -> int:
        """How many steps from this one on need both branches of guidance."""
        if not takes_both_branches(self.guidance_scale):
            return 0
        given = self.guided_steps
        return self.table.steps - step if given is None else int(np.count_nonzero(given[step:]))

    def is_guided(self, step: int) -> bool:
        """Whether a step needs both branches of guidance."""
        given = self.guided_steps
        return takes_both_branches(self.guidance_scale) and (given is None or bool(given[step]))


@dataclass(frozen=True)
class Timings:
    """Where the time of a sample went.

    Attributes:
        queued: seconds from submission to the first step.
        sampling: seconds from there to the end, pauses included.
        steps: steps taken.
    """

    queued: float
    sampling: float
    steps: int


@dataclass(frozen=True, eq=False)
class Sampled:
    """A finished sample.

    Attributes:
        latent: owned by the receiver; on the host it is finite, on a device decoding checks it.
        timings: where the time went.
    """

    latent: Latent
    timings: Timings


@dataclass(frozen=True, eq=False)
class Callbacks:
    """Callbacks of a job, all called in order from one thread, not from the loop; see `StepBatcher.submit`.

    Attributes:
        done: called with the sample.
        error: called with the reason, instead of `done`.
        preview: called with the steps done and the x0 estimate.
        progress: called with the steps done.
        is_cancelled: called by the loop itself; must not block.
    """

    done: Callable[[Sampled], None]
    error: Callable[[Exception], None]
    preview: Callable[[int, Latent], None] | None = None
    progress: Callable[[int], None] | None = None
    is_cancelled: Callable[[], bool] | None = None
