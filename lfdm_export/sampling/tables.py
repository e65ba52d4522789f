"""Samplers as tables of coefficients, one row a step. NumPy only; the loop is in `lfdm_export.sampling.loop`.

Every sampler here is the same arithmetic with other numbers. With the noisy latent x, the predicted
noise e, the draw of noise n, and the history [P, m] of one sample, a step with coefficients c is

    x0 = threshold(c[0] x + c[1] e)
    x  <- c[2] x + c[3] x0 + c[4] e + c[5] P + c[6] m + c[7] n
    P  <- c[8] P + c[9] x0 + c[10] m
    m  <- x0

so that one graph with a `coefficients` input serves all of them. History is zeros at the start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.stages import COEFFICIENTS
from lfdm_models.schedule import Schedule

Float32Array: TypeAlias = NDArray[np.float32]
Int64Array: TypeAlias = NDArray[np.int64]

#: Columns of `coefficients`: what is multiplied, and what the product is added to.
X0_FROM_LATENT = 0
X0_FROM_PREDICTED_NOISE = 1
NEXT_FROM_LATENT = 2
NEXT_FROM_X0 = 3
NEXT_FROM_PREDICTED_NOISE = 4
NEXT_FROM_CARRY = 5
NEXT_FROM_PREVIOUS_X0 = 6
NEXT_FROM_NOISE = 7
CARRY_FROM_CARRY = 8
CARRY_FROM_X0 = 9
CARRY_FROM_PREVIOUS_X0 = 10

#: Where DPM-Solver++ and UniPC start: log(signal / noise) no lower than this. Below it the cosine schedule
#: runs off to -11, where the x0 estimate is the network's error times 60,000. Source: the clip
#: that diffusers recommends for this schedule (`lambda_min_clipped`), as DPM-Solver's authors start at t = 0.9946.
LOG_SNR_START = -5.1


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The steps of one sampler.

    Attributes:
        name: a key of SAMPLERS.
        timesteps: int64 (S,), the training step that the network is asked about, falling.
        coefficients: float32 (S, 11), in the columns above.
        draws_noise: bool (S,), whether the step takes a draw from the stream of noise. It may take one
            and weigh it with 0, as the released program does.
    """

    name: str
    timesteps: Int64Array
    coefficients: Float32Array
    draws_noise: NDArray[np.bool_]

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return len(self.timesteps)

    def check(self) -> None:
        """Compare the rows with each other, where they come from elsewhere than `SAMPLERS`.

        Raises:
            InputError: there is no step, a row is missing, of another type, or not finite.
        """
        steps = self.steps
        if steps < 1:
            raise InputError("steps: found none, expected 1 or more; ask for a step at least")
        for name, array, dtype, shape in (
            ("timesteps", self.timesteps, np.int64, (steps,)),
            ("coefficients", self.coefficients, np.float32, (steps, COEFFICIENTS)),
            ("draws_noise", self.draws_noise, np.bool_, (steps,)),
        ):
            if array.dtype != dtype or array.shape != shape:
                raise InputError(f"{name}: found {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
        if not np.isfinite(self.coefficients).all() or (self.timesteps < 0).any():
            raise InputError("coefficients or timesteps: found values that no sampler has; make the table anew")


@dataclass(frozen=True)
class Sampler:
    """One sampler; adding one means writing its table and listing it in `SAMPLERS`.

    Attributes:
        description: one line.
        table: makes the table for a schedule, a number of steps, and eta, which is ignored where `default_eta` is None.
        most_steps: the largest number of steps that a schedule allows.
        default_steps: steps where none are requested; None: `most_steps`, which is then the only number allowed.
        default_eta: eta where none is requested; None where the sampler has none.
    """

    description: str
    table: Callable[[Schedule, int, float], SamplerTable]
    most_steps: Callable[[Schedule], int]
    default_steps: int | None = None
    default_eta: float | None = None


def sampler_table(name: str, schedule: Schedule, steps: int | None = None, eta: float | None = None) -> SamplerTable:
    """The table of a sampler by name.

    Args:
        name: a key of SAMPLERS.
        schedule: the model's own.
        steps: how many; None for the sampler's default, or as many as the schedule allows if that is fewer.
        eta: 0 … 1, for "ddim"; None for the sampler's default.

    Raises:
        InputError: the name is unknown, the schedule does not allow so many steps, or eta is out of range
            or given to a sampler that has none.
    """
    if name not in SAMPLERS:
        raise InputError(f"sampler: found {name!r}, expected one of {', '.join(SAMPLERS)}; choose one of these")
    sampler = SAMPLERS[name]
    if eta is not None and sampler.default_eta is None:
        raise InputError(f"eta: found {eta}, but sampler {name!r} has no eta; leave it out or choose 'ddim'")
    most = sampler.most_steps(schedule)
    if most < 1:
        raise InputError(
            f"schedule: found {schedule.steps} training steps, too few for sampler {name!r}; choose 'ddpm'"
        )
    if sampler.default_steps is None:
        if steps is not None and _integer(steps) != most:
            raise InputError(
                f"steps: found {steps}, but {name!r} runs all {most} training steps; "
                f"leave steps out or choose another sampler"
            )
        steps = most
    elif steps is None:
        steps = min(sampler.default_steps, most)
    elif not 1 <= _integer(steps) <= most:
        raise InputError(
            f"steps: found {steps}, expected 1 to {most} for sampler {name!r} "
            f"on a schedule of {schedule.steps} training steps; choose a number in that range"
        )
    eta = sampler.default_eta if eta is None else eta
    return sampler.table(schedule, int(steps), 0.0 if eta is None else eta)


def ddpm_table(schedule: Schedule) -> SamplerTable:
    """Ancestral sampling: every training step, from the last to the first.

    Parity: the last step draws noise as the others do, and weighs it with 0.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, equations 6 and 7.
    """
    timesteps = np.arange(schedule.steps)[::-1].copy()
    rows = _rows(schedule, timesteps)
    rows[:, NEXT_FROM_LATENT] = schedule.posterior_mean_coef2[timesteps]
    rows[:, NEXT_FROM_X0] = schedule.posterior_mean_coef1[timesteps]
    rows[:, NEXT_FROM_NOISE] = np.exp(0.5 * schedule.posterior_log_variance_clipped[timesteps].astype(np.float64))
    rows[-1, NEXT_FROM_NOISE] = 0.0
    return _table("ddpm", timesteps, rows, np.ones(len(timesteps), bool))


def ddim_table(schedule: Schedule, steps: int, eta: float = 1.0) -> SamplerTable:
    """DDIM as the released program runs it, in its float32 arithmetic.

    Parity: alpha is taken from `alphas_cumprod_prev`, one training step off, while the x0 estimate uses
    `alphas_cumprod`; the times are those of a float32 linspace; a step draws noise even where eta
    is 0, unless it ends at time 0; the predicted noise is not derived anew from the thresholded x0.

    Args:
        schedule: of N training steps.
        steps: 1 … N-1.
        eta: 0 (deterministic) … 1 (as noisy as ancestral sampling).

    Raises:
        InputError: `eta` is out of range.

    Source: Song et al., Denoising Diffusion Implicit Models, equations 12 and 16.
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta: found {eta}, expected 0 to 1; choose a value in that range")
    times = _ddim_times(schedule.steps, steps)
    timesteps, ends = times[:-1], times[1:]
    one = np.float32(1)
    alpha, alpha_end = schedule.alphas_cumprod_prev[timesteps], schedule.alphas_cumprod_prev[ends]
    sigma = np.float32(eta) * np.sqrt((one - alpha / alpha_end) * (one - alpha_end) / (one - alpha))
    rows = _rows(schedule, timesteps)
    rows[:, NEXT_FROM_X0] = np.sqrt(alpha_end)
    # Never below 0 but for the rounding of float32.
    rows[:, NEXT_FROM_PREDICTED_NOISE] = np.sqrt(np.maximum(one - alpha_end - sigma**2, 0))
    rows[:, NEXT_FROM_NOISE] = np.where(ends > 0, sigma, 0)
    return _table("ddim", timesteps, rows, ends > 0)


def _ddim_times(training_steps: int, steps: int) -> Int64Array:
    """The S + 1 times of DDIM, falling to 0: a float32 linspace(0, N, S + 2) without its end, truncated.

    Parity: values that fall just short of an integer are truncated to the one below, and which ones do depends on
    precision and order of the arithmetic: ``numpy.linspace`` differs for S = 25, 37, 51 … at N = 1000.
    """
    points, end = steps + 2, np.float32(training_steps)
    step = end / np.float32(points - 1)
    index = np.arange(points)
    from_start = step * index.astype(np.float32)
    from_end = end - step * (points - 1 - index).astype(np.float32)
    return np.where(index < points // 2, from_start, from_end).astype(np.int64)[-2::-1]


def dpmpp_2m_table(schedule: Schedule, steps: int) -> SamplerTable:
    """DPM-Solver++ (2M): second-order multistep in the x0 estimate.

    The first step is of first order, having no past; so is the last, which ends at noise 0, where the
    second-order term has no limit: it returns x0. Times: see `_solver_times`.

    Args:
        schedule: of N training steps.
        steps: 1 … about N; 4 to 20 are what it is made for.

    Source: Lu et al., DPM-Solver++, algorithm 2.
    """
    timesteps, signal, noise, h = _solver_grid(schedule, steps)
    rows = _rows(schedule, timesteps)
    for i in range(steps):
        rows[i, NEXT_FROM_LATENT] = noise[i + 1] / noise[i]
        weight = -signal[i + 1] * math.expm1(-h[i])
        slope = h[i] / h[i - 1] / 2 if 0 < i < steps - 1 else 0.0
        rows[i, NEXT_FROM_X0] = weight * (1 + slope)
        rows[i, NEXT_FROM_PREVIOUS_X0] = -weight * slope
    return _table("dpm++2m", timesteps, rows, np.zeros(steps, bool))


def unipc_table(schedule: Schedule, steps: int) -> SamplerTable:
    """UniPC of order 2 with B(h) = e^h - 1: each step corrects the latent it is given, then predicts the next.

    The first step predicts at first order and corrects nothing; the last predicts at first order and
    ends at noise 0: it returns x0. Times: see `_solver_times`.

    Corrector and predictor to the same time start from the same corrected latent, so the corrected one is
    the predicted one plus a combination of the last three x0 estimates. The carry therefore is
    the x0 estimate before the previous one, and no older latent needs to be kept.

    Args:
        schedule: of N training steps.
        steps: 1 … about N; 4 to 20 are what it is made for.

    Source: Zhao et al., UniPC, algorithms 1 and 2, in the data-prediction form of its appendix.
    """
    timesteps, signal, noise, h = _solver_grid(schedule, steps)
    rows = _rows(schedule, timesteps)
    # What the corrector adds to the latent of step i, by x0 estimate: this one's, the previous, the one before that.
    correction = (0.0, 0.0, 0.0)
    for i in range(steps):
        weight = -signal[i + 1] * math.expm1(-h[i])
        second_order = 0 < i < steps - 1
        # Predictor: x0 + slope / 2 * (x0 - previous x0), slope = 1 / r of the paper (with its sign turned).
        slope = h[i] / h[i - 1] if i else 0.0
        ahead = weight * slope / 2 if second_order else 0.0
        decay = noise[i + 1] / noise[i]
        rows[i, NEXT_FROM_LATENT] = decay
        rows[i, NEXT_FROM_X0] = decay * correction[0] + weight + ahead
        rows[i, NEXT_FROM_PREVIOUS_X0] = decay * correction[1] - ahead
        rows[i, NEXT_FROM_CARRY] = decay * correction[2]
        rows[i, CARRY_FROM_PREVIOUS_X0] = 1.0
        if i < steps - 1:
            # Corrector at the next step, less the predictor that led there:
            # weight * (past * (x0 - previous x0) + now * (next x0 - x0)) - ahead * (x0 - previous x0)
            past, now = _unipc_corrector(h[i], slope) if second_order else (0.0, 0.5)
            change = weight * past - ahead
            correction = (weight * now, change - weight * now, -change)
    return _table("unipc", timesteps, rows, np.zeros(steps, bool))


def _unipc_corrector(h: float, slope: float) -> tuple[float, float]:
    """Weights of the past and of the newest difference of x0 in UniC-2 with B(h) = e^h - 1.

    The paper's system is [[1, 1], [r, 1]] rho = b for differences divided by r = -1 / slope; here
    the past one is returned for (x0 - previous x0), undivided.
    """
    phi_1 = math.expm1(-h) / -h
    b_1 = (phi_1 - 1) / math.expm1(-h)
    b_2 = 2 * ((phi_1 - 1) / -h - 0.5) / math.expm1(-h)
    r = -1 / slope
    past = (b_1 - b_2) / (1 - r)
    return past * slope, b_1 - past


def _solver_grid(
    schedule: Schedule, steps: int
) -> tuple[Int64Array, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Times (S,); signal and noise level there and at the end, 1 and 0 (S+1,); steps of log(signal / noise) (S,)."""
    timesteps = _solver_times(schedule, steps)
    # From the noise-to-signal buffer: 1 - alphas_cumprod would lose digits where alphas_cumprod is near 1.
    ratio = np.append(schedule.sqrt_recipm1_alphas_cumprod[timesteps].astype(np.float64), 0.0)
    signal = 1 / np.sqrt(1 + ratio**2)
    with np.errstate(divide="ignore"):
        h = np.diff(-np.log(ratio))
    return timesteps, signal, ratio * signal, h


def _solver_times(schedule: Schedule, steps: int) -> Int64Array:
    """Times of DPM-Solver++ and UniPC: t_k = T (k / S)^2, k = S … 1, rounded, but at least k to keep them apart.

    T is the latest time with a log-SNR of LOG_SNR_START. From t_1 the solver goes to noise 0 at once, which
    is exact to first order only, so t_1 must be small: on Gaussian mixtures with their ideal network, ten
    steps at these times leave a fifth to a half of the error of ten even steps (diffusers' "linspace").

    Source: Song et al., Denoising Diffusion Implicit Models, appendix D.2, quadratic tau.
    """
    index = np.arange(steps + 1)
    quadratic = (_start_time(schedule) * (index / steps) ** 2).round().astype(np.int64)
    return np.maximum(quadratic, index)[:0:-1]


def _start_time(schedule: Schedule) -> int:
    log_snr = -np.log(schedule.sqrt_recipm1_alphas_cumprod.astype(np.float64))
    return int(np.count_nonzero(log_snr >= LOG_SNR_START)) - 1


def _integer(steps: int) -> int:
    if isinstance(steps, bool) or not isinstance(steps, int | np.integer):
        raise InputError(f"steps: found {steps!r}, expected an integer; pass a whole number of steps")
    return int(steps)


def _rows(schedule: Schedule, timesteps: Int64Array) -> NDArray[np.float64]:
    """Coefficients (S, 11) that give the x0 estimate at these times, and are 0 elsewhere."""
    rows = np.zeros((len(timesteps), COEFFICIENTS))
    rows[:, X0_FROM_LATENT] = schedule.sqrt_recip_alphas_cumprod[timesteps]
    rows[:, X0_FROM_PREDICTED_NOISE] = -schedule.sqrt_recipm1_alphas_cumprod[timesteps]
    return rows


def _table(name: str, timesteps: Int64Array, rows: NDArray[np.float64], draws_noise: NDArray[np.bool_]) -> SamplerTable:
    return SamplerTable(name, timesteps.astype(np.int64), rows.astype(np.float32), draws_noise)


#: All samplers by name.
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
        most_steps=_start_time,
        default_steps=10,
    ),
    "unipc": Sampler(
        "UniPC (order 2, B2), predictor-corrector, deterministic; 4 to 20 steps",
        table=lambda schedule, steps, _eta: unipc_table(schedule, steps),
        most_steps=_start_time,
        default_steps=10,
    ),
}
