"""Noise: the recipe of seeded draws, and what is asked of draws that the caller hands in."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lfdm_export.errors import InputError
from lfdm_export.sampling.noise import START, handed_noise, noise_for, seeded_noise

MASK = 2**64 - 1


def philox4x64_10(counter: list[int], key: list[int]) -> list[int]:
    """The published cipher in plain integers."""
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [
            (second >> 64) ^ counter[1] ^ key[0],
            second & MASK,
            (first >> 64) ^ counter[3] ^ key[1],
            first & MASK,
        ]
        key = [(key[0] + 0x9E3779B97F4A7C15) & MASK, (key[1] + 0xBB67AE8584CAA73B) & MASK]
    return counter


def recipe(seed: int, step: int, elements: int) -> list[float]:
    """The docstring of `noise_for`, read word by word."""
    values = []
    for block in range((elements + 3) // 4):
        words = philox4x64_10([block + 1, 0, step + 1, 0], [seed, 0])
        u = [((word >> 12) + 0.5) * 2.0**-52 for word in words]
        for first, second in ((u[0], u[1]), (u[2], u[3])):
            radius, angle = math.sqrt(-2 * math.log(first)), 2 * math.pi * second
            values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values[:elements]


@pytest.mark.parametrize("seed", [0, 1, 12345678901234567890, MASK])
@pytest.mark.parametrize("step", [START, 0, 999])
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 2, 4), (2, 0)])
def test_noise_is_the_documented_recipe(seed: int, step: int, shape: tuple[int, ...]):
    noise = noise_for([seed], step, shape)
    assert noise.dtype == np.float32
    assert noise.shape == (1, *shape)
    expected = np.array(recipe(seed, step, math.prod(shape)), np.float32).reshape(1, *shape)
    np.testing.assert_array_max_ulp(noise, expected, maxulp=1)


def test_first_values_stay_what_they_are():
    # A change here changes every clip that a seed has ever given.
    np.testing.assert_allclose(
        noise_for([0, 2**64 - 1], START, (4,)),
        [[0.15853384, 2.9828794, -1.925692, -0.82492554], [-0.3471275, -1.6662351, -0.28147596, -1.3031626]],
        rtol=2e-7,
        atol=0,
    )
    np.testing.assert_allclose(
        noise_for([0], 0, (4,)), [[0.8649486, 0.36483634, -1.0867525, 1.7476021]], rtol=2e-7, atol=0
    )


def test_noise_depends_on_seed_and_step_alone():
    shape = (3, 2, 4, 4)
    batch = noise_for([7, 3, 7, 11], 5, shape)
    np.testing.assert_array_equal(batch[0], batch[2])
    for row, seed in enumerate([7, 3, 7, 11]):
        np.testing.assert_array_equal(batch[row], noise_for([seed], 5, shape)[0])
    source = seeded_noise([np.int64(3), 11], shape)  # type: ignore[list-item]
    source(9)  # earlier calls do not matter
    np.testing.assert_array_equal(source(5), batch[[1, 3]])
    np.testing.assert_array_equal(batch.reshape(4, -1), noise_for([7, 3, 7, 11], 5, (96,)))


def test_noise_is_standard_normal_and_independent():
    count = 200_000
    draws = np.concatenate([noise_for([0, 1, 2**63], step, (count,)) for step in (START, 0, 1)]).astype(np.float64)
    error = 5 / math.sqrt(count)
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96)}  # mean and variance of z^k
    for power, (mean, variance) in moments.items():
        np.testing.assert_allclose((draws**power).mean(axis=1), mean, atol=error * math.sqrt(variance))
    between = draws @ draws.T / count - np.eye(len(draws))
    assert np.abs(between[~np.eye(len(draws), dtype=bool)]).max() < error
    for lag in (1, 2, 3, 4):
        assert np.abs((draws[:, lag:] * draws[:, :-lag]).mean(axis=1)).max() < error
    # Kolmogorov-Smirnov distance of one draw from the normal distribution
    ordered = np.sort(draws[0])
    normal = np.array([0.5 * math.erfc(-z / math.sqrt(2)) for z in ordered[::10]])
    assert np.abs(normal - np.arange(0, count, 10) / count).max() < 2 / math.sqrt(count)


@pytest.mark.parametrize(("seed", "found"), [(-1, "-1"), (2**64, "18446744073709551616"), (1.0, "1.0"), ("7", "'7'")])
def test_bad_seeds_are_refused(seed: int, found: str):
    with pytest.raises(InputError, match=f"seed: found {found}, expected"):
        noise_for([0, seed], 0, (2,))
    with pytest.raises(InputError, match=f"seed: found {found}, expected"):
        seeded_noise([seed], (2,))


def test_handed_draws_come_in_their_order():
    draws = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    source = handed_noise(iter(draws), (2, 2))
    for step, draw in zip((START, 3, 1), draws, strict=True):
        np.testing.assert_array_equal(source(step), draw)
    with pytest.raises(InputError, match="ended before the noise of step 4"):
        source(4)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (np.zeros((1, 2), np.float32), r"draw for the start is float32 \(1, 2\), expected float32 \(2, 2\)"),
        (np.zeros((2, 2)), r"is float64 \(2, 2\), expected float32 \(2, 2\)"),
        ([[0.0, 0.0], [0.0, 0.0]], r"is list, expected float32 \(2, 2\)"),
        (np.full((2, 2), np.nan, np.float32), "not finite"),
    ],
)
def test_draws_that_do_not_fit_are_refused(draw, message: str):
    with pytest.raises(InputError, match=message):
        handed_noise(iter([draw]), (2, 2))(START)
