"""`SamplingOptions`: what is refused, and what is meant where something is left out."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lfdm_export.client import AsyncClient, Client
from lfdm_export.errors import InputError
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.sampling.noise import check_seeds, draw_seed
from lfdm_export.sampling.options import DEFAULTS, OPTION_NAMES, WHOLE, SamplingOptions, guided_steps
from lfdm_export.sampling.tables import SAMPLERS
from lfdm_models.schedule import cosine_schedule

SCHEDULE = cosine_schedule(1000)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sampler": "euler"}, r"sampler: found 'euler', expected one of ddpm, .*, tuned; choose one of these"),
        ({"sampler": 3}, "sampler: found 3"),
        ({"steps": 0}, "steps: found 0, expected 1 to 100000"),
        ({"steps": 100_001}, "steps: found 100001, expected 1 to 100000"),
        ({"steps": 2.5}, "steps: found 2.5, expected an integer"),
        ({"steps": True}, "steps: found True, expected an integer"),
        ({"eta": -0.1}, "eta: found -0.1, expected 0 to 1"),
        ({"eta": float("nan")}, "eta is nan, expected a finite number"),
        ({"guidance_scale": "much"}, "guidance_scale is 'much', expected a number"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf, expected a finite number"),
        ({"guidance_interval": 0.5}, "guidance_interval is 0.5, expected two numbers"),
        ({"guidance_interval": None}, "guidance_interval is None, expected two numbers"),
        ({"guidance_interval": (0.8, 0.2)}, r"guidance_interval is \(0.8, 0.2\), expected 0 <= low <= high <= 1"),
    ],
)
def test_what_no_model_takes_is_refused_at_once(given: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        SamplingOptions(**given)


def test_numbers_become_plain_ones():
    given: Any = SamplingOptions("ddim", np.int64(4), np.float32(0.5), 2, [0, 1])  # type: ignore[arg-type]
    assert given == SamplingOptions("ddim", 4, 0.5, 2.0, WHOLE)
    assert [type(getattr(given, name)) for name in OPTION_NAMES] == [str, int, float, float]


def test_steps_and_eta_of_the_defaults_are_for_their_own_sampler():
    defaults = SamplingOptions("ddim", 7, 0.25, 2.0)
    assert SamplingOptions().over(defaults) == defaults
    assert SamplingOptions("ddim", eta=0.5).over(defaults) == SamplingOptions("ddim", 7, 0.5, 2.0)
    assert SamplingOptions("unipc", guidance_scale=0).over(defaults) == SamplingOptions("unipc", guidance_scale=0.0)
    assert SamplingOptions("sde-dpm++2m").over(defaults) == SamplingOptions("sde-dpm++2m", None, 1.0, 2.0)
    assert SamplingOptions(guidance_interval=(0.2, 0.8)).over(defaults) == replace(
        defaults, guidance_interval=(0.2, 0.8)
    )


def test_a_table_is_that_of_its_sampler():
    assert SamplingOptions("unipc", 6).table(SCHEDULE).steps == 6
    assert SamplingOptions("unipc").table(SCHEDULE).steps == SAMPLERS["unipc"].default_steps
    for given, message in (
        (SamplingOptions(), "sampler: found None"),
        (SamplingOptions("unipc", eta=0.5), "sampler 'unipc' has no eta"),
        (SamplingOptions("ddim", 1000), "steps: found 1000, expected 1 to 999"),
        (SamplingOptions("tuned"), "this bundle has no tuned sampler"),
    ):
        with pytest.raises(InputError, match=message):
            given.table(SCHEDULE)


def test_what_is_given_are_keywords_of_every_public_method():
    every = SamplingOptions("ddim", 4, 0.5, 2.0, (0.2, 0.8)).given()
    assert SamplingOptions(**every).given() == every
    assert SamplingOptions().given() == {}
    for method in (Pipeline.generate, Pipeline.sample):
        assert every.keys() <= inspect.signature(method).parameters.keys()
    for remote in (Client.generate, Client.stream, AsyncClient.generate, AsyncClient.stream):
        assert set(OPTION_NAMES) <= inspect.signature(remote).parameters.keys()


def test_an_interval_is_written_only_where_there_is_one():
    assert to_plain(DEFAULTS) == {"sampler": "ddim", "steps": 10, "eta": 1.0, "guidance_scale": 1.0}
    assert from_plain(SamplingOptions, to_plain(DEFAULTS), "it") == DEFAULTS
    inside = replace(DEFAULTS, guidance_interval=(0.2, 0.8))
    assert to_plain(inside)["guidance_interval"] == [0.2, 0.8]
    assert from_plain(SamplingOptions, to_plain(inside), "it") == inside
    for changed in ({"steps": 0}, {"sampler": 3}, {"other": 1}):
        with pytest.raises(ValueError, match=str(next(iter(changed)))):
            from_plain(SamplingOptions, {**to_plain(DEFAULTS), **changed}, "it")
    with pytest.raises(ValueError, match="it lacks eta"):
        from_plain(SamplingOptions, {name: None for name in OPTION_NAMES if name != "eta"}, "it")


def test_both_ends_of_an_interval_count():
    np.testing.assert_array_equal(
        guided_steps(np.array([10, 8, 5, 2, 0]), 11, (0.2, 0.8)), [False, True, True, True, False]
    )


def test_drawn_seeds_are_32_bits_and_differ():
    drawn = [draw_seed() for _ in range(100)]
    assert check_seeds(drawn) == tuple(drawn)
    assert max(drawn) < 2**32
    assert len(set(drawn)) > 90
