"""DPM-Solver++, its stochastic variant, and UniPC as tables; see `lfdm_export.sampling.rows`."""

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

#: Where DPM-Solver++ and UniPC start: log(signal / noise) no lower than this. Below it the cosine schedule
#: runs off to -11, where the x0 estimate is the network's error times 60,000. Source: the clip
#: that diffusers recommends for this schedule (`lambda_min_clipped`), as DPM-Solver's authors start at t = 0.9946.
LOG_SNR_START = -5.1


def dpmpp_2m_table(schedule: Schedule, steps: int) -> SamplerTable:
    """DPM-Solver++ (2M): second-order multistep in the x0 estimate.

    The first step is of first order, having no past; so is the last, which ends at noise 0, where the
    second-order term has no limit: it returns x0. Times: see `_solver_times`.

    Args:
        schedule: of N training steps.
        steps: 1 … about N; 4 to 20 are what it is made for.

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
    """SDE-DPM-Solver++ (2M), or of order 1: each step replaces some of the latent's noise by fresh noise.

    A step of h in log(signal / noise) keeps exp(-eta h) of the noise that stays, and draws the rest. With eta 1 that of
    order 1 is DDIM with eta 1, at these times and without its shift; with eta 0 they are DDIM with eta 0 and
    DPM-Solver++ (2M). First and last step are as in `dpmpp_2m_table`; the last draws nothing. Times are even: noise
    heals errors while it is high, and ten steps of the shipped model then are half as far from real clips
    (Fréchet distance 0.15) as ten at quadratic times.

    Args:
        schedule: of N training steps.
        steps: 1 … about N.
        eta: 0 (deterministic) … 1 (the reverse diffusion process itself).
        order: 1, or 2: the x0 estimate is extrapolated from the one before.

    Raises:
        InputError: `eta` is out of range.

    Source: Lu et al., DPM-Solver++ (arXiv 2211.01095), equations 18 and 19; between the ends eta is that of Crowson's
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
    """The eta as it is.

    Raises:
        InputError: it is.
    """
    if not 0.0 <= eta <= 1.0:
        raise InputError(f"eta: found {eta}, expected 0 to 1; choose a value in that range")
    return eta


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
    timesteps, signal, noise, h = _solver_grid(schedule, _solver_times(schedule, steps))
    rows = estimating_rows(schedule, timesteps)
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
    _from_thresholded_latent(rows, signal, noise)
    return make_table("unipc", timesteps, rows, np.zeros(steps, bool))


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


def _from_thresholded_latent(
    rows: NDArray[np.float64], signal: NDArray[np.float64], noise: NDArray[np.float64]
) -> None:
    """Let each step go on from signal * x0 + noise * predicted noise, with its thresholded x0, in place of the latent.

    Both are the same wherever nothing was clipped. Where something was, DDIM as the released program runs it goes on
    from the thresholded one, and so leaves behind at once what the network got wrong at high noise; a solver that goes
    on from the latent carries that along to the end, and approaches another clip however many steps it takes.

    Args:
        rows: (S, 11), changed in place: the weight of the latent becomes 0.
        signal: level at the steps' times, (S,) or longer.
        noise: likewise.
    """
    latent = rows[:, NEXT_FROM_LATENT].copy()
    rows[:, NEXT_FROM_X0] += latent * signal[: len(rows)]
    rows[:, NEXT_FROM_PREDICTED_NOISE] += latent * noise[: len(rows)]
    rows[:, NEXT_FROM_LATENT] = 0.0


def _solver_grid(
    schedule: Schedule, timesteps: Int64Array
) -> tuple[Int64Array, NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Times (S,); signal and noise level there and at the end, 1 and 0 (S+1,); steps of log(signal / noise) (S,)."""
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
    quadratic = (most_solver_steps(schedule) * (index / steps) ** 2).round().astype(np.int64)
    return np.maximum(quadratic, index)[:0:-1]


def _even_times(schedule: Schedule, steps: int) -> Int64Array:
    """Times T k / S, k = S … 1, rounded; T as in `_solver_times`."""
    return np.linspace(0, most_solver_steps(schedule), steps + 1).round().astype(np.int64)[:0:-1]


def most_solver_steps(schedule: Schedule) -> int:
    """The latest time that these solvers start at, which is also the largest number of their steps."""
    log_snr = -np.log(schedule.sqrt_recipm1_alphas_cumprod.astype(np.float64))
    return int(np.count_nonzero(log_snr >= LOG_SNR_START)) - 1
