"""Tables of few steps that were learned."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.errors import InputError
from lfdm_export.sampling.solvers import sde_dpmpp_table
from lfdm_export.sampling.tuned import TunedSampler, TunedSteps
from lfdm_models.schedule import cosine_schedule

SCHEDULE = cosine_schedule(1000)
TWO, THREE = TunedSteps((900, 300), (1.5, 1.0), (0.5,)), TunedSteps((900, 500, 100), (1.5, 1.2, 1.0), (0.5, 0.9))
SAMPLER = TunedSampler("a" * 64, 1.0, (TWO, THREE), "by hand")


def test_without_gains_it_is_ddim_with_noise():
    expected = sde_dpmpp_table(SCHEDULE, 5, order=1)
    times = expected.timesteps
    ratio = SCHEDULE.sqrt_recipm1_alphas_cumprod[times].astype(np.float64)
    fresh = 1 - (ratio[1:] / ratio[:-1]) ** 2  # of eta 1
    found = TunedSteps(tuple(times.tolist()), (1.0,) * 5, tuple(fresh.tolist())).table(SCHEDULE)
    np.testing.assert_array_equal(found.timesteps, times)
    np.testing.assert_array_equal(found.draws_noise, expected.draws_noise)
    np.testing.assert_allclose(found.coefficients, expected.coefficients, rtol=1e-5, atol=1e-7)


def test_a_gain_multiplies_the_estimate():
    plain, raised = (TunedSteps((900, 300), (gain, 1.0), (0.5,)).table(SCHEDULE) for gain in (1.0, 2.0))
    np.testing.assert_allclose(raised.coefficients[0, :2], 2 * plain.coefficients[0, :2], rtol=1e-6)
    np.testing.assert_array_equal(raised.coefficients[:, 2:], plain.coefficients[:, 2:])
    np.testing.assert_array_equal(raised.coefficients[1], plain.coefficients[1])


def test_tables_by_their_number_of_steps():
    assert SAMPLER.table(SCHEDULE).steps == 3
    assert SAMPLER.table(SCHEDULE, 2).timesteps.tolist() == [900, 300]
    with pytest.raises(InputError, match="steps: found 4, but sampler 'tuned' has tables of 2, 3 steps"):
        SAMPLER.table(SCHEDULE, 4)
    with pytest.raises(InputError, match="starts at time 900, but the schedule has 20 training steps"):
        SAMPLER.table(cosine_schedule(20))
    newer = dataclasses.replace(TWO, times=(800, 200))
    assert SAMPLER.with_tables([newer]) == (newer, THREE)


def test_files_keep_it(tmp_path: Path):
    SAMPLER.save(tmp_path / "tuned.json")
    assert TunedSampler.load(tmp_path / "tuned.json") == SAMPLER
    for content in (b"", b"[]", b'{"version": 1}'):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(InputError, match=r"cannot be read: .* make it with lfdm-train schedule"):
            TunedSampler.load(tmp_path / "other.json")
    with pytest.raises(InputError, match="No such file"):
        TunedSampler.load(tmp_path / "none.json")


@pytest.mark.parametrize("other", [None, "b" * 64])
def test_other_weights_are_refused(other: str | None):
    SAMPLER.require_weights("a" * 64)
    with pytest.raises(ValueError, match="tune it for these weights: lfdm-train schedule"):
        SAMPLER.require_weights(other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"times": (300, 900)}, "expected falling ones"),
        ({"times": (900, -1)}, "expected falling ones"),
        ({"times": (900,)}, "expected S of 1 to 20, S and S - 1"),
        ({"gains": (0.0, 1.0)}, "expected above 0"),
        ({"gains": (float("nan"), 1.0)}, "expected above 0"),
        ({"fresh": (1.5,)}, "expected 0 to 1"),
    ],
)
def test_wrong_numbers_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TWO, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "this program knows version 1"),
        ({"tables": ()}, "expected one or more of rising numbers"),
        ({"tables": (THREE, TWO)}, "expected one or more of rising numbers"),
        ({"dm_sha256": "a"}, "not a SHA-256"),
        ({"guidance_scale": float("inf")}, "not finite"),
    ],
)
def test_wrong_samplers_are_refused(change: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SAMPLER, **change)
