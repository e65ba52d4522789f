"""The noise schedule against the released buffers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from lfdm_models.schedule import Schedule, cosine_schedule


@pytest.mark.parametrize("name", ["mug128", "natops128"])
def test_cosine_schedule_has_the_released_bits(shared_dir: Path, name: str):
    released = np.load(shared_dir / "golden" / f"constants_{name}.npz")
    for key, values in cosine_schedule(1000).buffers().items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, released[key], err_msg=key)


@pytest.mark.parametrize("steps", [1, 2, 20, 1000])
def test_any_length_is_a_schedule(steps: int):
    schedule = cosine_schedule(steps)
    assert schedule.steps == steps
    assert schedule.alphas_cumprod_prev[0] == 1
    assert schedule.posterior_variance[0] == 0
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert schedule.betas.max() <= np.float32(0.9999)


def test_a_schedule_comes_back_from_its_buffers():
    schedule = cosine_schedule(20)
    again = Schedule.from_buffers({"denoise_fn.other": np.zeros(3, np.float32), **schedule.buffers()})
    assert list(again.buffers()) == [field.name for field in dataclasses.fields(Schedule)]
    for key, values in again.buffers().items():
        np.testing.assert_array_equal(values, schedule.buffers()[key])


def test_bad_schedules_are_refused():
    good = cosine_schedule(20)
    with pytest.raises(ValueError, match="1 step or more, not 0"):
        cosine_schedule(0)
    with pytest.raises(ValueError, match="missing: posterior_mean_coef2"):
        Schedule.from_buffers({k: v for k, v in good.buffers().items() if k != "posterior_mean_coef2"})
    with pytest.raises(ValueError, match=r"'alphas_cumprod' is float32 \(19,\).*\(20,\)"):
        dataclasses.replace(good, alphas_cumprod=good.alphas_cumprod[1:])
    with pytest.raises(ValueError, match="'posterior_variance' is float64"):
        dataclasses.replace(good, posterior_variance=good.posterior_variance.astype(np.float64))
    with pytest.raises(ValueError, match="'sqrt_alphas_cumprod' holds values that are not finite"):
        dataclasses.replace(good, sqrt_alphas_cumprod=np.full(20, np.nan, np.float32))
    with pytest.raises(ValueError, match="'betas' must be a vector"):
        dataclasses.replace(good, betas=np.zeros((2, 10), np.float32))
