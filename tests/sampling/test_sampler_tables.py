"""Sampler tables against diffusers, against the specification's formulas, and against the exact answer."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

from lfdm_export.errors import InputError
from lfdm_export.sampling import solvers
from lfdm_export.sampling.loop import sample, step_from_denoiser, threshold
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.rows import (
    NEXT_FROM_NOISE,
    NEXT_FROM_PREDICTED_NOISE,
    NEXT_FROM_X0,
    X0_FROM_LATENT,
    X0_FROM_PREDICTED_NOISE,
    SamplerTable,
)
from lfdm_export.sampling.solvers import LOG_SNR_START, dpmpp_2m_table, sde_dpmpp_table, unipc_table
from lfdm_export.sampling.tables import SAMPLERS, ddim_table, ddpm_table, sampler_table
from lfdm_models.schedule import Schedule, cosine_schedule

SCHEDULE = cosine_schedule(1000)
# diffusers converts tensors in a way that NumPy 2 warns of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

#: Noise-to-signal ratio, and the levels of signal and noise, from the buffer that holds the most digits of them.
RATIO = SCHEDULE.sqrt_recipm1_alphas_cumprod.astype(np.float64)
SIGNAL = 1 / np.sqrt(1 + RATIO**2)
NOISE = RATIO * SIGNAL
SHAPE = (2, 3, 4, 2, 2)
FEW_STEPS = [1, 2, 3, 4, 5, 8, 10, 15, 20]
#: A network's stand-in: smooth, nonlinear, mixing all elements of a sample, other at each time.
MIX = np.random.default_rng(1).standard_normal((48, 48)) / math.sqrt(48)


def network(latent: np.ndarray, timestep: np.ndarray) -> np.ndarray:
    flat = latent.reshape(len(latent), -1).astype(np.float64)
    time = timestep.reshape(-1, 1) / 100
    predicted = 0.7 * flat + 0.5 * np.tanh(flat @ MIX + np.sin(time + np.arange(48)))
    return predicted.reshape(latent.shape).astype(latent.dtype)


def start() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32)


def run(table: SamplerTable, draws: Iterable[np.ndarray] = ()) -> np.ndarray:
    return sample(step_from_denoiser(network), table, start(), draws)


def settings() -> dict[str, Any]:
    """What makes a scheduler of diffusers the same mathematics, thresholding included."""
    return {
        "num_train_timesteps": SCHEDULE.steps,
        "trained_betas": SCHEDULE.betas.tolist(),
        "thresholding": True,
        "dynamic_thresholding_ratio": 0.9,
        "sample_max_value": 1e9,
    }


def unthresholded() -> dict[str, Any]:
    return {**settings(), "thresholding": False}


def close(found: np.ndarray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_thresholding_takes_part_in_these_comparisons():
    thresholded = []

    def watch(i: int, latent: np.ndarray, history: np.ndarray) -> None:
        thresholded.append((np.abs(history[:, 1]) == 1).mean())

    sample(step_from_denoiser(network), unipc_table(SCHEDULE, 10), start(), (), on_step=watch)
    assert np.count_nonzero(thresholded) >= 3


def test_ddpm_is_diffusers_ancestral_sampling():
    scheduler = DDPMScheduler(**settings(), variance_type="fixed_small", clip_sample=False)
    scheduler.alphas_cumprod = torch.from_numpy(SIGNAL**2)
    scheduler.set_timesteps(1000)
    generator, latent = torch.Generator().manual_seed(3), torch.from_numpy(start())
    for t in scheduler.timesteps.tolist():
        predicted = torch.from_numpy(network(latent.numpy(), np.full(2, t)))
        latent = scheduler.step(predicted, t, latent, generator=generator).prev_sample
    table = ddpm_table(SCHEDULE)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy())
    # diffusers draws no noise at t = 0; ours does, and must not use it.
    generator.manual_seed(3)
    draws = [torch.randn(SHAPE, generator=generator).numpy() for _ in range(999)] + [np.full(SHAPE, 1e9, np.float32)]
    close(run(table, iter(draws)), latent)


@pytest.mark.parametrize("steps", [4, 9, 19])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_without_its_shift_is_diffusers_ddim(steps: int, eta: float):
    # For these steps the released times lie 1000 / (steps + 1) apart, which diffusers can express.
    unshifted = dataclasses.replace(SCHEDULE, alphas_cumprod_prev=SCHEDULE.alphas_cumprod)
    table = ddim_table(unshifted, steps, eta)
    scheduler = DDIMScheduler(**settings(), clip_sample=False)
    scheduler.alphas_cumprod = torch.from_numpy(SIGNAL**2)
    scheduler.set_timesteps(steps + 1)
    np.testing.assert_array_equal(table.timesteps, scheduler.timesteps.numpy()[:-1])
    draws = np.random.default_rng(5).standard_normal((steps, *SHAPE), dtype=np.float32)
    assert table.coefficients[-1, NEXT_FROM_NOISE] == 0
    draws[-1] = 0  # diffusers adds noise to the step that ends at time 0
    latent = torch.from_numpy(start())
    for t, draw in zip(table.timesteps.tolist(), draws, strict=True):
        predicted = torch.from_numpy(network(latent.numpy(), np.full(2, t)))
        latent = scheduler.step(predicted, t, latent, eta=eta, variance_noise=torch.from_numpy(draw)).prev_sample
    close(run(table, iter(draws[:-1])), latent)


class Uncorrected(UniPCMultistepScheduler):
    """Adds to a corrected latent what thresholding changed of the latent that was predicted."""

    predicted: torch.Tensor

    def multistep_uni_c_bh_update(self, this_model_output: torch.Tensor, *args, **options) -> torch.Tensor:
        corrected = super().multistep_uni_c_bh_update(this_model_output, *args, **options)
        return corrected + (options["this_sample"] - self.predicted)


def run_multistep(scheduler, times: np.ndarray, draws: np.ndarray | None = None) -> torch.Tensor:
    """A chain of diffusers at the given times, ending at noise 0, each step from the thresholded latent."""
    scheduler.set_timesteps(len(times))
    scheduler.timesteps = torch.from_numpy(times)
    scheduler.sigmas = torch.from_numpy(np.append(RATIO[times], 0.0))
    latent = torch.from_numpy(start()).double()
    for i, t in enumerate(times):
        predicted = network(latent.numpy(), np.full(2, t))
        x0 = threshold(((latent.numpy() - NOISE[t] * predicted) / SIGNAL[t]).astype(np.float32))
        thresholded = torch.from_numpy(SIGNAL[t] * x0 + NOISE[t] * predicted)
        scheduler.predicted = latent
        noise = {"variance_noise": torch.from_numpy(draws[i])} if draws is not None else {}
        latent = scheduler.step(torch.from_numpy(predicted), t, thresholded, **noise).prev_sample
    return latent


@pytest.mark.parametrize("steps", FEW_STEPS)
def test_dpmpp_2m_is_that_of_diffusers(steps: int):
    table = dpmpp_2m_table(SCHEDULE, steps)
    options = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint", "lower_order_final": True}
    close(run(table), run_multistep(DPMSolverMultistepScheduler(**unthresholded(), **options), table.timesteps))


@pytest.mark.parametrize("steps", FEW_STEPS)
def test_unipc_is_that_of_diffusers(steps: int):
    table = unipc_table(SCHEDULE, steps)
    options = {"solver_order": 2, "solver_type": "bh2", "predict_x0": True, "lower_order_final": True}
    close(run(table), run_multistep(Uncorrected(**unthresholded(), **options), table.timesteps))


@pytest.mark.parametrize("steps", FEW_STEPS)
@pytest.mark.parametrize("order", [1, 2])
def test_sde_dpmpp_is_that_of_diffusers(steps: int, order: int):
    table = sde_dpmpp_table(SCHEDULE, steps, order=order)
    options = {"algorithm_type": "sde-dpmsolver++", "solver_type": "midpoint", "lower_order_final": True}
    scheduler = DPMSolverMultistepScheduler(**unthresholded(), **options, solver_order=order)
    draws = np.random.default_rng(5).standard_normal((steps, *SHAPE), dtype=np.float32)
    assert table.draws_noise.tolist() == [True] * (steps - 1) + [False]
    close(run(table, iter(draws[:-1])), run_multistep(scheduler, table.timesteps, draws))


def test_sde_dpmpp_of_order_1_is_ddim_with_noise():
    table = sde_dpmpp_table(SCHEDULE, 10, order=1)
    t, end = table.timesteps[:-1], table.timesteps[1:]
    sigma = NOISE[end] / NOISE[t] * np.sqrt(1 - (SIGNAL[t] / SIGNAL[end]) ** 2)
    for column, expected in (
        (NEXT_FROM_X0, SIGNAL[end]),
        (NEXT_FROM_PREDICTED_NOISE, np.sqrt(NOISE[end] ** 2 - sigma**2)),
        (NEXT_FROM_NOISE, sigma),
    ):
        np.testing.assert_allclose(table.coefficients[:-1, column], expected, rtol=1e-6)
    assert not table.coefficients[:, [2, 5, 6, 8, 9, 10]].any()


@pytest.mark.parametrize("steps", FEW_STEPS)
def test_sde_dpmpp_without_noise_is_dpmpp(monkeypatch: pytest.MonkeyPatch, steps: int):
    """At the same times."""
    monkeypatch.setattr("lfdm_export.sampling.solvers._even_times", solvers._solver_times)
    found, expected = sde_dpmpp_table(SCHEDULE, steps, 0.0), dpmpp_2m_table(SCHEDULE, steps)
    np.testing.assert_array_equal(found.timesteps, expected.timesteps)
    np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-6)


def test_times_with_noise_are_even():
    for name in ("sde-dpm++1", "sde-dpm++2m"):
        assert sampler_table(name, SCHEDULE, 5).timesteps.tolist() == [995, 796, 597, 398, 199]


def test_solver_times_are_quadratic():
    for name in ("dpm++2m", "unipc"):
        assert sampler_table(name, SCHEDULE, 4).timesteps.tolist() == [995, 560, 249, 62]
        assert sampler_table(name, SCHEDULE, 50).timesteps.tolist()[-4:] == [6, 4, 2, 1]
    assert -math.log(RATIO[995]) >= LOG_SNR_START > -math.log(RATIO[996])


@pytest.mark.parametrize("steps", [10, 25, 37, 51, 200, 250])
def test_ddim_times_are_a_float32_linspace(steps: int):
    float32 = torch.linspace(0, 1000, steps + 2)[:-1].int().flip(0)[:-1]
    np.testing.assert_array_equal(ddim_table(SCHEDULE, steps).timesteps, float32.numpy())
    float64 = np.linspace(0, 1000, steps + 2)[-2:0:-1].astype(int)
    assert bool((float32.numpy() != float64).any()) == (steps in (25, 37, 51))


def test_ddim_times_of_every_length():
    for training_steps in (20, 1000):
        schedule = cosine_schedule(training_steps)
        for steps in range(1, training_steps):
            times = ddim_table(schedule, steps).timesteps
            expected = torch.linspace(0, training_steps, steps + 2)[:-1].int().flip(0)[:-1]
            np.testing.assert_array_equal(times, expected.numpy())
            assert len(times) == steps
            assert times[0] < training_steps
            assert (np.diff(times) < 0).all()


@pytest.mark.parametrize(("steps", "eta"), [(1, 1.0), (4, 0.0), (10, 1.0), (25, 0.5), (250, 0.3), (999, 1.0)])
def test_ddim_coefficients_are_the_released_float32_arithmetic(steps: int, eta: float):
    table = ddim_table(SCHEDULE, steps, eta)
    one = np.float32(1)
    for i, (t, end) in enumerate(itertools.pairwise([*table.timesteps.tolist(), 0])):
        alpha, alpha_end = SCHEDULE.alphas_cumprod_prev[[t, end]]
        sigma = np.float32(eta) * np.sqrt((one - alpha / alpha_end) * (one - alpha_end) / (one - alpha))
        expected = np.zeros(11, np.float32)
        expected[X0_FROM_LATENT] = SCHEDULE.sqrt_recip_alphas_cumprod[t]
        expected[X0_FROM_PREDICTED_NOISE] = -SCHEDULE.sqrt_recipm1_alphas_cumprod[t]
        expected[NEXT_FROM_X0] = np.sqrt(alpha_end)
        expected[NEXT_FROM_PREDICTED_NOISE] = np.sqrt(one - alpha_end - sigma * sigma)
        expected[NEXT_FROM_NOISE] = sigma if end else 0
        np.testing.assert_array_equal(table.coefficients[i], expected)
    assert table.draws_noise.tolist() == [True] * (steps - 1) + [False]


def ideal_network(deviation: np.ndarray, mode: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The exact noise prediction where each element of a clip is -mode or +mode, plus Gaussian noise (1, n)."""

    def ideal(latent: np.ndarray, timestep: np.ndarray) -> np.ndarray:
        a, s = SIGNAL[timestep][:, None], NOISE[timestep][:, None]
        variance = a**2 * deviation**2 + s**2
        mean = np.tanh(a * mode * latent / variance) * mode
        x0 = (deviation**2 * a * latent + s**2 * mean) / variance
        return ((latent - a * x0) / s).astype(np.float32)

    return ideal


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("ddim", 0.75, 1.25), ("dpm++2m", 1.75, 2.5), ("unipc", 2.75, 3.5)],  # UniC adds one to the order of UniP
)
def test_errors_fall_at_the_expected_order(name: str, low: float, high: float):
    unshifted = dataclasses.replace(SCHEDULE, alphas_cumprod_prev=SCHEDULE.alphas_cumprod)
    deviation = np.linspace(0.2, 0.45, 48).reshape(1, 48)
    first = np.random.default_rng(2).standard_normal((1, 48), dtype=np.float32)

    def error(steps: int) -> float:
        table = sampler_table(name, unshifted, steps, 0.0 if name == "ddim" else None)
        a, s = SIGNAL[table.timesteps[0]], NOISE[table.timesteps[0]]
        exact = deviation * first / np.sqrt(a**2 * deviation**2 + s**2)  # the flow of a Gaussian
        found = sample(step_from_denoiser(ideal_network(deviation, 0.0)), table, first, seeded_noise([0], (48,)))
        return float(np.abs(found - exact).max())

    errors = [error(steps) for steps in (10, 20, 40)]
    assert errors[0] > errors[1] > errors[2]
    assert low < math.log2(errors[0] / errors[2]) / 2 < high, errors


@pytest.mark.parametrize(("order", "steps"), [(1, 600), (2, 150)])
def test_sde_dpmpp_keeps_the_marginal_variance(order: int, steps: int):
    """Of Gaussian data with the ideal network: the distribution is the data's, and on the way that of the process."""
    deviation, elements = 0.2, 20_000
    table = sde_dpmpp_table(SCHEDULE, steps, order=order)
    source = seeded_noise([3], (elements,))
    seen = []
    found = sample(
        step_from_denoiser(ideal_network(np.full((1, elements), deviation), 0.0)),
        table,
        source(START),
        source,
        on_step=lambda i, latent, history: seen.append(latent.std()),
    )
    times = table.timesteps[1:]
    expected = np.sqrt(SIGNAL[times] ** 2 * deviation**2 + NOISE[times] ** 2)
    np.testing.assert_allclose(seen[:-1], expected, rtol=0.03)
    assert abs(found.mean()) < 0.03 * deviation
    assert found.std() == pytest.approx(deviation, rel=0.03)
    flat = np.sort(found.ravel()) / deviation
    for share, quantile in ((0.025, -1.96), (0.25, -0.674), (0.75, 0.674), (0.975, 1.96)):
        assert flat[int(share * elements)] == pytest.approx(quantile, abs=0.1)


@pytest.mark.parametrize("deviation", [0.02, 0.1])
@pytest.mark.parametrize("mode", [0.0, 0.4])
def test_quadratic_times_beat_even_ones(monkeypatch: pytest.MonkeyPatch, deviation: float, mode: float):
    network = ideal_network(np.full((1, 400), deviation), mode)
    first = np.random.default_rng(2).standard_normal((1, 400), dtype=np.float32)

    def final(table: SamplerTable) -> np.ndarray:
        return sample(step_from_denoiser(network), table, first, ())

    fine = final(dpmpp_2m_table(SCHEDULE, 900))
    quadratic = [final(make(SCHEDULE, 10)) for make in (dpmpp_2m_table, unipc_table)]
    even = np.linspace(0, 995, 11).round()[:0:-1].astype(np.int64)
    monkeypatch.setattr("lfdm_export.sampling.solvers._solver_times", lambda schedule, steps: even)
    for mine, make in zip(quadratic, (dpmpp_2m_table, unipc_table), strict=True):
        others = final(make(SCHEDULE, 10))
        assert np.square(mine - fine).mean() < 0.5**2 * np.square(others - fine).mean()


@pytest.mark.parametrize("name", ["dpm++2m", "unipc"])
def test_solvers_end_at_x0_whatever_the_length(name: str):
    for training_steps, most in ((2, 1), (20, 18), (1000, 995)):
        schedule = cosine_schedule(training_steps)
        for steps in {1, 2, 3, most // 2, most - 1, most} & set(range(1, most + 1)):
            table = sampler_table(name, schedule, steps)
            assert len(table.timesteps) == steps == table.steps
            assert (np.diff(table.timesteps) < 0).all()
            assert table.timesteps[-1] > 0
            assert np.isfinite(table.coefficients).all()
            assert not table.draws_noise.any()
            assert table.coefficients[-1, 2:8].tolist() == [0, 1, 0, 0, 0, 0]
        with pytest.raises(InputError, match=f"found {most + 1}, expected 1 to {most} for sampler '{re_name(name)}'"):
            sampler_table(name, schedule, most + 1)


def re_name(name: str) -> str:
    return name.replace("+", r"\+")


def test_tables_are_made_from_the_schedule_they_are_given():
    own = {name: values * np.float32(0.9) for name, values in SCHEDULE.buffers().items()}
    other = Schedule.from_buffers(own)
    for name in SAMPLERS:
        mine, theirs = sampler_table(name, SCHEDULE), sampler_table(name, other)
        assert (mine.coefficients[:, :2] != theirs.coefficients[:, :2]).all(), name
        assert (mine.coefficients[:-1, 2:] != theirs.coefficients[:-1, 2:]).any(), name


def test_every_sampler_has_defaults_that_work():
    assert list(SAMPLERS) == ["ddpm", "ddim", "dpm++2m", "unipc", "sde-dpm++1", "sde-dpm++2m"]
    for name, info in SAMPLERS.items():
        for training_steps in (3, 20, 1000):
            table = sampler_table(name, cosine_schedule(training_steps))
            assert table.name == name
            wanted = info.default_steps or training_steps
            assert table.steps == wanted or (wanted > table.steps >= training_steps - 2)
            assert table.timesteps.dtype == np.int64
            assert table.coefficients.dtype == np.float32
            assert table.coefficients.shape == (table.steps, 11)
            assert table.draws_noise.shape == (table.steps,)
    np.testing.assert_array_equal(
        sampler_table("ddim", SCHEDULE).coefficients, sampler_table("ddim", SCHEDULE, 10, 1.0).coefficients
    )
    assert sampler_table("ddpm", SCHEDULE, 1000).draws_noise.all()


@pytest.mark.parametrize(
    ("name", "steps", "eta", "message"),
    [
        ("euler", 10, None, "sampler: found 'euler', expected one of ddpm, ddim, dpm.*unipc, sde"),
        ("ddpm", 10, None, "steps: found 10, but 'ddpm' runs all 1000"),
        ("ddim", 1000, None, "steps: found 1000, expected 1 to 999"),
        ("ddim", 0, None, "steps: found 0, expected 1 to 999"),
        ("unipc", -3, None, "steps: found -3, expected 1 to 995"),
        ("ddim", 10.5, None, "steps: found 10.5, expected an integer"),
        ("dpm++2m", "10", None, "steps: found '10', expected an integer"),
        ("unipc", True, None, "steps: found True, expected an integer"),
        ("ddim", 10, -0.1, "eta: found -0.1, expected 0 to 1"),
        ("ddim", 10, 1.5, "eta: found 1.5, expected 0 to 1"),
        ("sde-dpm++2m", 10, 1.5, "eta: found 1.5, expected 0 to 1"),
        ("ddim", 10, math.nan, "eta: found nan, expected 0 to 1"),
        ("unipc", 10, 0.0, "eta: found 0.0, but sampler 'unipc' has no eta; leave it out or choose one of ddim, sde"),
        ("ddpm", None, 1.0, "eta: found 1.0, but sampler 'ddpm' has no eta"),
    ],
)
def test_what_cannot_be_had_is_refused(name: str, steps: int, eta: float, message: str):
    with pytest.raises(InputError, match=message):
        sampler_table(name, SCHEDULE, steps, eta)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "unipc"])
def test_a_schedule_of_one_step_is_left_to_ddpm(name: str):
    with pytest.raises(InputError, match=r"found 1 training steps, too few.*choose 'ddpm'"):
        sampler_table(name, cosine_schedule(1))
    assert sampler_table("ddpm", cosine_schedule(1)).steps == 1
