"""Every sampler by name, and the tables of the samplers in the released program.

The others are in `lfdm_export.sampling.solvers`; `lfdm_export.sampling.rows` defines a table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import numpy as np

from lfdm_export.errors import InputError
from lfdm_export.sampling.rows import (
    NEXT_FROM_LATENT,
    NEXT_FROM_NOISE,
    NEXT_FROM_PREDICTED_NOISE,
    NEXT_FROM_X0,
    Int64Array,
    SamplerTable,
    estimating_rows,
    make_table,
)
from lfdm_export.sampling.solvers import check_eta, dpmpp_2m_table, most_solver_steps, sde_dpmpp_table, unipc_table
from lfdm_models.schedule import Schedule


@dataclass(frozen=True)
class Sampler:
    """One sampler. To add one, write its table and list it in `SAMPLERS`.

    Attributes:
        description: one line.
        table: makes the table for a schedule, a number of steps, and eta, which is ignored where `default_eta` is None.
        most_steps: the largest number of steps that a schedule allows.
        default_steps: steps by default; None: `most_steps`, which is then the only number allowed.
        default_eta: eta by default; None if the sampler has no eta.
    """

    description: str
    table: Callable[[Schedule, int, float], SamplerTable]
    most_steps: Callable[[Schedule], int]
    default_steps: int | None = None
    default_eta: float | None = None


def sampler_table(name: str, schedule: Schedule, steps: int | None = None, eta: float | None = None) -> SamplerTable:
    """Make the table of a sampler by name.

    Args:
        name: a key of SAMPLERS.
        schedule: the schedule of the model.
        steps: number of steps; None for the default of the sampler, or for the maximum of the schedule if lower.
        eta: 0 … 1, for samplers that have an eta; None for the default of the sampler.

    Raises:
        InputError: the name is unknown, the schedule does not allow this number of steps, or eta is out of range
            or set for a sampler without eta.
    """
    sampler = SAMPLERS[known_sampler(name, SAMPLERS)]
    if eta is not None and sampler.default_eta is None:
        with_eta = ", ".join(name for name, sampler in SAMPLERS.items() if sampler.default_eta is not None)
        raise InputError(f"eta: found {eta}, but sampler {name!r} has no eta; leave it out or choose one of {with_eta}")
    most = sampler.most_steps(schedule)
    if most < 1:
        raise InputError(
            f"schedule: found {schedule.steps} training steps, too few for sampler {name!r}; choose 'ddpm'"
        )
    if sampler.default_steps is None:
        if steps is not None and whole_steps(steps) != most:
            raise InputError(
                f"steps: found {steps}, but {name!r} runs all {most} training steps; "
                f"leave steps out or choose another sampler"
            )
        steps = most
    elif steps is None:
        steps = min(sampler.default_steps, most)
    elif not 1 <= whole_steps(steps) <= most:
        raise InputError(
            f"steps: found {steps}, expected 1 to {most} for sampler {name!r} "
            f"on a schedule of {schedule.steps} training steps; choose a number in that range"
        )
    eta = sampler.default_eta if eta is None else eta
    return sampler.table(schedule, int(steps), 0.0 if eta is None else eta)


def ddpm_table(schedule: Schedule) -> SamplerTable:
    """Ancestral sampling: every training timestep, from the last to the first.

    Parity: the last step draws noise as the others do, and weights it with 0.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, equations 6 and 7.
    """
    timesteps = np.arange(schedule.steps)[::-1].copy()
    rows = estimating_rows(schedule, timesteps)
    rows[:, NEXT_FROM_LATENT] = schedule.posterior_mean_coef2[timesteps]
    rows[:, NEXT_FROM_X0] = schedule.posterior_mean_coef1[timesteps]
    rows[:, NEXT_FROM_NOISE] = np.exp(0.5 * schedule.posterior_log_variance_clipped[timesteps].astype(np.float64))
    rows[-1, NEXT_FROM_NOISE] = 0.0
    return make_table("ddpm", timesteps, rows, np.ones(len(timesteps), bool))


def ddim_table(schedule: Schedule, steps: int, eta: float = 1.0) -> SamplerTable:
    """DDIM as in the released program, in its float32 arithmetic.

    Parity: alpha comes from `alphas_cumprod_prev`, one training step off, while the x0 estimate uses
    `alphas_cumprod`; the times are those of a float32 linspace; a step draws noise even where eta
    is 0, unless it ends at time 0; the predicted noise is not recomputed from the thresholded x0.

    Args:
        schedule: a schedule with N training steps.
        steps: 1 … N-1.
        eta: 0 (deterministic) … 1 (as noisy as ancestral sampling).

    Raises:
        InputError: `eta` is out of range.

    Source: Song et al., Denoising Diffusion Implicit Models, equations 12 and 16.
    """
    check_eta(eta)
    times = _ddim_times(schedule.steps, steps)
    timesteps, ends = times[:-1], times[1:]
    one = np.float32(1)
    alpha, alpha_end = schedule.alphas_cumprod_prev[timesteps], schedule.alphas_cumprod_prev[ends]
    sigma = np.float32(eta) * np.sqrt((one - alpha / alpha_end) * (one - alpha_end) / (one - alpha))
    rows = estimating_rows(schedule, timesteps)
    rows[:, NEXT_FROM_X0] = np.sqrt(alpha_end)
    # Below 0 only through float32 rounding.
    rows[:, NEXT_FROM_PREDICTED_NOISE] = np.sqrt(np.maximum(one - alpha_end - sigma**2, 0))
    rows[:, NEXT_FROM_NOISE] = np.where(ends > 0, sigma, 0)
    return make_table("ddim", timesteps, rows, ends > 0)


def _ddim_times(training_steps: int, steps: int) -> Int64Array:
    """The S + 1 times of DDIM, decreasing to 0: a float32 linspace(0, N, S + 2) without its end, truncated.

    Parity: values just below an integer are truncated to the next lower one. Which values are affected depends on
    the precision and order of the arithmetic: ``numpy.linspace`` differs for S = 25, 37, 51 … at N = 1000.
    """
    points, end = steps + 2, np.float32(training_steps)
    step = end / np.float32(points - 1)
    index = np.arange(points)
    from_start = step * index.astype(np.float32)
    from_end = end - step * (points - 1 - index).astype(np.float32)
    return np.where(index < points // 2, from_start, from_end).astype(np.int64)[-2::-1]


def known_sampler(name: str | None, known: Collection[str]) -> str:
    """Return the name unchanged.

    Raises:
        InputError: the name is not in `known`.
    """
    if name is None or name not in known:
        raise InputError(f"sampler: found {name!r}, expected one of {', '.join(known)}; choose one of these")
    return name


def whole_steps(steps: int) -> int:
    """Return a number of steps as a plain integer.

    Raises:
        InputError: it is not an integer.
    """
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise InputError(f"steps: found {steps!r}, expected an integer; pass a whole number of steps")
    return int(steps)


#: All samplers by name, except the tuned sampler of a bundle (`lfdm_export.sampling.tuned`).
SAMPLERS: Mapping[str, Sampler] = {
    "ddpm": Sampler(
        "ancestral sampling over every training step; slowest, the released demos' own",
        table=lambda schedule, _steps, _eta: ddpm_table(schedule),
        most_steps=lambda schedule: schedule.steps,
    ),
    "ddim": Sampler(
        "DDIM as the released program runs it; eta 0 is deterministic, eta 1 draws noise",
        table=ddim_table,
        most_steps=lambda schedule: schedule.steps - 1,
        default_steps=10,
        default_eta=1.0,
    ),
    "dpm++2m": Sampler(
        "DPM-Solver++ (2M), second order, deterministic after the start; 4 to 20 steps",
        table=lambda schedule, steps, _eta: dpmpp_2m_table(schedule, steps),
        most_steps=most_solver_steps,
        default_steps=10,
    ),
    "unipc": Sampler(
        "UniPC (order 2, B2), predictor-corrector, deterministic; 4 to 20 steps",
        table=lambda schedule, steps, _eta: unipc_table(schedule, steps),
        most_steps=most_solver_steps,
        default_steps=10,
    ),
    "sde-dpm++1": Sampler(
        "SDE-DPM-Solver++ of order 1: DDIM with noise at the times of the solvers",
        table=lambda schedule, steps, eta: sde_dpmpp_table(schedule, steps, eta, order=1),
        most_steps=most_solver_steps,
        default_steps=10,
        default_eta=1.0,
    ),
    "sde-dpm++2m": Sampler(
        "SDE-DPM-Solver++ (2M), second order, draws noise at each step",
        table=sde_dpmpp_table,
        most_steps=most_solver_steps,
        default_steps=10,
        default_eta=1.0,
    ),
}
