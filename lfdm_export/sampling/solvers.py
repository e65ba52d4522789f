"""DPM-Solver++, its stochastic variant and UniPC as tables; `lfdm_export.sampling.rows` defines a table."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.sampling.rows import (
    CARRY_FROM_PREVIOUS_X0,
    NEXT_FROM_CARRY,
    NEXT_FROM_LATENT,
    NEXT_FROM_NOISE,
    NEXT_FROM_PREDICTED_NOISE,
    NEXT_FROM_PREVIOUS_X0,
    NEXT_FROM_X0,
    Int64Array,
    SamplerTable,
    estimating_rows,
    make_table,
)
from lfdm_models.schedule import Schedule

#: Lower limit of log(signal / noise) where DPM-Solver++ and UniPC start. Below it the cosine schedule
#: falls to -11, where the x0 estimate is the error of the network times 60,000. Source: the clipping
#: that diffusers recommends for this schedule (`lambda_min_clipped`); the authors of DPM-Solver start at t = 0.9946.
LOG_SNR_START = -5.1


def dpmpp_2m_table(schedule: Schedule, steps: int) -> SamplerTable:
    """DPM-Solver++ (2M): second-order multistep in the x0 estimate.

    The first step is first-order, because it has no history. So is the last, which ends at noise 0, where the
    second-order term has no limit: it returns x0. `_solver_times` chooses the times.

    Args:
        schedule: a schedule with N training steps.
        steps: 1 … about N; designed for 4 to 20.

    Source: Lu et al., DPM-Solver++, algorithm 2.
    """
    timesteps, signal, noise, h = _solver_grid(schedule, _solver_times(schedule, steps))
    rows = estimating_rows(schedule, timesteps)
    for i in range(steps):
        rows[i, NEXT_FROM_LATENT] = noise[i + 1] / noise[i]
        weight = -signal[i + 1] * math.expm1(-h[i])
        slope = h[i] / h[i - 1] / 2 if 0 < i < steps - 1 else 0.0
        rows[i, NEXT_FROM_X0] = weight * (1 + slope)
        rows[i, NEXT_FROM_PREVIOUS_X0] = -weight * slope
    _from_thresholded_latent(rows, signal, noise)
    return make_table("dpm++2m", timesteps, rows, np.zeros(steps, bool))


def sde_dpmpp_table(schedule: Schedule, steps: int, eta: float = 1.0, *, order: int = 2) -> SamplerTable:
    """SDE-DPM-Solver++ of order 2 (2M) or 1: each step replaces some of the noise in the latent with fresh noise.

    A step of h in log(signal / noise) keeps exp(-eta h) of the remaining noise and draws the rest. With eta 1, order 1
    is DDIM with eta 1, at these times and without its shift; with eta 0, orders 1 and 2 are DDIM with eta 0
    and DPM-Solver++ (2M). The first and last steps are as in `dpmpp_2m_table`; the last draws nothing. Times are evenly
    spaced: noise corrects errors while it is high, and ten steps of the shipped model are then half as far from real
    clips (Fréchet distance 0.15) as ten steps at quadratic times.

    Args:
        schedule: a schedule with N training steps.
        steps: 1 … about N.
        eta: 0 (deterministic) … 1 (the reverse diffusion process itself).
        order: 1, or 2, which extrapolates the x0 estimate from the previous one.

    Raises:
        InputError: `eta` is out of range.

    Source: Lu et al., DPM-Solver++ (arXiv 2211.01095), equations 18 and 19; for eta between 0 and 1, Crowson's
        k-diffusion, `sample_dpmpp_2m_sde` with the midpoint rule.
    """
    check_eta(eta)
    timesteps, signal, noise, h = _solver_grid(schedule, _even_times(schedule, steps))
    rows = estimating_rows(schedule, timesteps)
    for i in range(steps - 1):
        rows[i, NEXT_FROM_LATENT] = noise[i + 1] / noise[i] * math.exp(-eta * h[i])
        weight = -signal[i + 1] * math.expm1(-(1 + eta) * h[i])
        slope = h[i] / h[i - 1] / 2 if order == 2 and i else 0.0
        rows[i, NEXT_FROM_X0] = weight * (1 + slope)
        rows[i, NEXT_FROM_PREVIOUS_X0] = -weight * slope
        rows[i, NEXT_FROM_NOISE] = noise[i + 1] * math.sqrt(-math.expm1(-2 * eta * h[i]))
    rows[-1, NEXT_FROM_X0] = 1.0
    _from_thresholded_latent(rows, signal, noise)
    return make_table(f"sde-dpm++{order}{'m' * (order > 1)}", timesteps, rows, np.arange(steps) < steps - 1)


def check_eta(eta: float) -> float:
    """Return eta unchanged.

    Raises:
        InputError: eta is out of range.
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta: found {eta}, expected 0 to 1; choose a value in that range")
    return eta


def unipc_table(schedule: Schedule, steps: int) -> SamplerTable:
    """UniPC of order 2 with B(h) = e^h - 1: each step corrects its latent, then predicts the next.

    The first step predicts at first order and corrects nothing; the last predicts at first order and
    ends at noise 0, where it returns x0. `_solver_times` chooses the times.

    Corrector and predictor of the same time start from the same corrected latent, so the corrected latent is
    the predicted one plus a combination of the last three x0 estimates. The carry is therefore
    the x0 estimate before the previous one, and no older latent is kept.

    Args:
        schedule: a schedule with N training steps.
        steps: 1 … about N; designed for 4 to 20.

    Source: Zhao et al., UniPC, algorithms 1 and 2, in the data-prediction form of its appendix.
    """
    timesteps, signal, noise, h = _solver_grid(schedule, _solver_times(schedule, steps))
    rows = estimating_rows(schedule, timesteps)
    # What the corrector adds to the latent of step i, per x0 estimate: current, previous, the one before.
    correction = (0.0, 0.0, 0.0)
    for i in range(steps):
        weight = -signal[i + 1] * math.expm1(-h[i])
        second_order = 0 < i < steps - 1
        # Predictor: x0 + slope / 2 * (x0 - previous x0), with slope = 1 / r of the paper (opposite sign).
        slope = h[i] / h[i - 1] if i else 0.0
        ahead = weight * slope / 2 if second_order else 0.0
        decay = noise[i + 1] / noise[i]
        rows[i, NEXT_FROM_LATENT] = decay
        rows[i, NEXT_FROM_X0] = decay * correction[0] + weight + ahead
        rows[i, NEXT_FROM_PREVIOUS_X0] = decay * correction[1] - ahead
        rows[i, NEXT_FROM_CARRY] = decay * correction[2]
        rows[i, CARRY_FROM_PREVIOUS_X0] = 1.0
        if i < steps - 1:
            # Corrector at the next step, minus the predictor of this step:
            # weight * (past * (x0 - previous x0) + now * (next x0 - x0)) - ahead * (x0 - previous x0)
            past, now = _unipc_corrector(h[i], slope) if second_order else (0.0, 0.5)
            change = weight * past - ahead
            correction = (weight * now, change - weight * now, -change)
    _from_thresholded_latent(rows, signal, noise)
    return make_table("unipc", timesteps, rows, np.zeros(steps, bool))


def _unipc_corrector(h: float, slope: float) -> tuple[float, float]:
    """Weights of the past and the newest difference of x0 in UniC-2 with B(h) = e^h - 1.

    The system in the paper is [[1, 1], [r, 1]] rho = b for differences divided by r = -1 / slope; here
    the past weight applies to (x0 - previous x0), undivided.
    """
    phi_1 = math.expm1(-h) / -h
    b_1 = (phi_1 - 1) / math.expm1(-h)
    b_2 = 2 * ((phi_1 - 1) / -h - 0.5) / math.expm1(-h)
    r = -1 / slope
    past = (b_1 - b_2) / (1 - r)
    return past * slope, b_1 - past


def _from_thresholded_latent(
    rows: NDArray[np.float64], signal: NDArray[np.float64], noise: NDArray[np.float64]
) -> None:
    """Let each step continue from signal * thresholded x0 + noise * predicted noise instead of the latent.

    Both are equal where nothing was clipped. Elsewhere, DDIM as in the released program continues from the
    thresholded x0, and so drops at once the errors of the network at high noise. A solver that continues
    from the latent carries them to the end, and approaches another clip with any number of steps.

    Args:
        rows: (S, 11), changed in place: the weight of the latent becomes 0.
        signal: signal level at the times of the steps, (S,) or longer.
        noise: noise level, likewise.
    """
    latent = rows[:, NEXT_FROM_LATENT].copy()
    rows[:, NEXT_FROM_X0] += latent * signal[: len(rows)]
    rows[:, NEXT_FROM_PREDICTED_NOISE] += latent * noise[: len(rows)]
    rows[:, NEXT_FROM_LATENT] = 0.0


def _solver_grid(
    schedule: Schedule, timesteps: Int64Array
) -> tuple[Int64Array, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Times (S,); signal and noise levels there and at the end, where they are 1 and 0 (S+1,); log-SNR steps (S,)."""
    # From the noise-to-signal buffer: 1 - alphas_cumprod would lose digits where alphas_cumprod is near 1.
    ratio = np.append(schedule.sqrt_recipm1_alphas_cumprod[timesteps].astype(np.float64), 0.0)
    signal = 1 / np.sqrt(1 + ratio**2)
    with np.errstate(divide="ignore"):
        h = np.diff(-np.log(ratio))
    return timesteps, signal, ratio * signal, h


def _solver_times(schedule: Schedule, steps: int) -> Int64Array:
    """Times of DPM-Solver++ and UniPC: t_k = T (k / S)^2, k = S … 1, rounded, but at least k so that they differ.

    T is the latest time with a log-SNR of LOG_SNR_START. From t_1 the solver goes directly to noise 0, which
    is exact to first order only, so t_1 must be small: on Gaussian mixtures with their ideal network, ten
    steps at these times leave a fifth to a half of the error of ten even steps ("linspace" in diffusers).

    Source: Song et al., Denoising Diffusion Implicit Models, appendix D.2, quadratic tau.
    """
    index = np.arange(steps + 1)
    quadratic = (most_solver_steps(schedule) * (index / steps) ** 2).round().astype(np.int64)
    return np.maximum(quadratic, index)[:0:-1]


def _even_times(schedule: Schedule, steps: int) -> Int64Array:
    """Times T k / S, k = S … 1, rounded; T as in `_solver_times`."""
    return np.linspace(0, most_solver_steps(schedule), steps + 1).round().astype(np.int64)[:0:-1]


def most_solver_steps(schedule: Schedule) -> int:
    """The latest start time of these solvers, which is also their largest number of steps."""
    log_snr = -np.log(schedule.sqrt_recipm1_alphas_cumprod.astype(np.float64))
    return int(np.count_nonzero(log_snr >= LOG_SNR_START)) - 1
