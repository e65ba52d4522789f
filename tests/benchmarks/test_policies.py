"""The policies that the sampler's own is compared with, on a clock that is set by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.policies import BATCH_DELAY, POLICIES, Dynamic, DynamicShrink, OneClip
from lfdm_export.batching.jobs import DeadlineExceededError
from lfdm_export.batching.order import DueFirst, Policy, find_policy
from tests.batching.test_step_loop import Sampler
from tests.sampler_fakes import expected_latent, make_job


def test_policy_clip_runs_one_clip_after_the_other():
    sampler = Sampler(slots=4, policy=OneClip(), pace=1.0)
    for name, steps, priority in (("first", 6, 0), ("second", 1, 5), ("third", 2, 0)):
        sampler.submit(name, make_job(steps=steps, priority=priority))
    assert sampler.run() == ["first", "second", "third"]
    assert sampler.stages.runs == [("step", 1)] * 9


@pytest.mark.parametrize("policy", [Dynamic(), DynamicShrink()])
def test_whole_clip_policies_form_batches_that_nobody_joins_and_answer_them_together(policy: Policy):
    sampler = Sampler(slots=2, policy=policy)
    jobs = {name: make_job(seed, steps=steps) for seed, (name, steps) in enumerate((("short", 2), ("long", 4)))}
    sampler.submit("short", jobs["short"])
    assert sampler.loop.step() is False  # it waits for company …
    sampler.submit("long", jobs["long"])
    sampler.submit("next", make_job(3, steps=1, deadline=sampler.clock.now + 500))
    sampler.submit("late", make_job(4, steps=1, deadline=sampler.clock.now + 3))
    sampler.tick(3)
    assert sampler.answers.order == []
    sampler.jobs["long"].cancel_requested = True  # too late for a batch that runs
    sampler.tick()
    assert set(sampler.answers.done) == {"short", "long"}
    for name, job in jobs.items():
        np.testing.assert_array_equal(sampler.answers.done[name].latent, expected_latent(job))
        assert sampler.answers.done[name].timings.steps == job.table.steps
    then = 2 if isinstance(policy, Dynamic) else 1
    assert sampler.stages.runs == [("step", 2)] * 2 + [("step", then)] * 2
    assert sampler.answers.done["short"].timings.sampling == sampler.answers.done["long"].timings.sampling
    sampler.clock.now += BATCH_DELAY  # … but not for long
    sampler.tick()
    assert "next" in sampler.answers.done
    assert isinstance(sampler.answers.errors["late"], DeadlineExceededError)
    assert sampler.loop.counts.steps == 7


def test_a_batch_of_whole_clips_that_fails_answers_everybody_once():
    sampler = Sampler(slots=2, policy=Dynamic())
    sampler.submit("done", make_job(1, steps=1))
    sampler.submit("failed", make_job(2, steps=3))
    sampler.tick()

    def fail(stage: str, tensors: tuple[Any, ...]) -> None:
        raise RuntimeError("out of memory")

    sampler.stages.before = fail
    sampler.tick()
    assert sorted(sampler.answers.order) == ["done", "failed"]
    assert list(sampler.answers.errors) == ["failed"]


def test_a_server_finds_them_by_their_names():
    found = [type(find_policy(name)) for name in POLICIES.values()]
    assert found == [DueFirst, OneClip, Dynamic, DynamicShrink]
