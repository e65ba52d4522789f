"""Sampling options of a clip, from a caller or a bundle. NumPy only.

Checks that need no model run when options are made; `SamplingOptions.table` checks the rest against the schedule
of the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.files.json_codec import LATER
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.solvers import check_eta
from lfdm_export.sampling.tables import SAMPLERS, known_sampler, sampler_table, whole_steps
from lfdm_export.sampling.tuned import TUNED, TunedSampler, sampler_names
from lfdm_models.config import MOST_TRAINING_STEPS
from lfdm_models.schedule import Schedule

#: The interval in which guidance acts at every step.
WHOLE = (0.0, 1.0)
#: The guidance scale that uses the conditional prediction alone.
AS_TRAINED = 1.0
#: Beyond it float32 overflows after a few steps; useful scales are below 20.
LARGEST_GUIDANCE = 1000


@dataclass(frozen=True)
class SamplingOptions:
    """None leaves the choice to the bundle. Steps and eta of the bundle apply to its default sampler only.

    Attributes:
        sampler: a name of `lfdm_export.sampling.tables.SAMPLERS`, or "tuned".
        steps: sampling steps.
        eta: share of fresh noise, 0 … 1, for samplers that have an eta.
        guidance_scale: 1 for the conditional prediction, 0 for the unconditional one, above 1 for more of the label.
        guidance_interval: (low, high), shares of the schedule, 0 (no noise) … 1 (pure noise), in which guidance acts.
            Steps outside it use the conditional prediction alone.
    """

    sampler: str | None = None
    steps: int | None = None
    eta: float | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] = field(default=WHOLE, metadata=LATER)

    def __post_init__(self) -> None:
        """Check what needs no model, and convert to plain numbers.

        Raises:
            InputError: the sampler is unknown, or a value is not a number or out of range.
        """
        checks: Mapping[str, Callable[[Any], object]] = {
            "sampler": lambda name: known_sampler(name, sampler_names()),
            "steps": _some_steps,
            "eta": lambda eta: check_eta(finite_number(eta, "eta")),
            "guidance_scale": _guidance,
            "guidance_interval": interval_ends,
        }
        for name, check in checks.items():
            value = getattr(self, name)
            if value is not None or name == "guidance_interval":
                object.__setattr__(self, name, check(value))

    @property
    def scale(self) -> float:
        """The guidance scale; as trained by default."""
        return AS_TRAINED if self.guidance_scale is None else self.guidance_scale

    def over(self, defaults: SamplingOptions) -> SamplingOptions:
        """Fill in `defaults`. The result has an eta if the sampler has one, and steps if either side sets them."""
        sampler, steps, eta = self.sampler, self.steps, self.eta
        if sampler is None or sampler == defaults.sampler:
            sampler = defaults.sampler
            steps = defaults.steps if steps is None else steps
            eta = defaults.eta if eta is None else eta
        if eta is None and sampler is not None and sampler in SAMPLERS:
            eta = SAMPLERS[sampler].default_eta
        scale = defaults.scale if self.guidance_scale is None else self.guidance_scale
        return replace(self, sampler=sampler, steps=steps, eta=eta, guidance_scale=scale)

    def table(self, schedule: Schedule, tuned: TunedSampler | None = None) -> SamplerTable:
        """The steps of the sampler that these options select.

        Args:
            schedule: the schedule of the model.
            tuned: the tuned sampler of the bundle, if it has one.

        Raises:
            InputError: the sampler is not available, or does not support these steps or this eta.
        """
        name = known_sampler(self.sampler, sampler_names())
        if name != TUNED:
            return sampler_table(name, schedule, self.steps, self.eta)
        if tuned is None:
            raise InputError(
                f"sampler: found {TUNED!r}, but this bundle has no tuned sampler; choose one of {', '.join(SAMPLERS)}, "
                "or tune one: lfdm-train schedule"
            )
        if self.eta is not None:
            raise InputError(f"eta: found {self.eta}, but sampler {TUNED!r} has its own noise; leave it out")
        return tuned.table(schedule, self.steps)

    def given(self) -> dict[str, Any]:
        """The options that are set, as keywords of `lfdm_export.generate.pipeline.Pipeline.generate`."""
        return {one.name: getattr(self, one.name) for one in fields(self) if getattr(self, one.name) != one.default}


def _guidance(scale: float) -> float:
    number = finite_number(scale, "guidance_scale")
    if abs(number) > LARGEST_GUIDANCE:
        raise InputError(f"guidance_scale is {number:g}, expected -{LARGEST_GUIDANCE} to {LARGEST_GUIDANCE}")
    return number


def finite_number(value: float, name: str) -> float:
    """Return `value` as a float.

    Raises:
        InputError: it is not a number, or not finite.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {value!r}, expected a number") from None
    if not math.isfinite(number):
        raise InputError(f"{name} is {number}, expected a finite number")
    return number


def interval_ends(interval: tuple[float, float]) -> tuple[float, float]:
    """Return low and high of a guidance interval.

    Raises:
        InputError: it is not an interval.
    """
    try:
        low, high = (finite_number(end, "guidance_interval") for end in interval)
    except (TypeError, ValueError):
        raise InputError(f"guidance_interval is {interval!r}, expected two numbers, such as (0.2, 0.8)") from None
    if not 0.0 <= low <= high <= 1.0:
        raise InputError(f"guidance_interval is ({low:g}, {high:g}), expected 0 <= low <= high <= 1")
    return low, high


def takes_both_branches(scale: float) -> bool:
    """Whether a step with this guidance scale needs the conditional and the unconditional prediction."""
    return scale not in (0.0, AS_TRAINED)


def guided_steps(timesteps: NDArray[np.int64], training_steps: int, interval: tuple[float, float]) -> NDArray[np.bool_]:
    """Select the steps at which guidance acts: those whose time, as a share of the schedule, is in the interval.

    Args:
        timesteps: (S,) int64.
        training_steps: number N of the schedule; time t is the share t / (N - 1).
        interval: (low, high), each 0 … 1, both inclusive.

    Returns:
        (S,) bool.

    Source: Kynkäänniemi et al., Applying Guidance in a Limited Interval (arXiv 2404.07724).
    """
    low, high = interval
    shares = timesteps / max(training_steps - 1, 1)
    return (low <= shares) & (shares <= high)


def guided_at(
    scale: float, timesteps: NDArray[np.int64], training_steps: int, interval: tuple[float, float]
) -> NDArray[np.bool_]:
    """`guided_steps`, checked against the scale.

    Raises:
        InputError: the scale takes no interval.
    """
    guided = guided_steps(timesteps, training_steps, interval)
    if scale == 0.0 and not guided.all():
        raise InputError("guidance_scale is 0, the unconditional prediction, which takes no guidance_interval")
    return guided


def _some_steps(steps: int) -> int:
    """Return a number of steps that some schedule allows."""
    if not 1 <= whole_steps(steps) <= MOST_TRAINING_STEPS:
        raise InputError(f"steps: found {steps}, expected 1 to {MOST_TRAINING_STEPS}; choose a number in that range")
    return int(steps)


#: Used where neither the caller nor the bundle sets a value.
DEFAULTS = SamplingOptions("ddim", steps=10, eta=1.0, guidance_scale=AS_TRAINED)
#: Options that are a single word or number: servers, job tables and forms accept these.
OPTION_NAMES = tuple(one.name for one in fields(SamplingOptions) if one.default is None)
