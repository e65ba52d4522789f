"""One sampling step, its quantile, and the loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lfdm_export.errors import InputError
from lfdm_export.sampling.loop import apply_step, quantile_0_9, sample, step_from_denoiser, threshold
from lfdm_export.sampling.noise import START, noise_for, seeded_noise
from lfdm_export.sampling.solvers import unipc_table
from lfdm_export.sampling.tables import SAMPLERS, ddim_table, ddpm_table, sampler_table
from lfdm_models.schedule import cosine_schedule

SHAPE = (2, 3, 4, 2, 2)


def network(latent: np.ndarray, timestep: np.ndarray) -> np.ndarray:
    """Elementwise operations that IEEE 754 rounds correctly: the same bits on every processor, at any place."""
    time = timestep.reshape(-1, *[1] * (latent.ndim - 1)).astype(np.float32) * np.float32(0.16)
    phase = np.roll(latent, 1, axis=-1) * np.float32(0.5) + time
    return np.float32(0.8) * latent + np.float32(4) * np.abs(phase - np.rint(phase)) - np.float32(1)


def stream(seed: int, shape: tuple[int, ...] = SHAPE) -> Iterator[np.ndarray]:
    """The stream of the golden cases."""
    rng = np.random.default_rng(seed)
    while True:
        yield rng.standard_normal(shape, dtype=np.float32)


def lerp(values: np.ndarray, *, fused: bool) -> np.ndarray:
    """The 0.9 quantile stated plainly: sort, then interpolate with or without fused multiply-add."""
    ordered = np.sort(values, axis=1)
    rank = np.float32(0.9) * np.float32(values.shape[1] - 1)
    weight = np.float32(rank % 1)
    a, b = ordered[:, int(rank)], ordered[:, int(np.ceil(rank))]
    base, factor = (a, weight) if weight < 0.5 else (b, weight - np.float32(1))
    if fused:
        return (base.astype(np.float64) + np.float64(factor) * (b - a).astype(np.float64)).astype(np.float32)
    return base + factor * (b - a)


DISTRIBUTIONS = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "constant": lambda rng, shape: np.full(shape, 0.3),
    "zeros": lambda rng, shape: np.zeros(shape),
    "ties": lambda rng, shape: rng.integers(0, 4, shape),
    "nearly all zeros": lambda rng, shape: rng.random(shape) * (rng.random(shape) > 0.905),
    "cauchy": lambda rng, shape: rng.standard_cauchy(shape),
    "e^(8N)": lambda rng, shape: np.exp(8 * rng.standard_normal(shape)),
    "denormal": lambda rng, shape: rng.standard_normal(shape) * 1e-41,
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("elements", [3 * 40 * 32 * 32, 3 * 8 * 16 * 16])
def test_quantile_of_a_latent_has_the_bits_of_torch(name: str, elements: int):
    values = np.abs(DISTRIBUTIONS[name](np.random.default_rng(4), (3, elements))).astype(np.float32)
    expected = torch.quantile(torch.from_numpy(values), 0.9, dim=1).numpy()
    np.testing.assert_array_equal(quantile_0_9(values), expected)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_quantile_of_any_number_of_elements(name: str):
    rng = np.random.default_rng(5)
    weights = set()
    for elements in [*range(1, 130), 1000, 1001, 4097]:
        values = np.abs(DISTRIBUTIONS[name](rng, (4, elements))).astype(np.float32)
        found = quantile_0_9(values)
        np.testing.assert_array_equal(found, lerp(values, fused=False))
        # torch itself gives one or the other, as the processor has fused multiply-add or not.
        theirs = torch.quantile(torch.from_numpy(values), 0.9, dim=1).numpy()
        assert ((theirs == found) | (theirs == lerp(values, fused=True))).all(), elements
        weights.add(round(0.9 * (elements - 1) % 1, 1))
    assert min(weights) == 0
    assert max(weights) == 0.9


def test_threshold_clamps_each_sample_to_its_own_quantile():
    small = np.linspace(-0.9, 0.9, 12, dtype=np.float32).reshape(3, 4)
    x0 = np.stack([small, small * 100, np.ones_like(small), np.zeros_like(small)])
    found = threshold(x0)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[0], small)
    limit = torch.quantile(torch.from_numpy(x0[1]).abs(), 0.9).numpy()
    np.testing.assert_array_equal(found[1], np.clip(x0[1], -limit, limit) / limit)
    assert np.abs(found[1]).max() == 1
    np.testing.assert_array_equal(found[2:], x0[2:])


@pytest.mark.parametrize("name", ["mug128", "natops128"])
def test_last_ddpm_step_of_the_golden_network(shared_dir: Path, name: str):
    cases = np.load(shared_dir / "golden" / f"cases_{name}.npz")
    latent = next(stream(7, (1, 3, 40, 32, 32)))
    noise = next(stream(14, latent.shape))
    row = ddpm_table(cosine_schedule(1000)).coefficients[-1:]
    history = np.zeros((1, 2, *latent.shape[1:]), np.float32)
    found, _ = apply_step(latent, cases["unet_t0_scale1"], history, noise, row)
    np.testing.assert_allclose(found, cases["ddpm_step_t0"], rtol=0, atol=1e-6)


def test_step_is_the_documented_arithmetic_for_each_sample():
    rng = np.random.default_rng(6)
    latent, predicted, noise = rng.standard_normal((3, *SHAPE), dtype=np.float32)
    history = rng.standard_normal((2, 2, *SHAPE[1:]), dtype=np.float32)
    c = rng.standard_normal((2, 11), dtype=np.float32)
    c[1, :2] *= 0.1  # one sample over the threshold, one below
    next_latent, next_history = apply_step(latent, predicted, history, noise, c)
    assert next_latent.dtype == next_history.dtype == np.float32
    for b in range(2):
        k, (carry, previous) = c[b].astype(np.float64), history[b].astype(np.float64)
        raw = k[0] * latent[b] + k[1] * predicted[b]
        q = max(np.quantile(np.abs(raw), 0.9), 1.0)
        x0 = np.clip(raw, -q, q) / q
        assert (q > 1) == (b == 0)
        expected = k[2] * latent[b] + k[3] * x0 + k[4] * predicted[b] + k[5] * carry + k[6] * previous + k[7] * noise[b]
        np.testing.assert_allclose(next_latent[b], expected, rtol=0, atol=2e-6)
        np.testing.assert_allclose(next_history[b, 0], k[8] * carry + k[9] * x0 + k[10] * previous, rtol=0, atol=2e-6)
        np.testing.assert_allclose(next_history[b, 1], x0, rtol=0, atol=2e-6)


def test_a_whole_ddpm_chain_of_twenty_steps():
    schedule, draws = cosine_schedule(20), stream(13)
    latent = next(draws)
    for t in reversed(range(20)):
        noise = next(draws)
        predicted = network(latent, np.full(2, t))
        x0 = schedule.sqrt_recip_alphas_cumprod[t] * latent - schedule.sqrt_recipm1_alphas_cumprod[t] * predicted
        q = torch.quantile(torch.from_numpy(x0).abs().reshape(2, -1), 0.9, dim=1).clamp(min=1).numpy()
        x0 = np.clip(x0, -q.reshape(2, 1, 1, 1, 1), q.reshape(2, 1, 1, 1, 1)) / q.reshape(2, 1, 1, 1, 1)
        latent = schedule.posterior_mean_coef1[t] * x0 + schedule.posterior_mean_coef2[t] * latent
        if t > 0:
            latent = latent + np.exp(0.5 * schedule.posterior_log_variance_clipped[t]) * noise
    mine = stream(13)
    found = sample(step_from_denoiser(network), ddpm_table(schedule), next(mine), mine)
    np.testing.assert_allclose(found, latent, rtol=0, atol=2e-5)
    # Both took 21 draws.
    np.testing.assert_array_equal(next(mine), next(draws))


@pytest.mark.parametrize(
    ("name", "draws"), [("ddpm", 20), ("ddim", 9), ("dpm++2m", 0), ("unipc", 0), ("sde-dpm++2m", 9)]
)
def test_draws_are_taken_only_where_the_table_says(name: str, draws: int):
    table = sampler_table(name, cosine_schedule(20))
    asked, given = [], []

    def source(step: int) -> np.ndarray:
        asked.append(step)
        return noise_for([1, 2], step, SHAPE[1:])

    def step(noisy_latent, timestep, history, noise, coefficients):
        given.append(noise.any())
        assert timestep.dtype == np.int64
        assert timestep.shape == (2,)
        assert coefficients.shape == (2, 11)
        assert history.shape == (2, 2, *SHAPE[1:])
        return apply_step(noisy_latent, network(noisy_latent, timestep), history, noise, coefficients)

    sample(step, table, source(START), source)
    assert asked == [START, *np.flatnonzero(table.draws_noise)]
    assert len(asked) == draws + 1
    assert given == table.draws_noise.tolist()


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(name: str):
    table, step = sampler_table(name, cosine_schedule(20)), step_from_denoiser(network)

    def chain(seeds: list[int]) -> np.ndarray:
        source = seeded_noise(seeds, SHAPE[1:])
        return sample(step, table, source(START), source)

    together = chain([5, 6, 7])
    assert np.isfinite(together).all()
    for row, seed in enumerate([5, 6, 7]):
        np.testing.assert_array_equal(chain([seed])[0], together[row])


def test_on_step_sees_every_step_and_the_input_is_left_alone():
    table, draws = unipc_table(cosine_schedule(20), 5), stream(1)
    start = next(draws)
    before, seen = start.copy(), []
    found = sample(
        step_from_denoiser(network),
        table,
        start,
        draws,
        on_step=lambda i, latent, history: seen.append((i, latent, history)),
    )
    assert [i for i, _, _ in seen] == list(range(5))
    np.testing.assert_array_equal(seen[-1][1], found)
    np.testing.assert_array_equal(seen[-1][2][:, 1], found)  # the last step returns x0
    # What the third step is given as its carry is the x0 estimate of the first.
    np.testing.assert_array_equal(seen[1][2][:, 0], seen[0][2][:, 1])
    np.testing.assert_array_equal(start, before)


def test_noise_that_runs_out_or_does_not_fit_is_refused():
    table, step = ddim_table(cosine_schedule(20), 5), step_from_denoiser(network)
    good = list(zip(range(5), stream(2), strict=False))
    draws = [draw for _, draw in good]
    sample(step, table, draws[0], iter(draws[1:]))
    with pytest.raises(InputError, match="ended before the noise of step 3"):
        sample(step, table, draws[0], iter(draws[1:-1]))
    with pytest.raises(InputError, match=r"noise of step 1 is float32 \(1, 3, 4, 2, 2\), expected float32 \(2, 3,"):
        sample(step, table, draws[0], iter([draws[1], draws[2][:1]]))
    with pytest.raises(InputError, match=r"start: found float64 \(2, 3, 4, 2, 2\), expected float32"):
        sample(step, table, draws[0].astype(np.float64), iter(draws[1:]))
