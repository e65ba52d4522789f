"""Order, deadlines and cancellation of the sampler, step by step, on a clock that is set by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lfdm_export.batching.device_rows import DeviceRows
from lfdm_export.batching.jobs import Callbacks, DeadlineExceededError, SampleJob
from lfdm_export.batching.live_job import LiveJob
from lfdm_export.batching.noise_ahead import NoiseAhead
from lfdm_export.batching.observer import Tick
from lfdm_export.batching.order import PRIORITY_SECONDS, STRETCH, DueFirst, Policy
from lfdm_export.batching.rows import Rows
from lfdm_export.batching.seating import Seating
from lfdm_export.batching.step_loop import StepLoop
from lfdm_export.engines.device_chain import DeviceChain
from lfdm_export.errors import EngineError
from lfdm_export.protocol.contract import RequestCancelledError
from tests.fake_bundle import GEOMETRY, NULL
from tests.sampler_fakes import SHAPE, Answers, Clock, Events, NumpyStages, expected_latent, make_job


class Sampler:
    """A loop whose steps the test takes, each lasting one second; `pace` is what it believes a step lasts."""

    def __init__(
        self,
        *,
        slots: int = 1,
        policy: Policy | None = None,
        fixed_batch: bool = False,
        pace: float = 0.0,
        chain: DeviceChain[Any] | None = None,
    ):
        self.stages, self.clock, self.answers, self.events = NumpyStages(), Clock(), Answers(), Events()
        noise = NoiseAhead(SHAPE)
        rows: list[Seating] = [
            Rows(self.stages, stage, GEOMETRY, NULL, slots, noise, guided=guided, fixed_batch=fixed_batch)
            if chain is None
            else DeviceRows(chain, stage, NULL, slots, fixed_batch=fixed_batch)
            for stage, guided in (("step", False), ("step_guided", True))
        ]
        self.loop = StepLoop(
            *rows,
            slots=slots,
            policy=policy or DueFirst(),
            deliver=lambda callback, last: callback(),
            observer=self.events,
            clock=self.clock,
        )
        self.pace = pace
        self.loop.pace = {False: pace, True: pace}
        self.jobs: dict[Any, LiveJob] = {}

    def submit(self, name: Any, job: SampleJob, **extra) -> LiveJob:
        answers = self.answers
        callbacks = Callbacks(
            answers.on_done(name), answers.on_error(name), answers.on_preview(name), answers.on_progress(name), **extra
        )
        live = LiveJob(job, callbacks, len(self.jobs), self.clock.now, self.loop.counts.ticks)
        self.jobs[name] = live
        self.loop.live.append(live)
        return live

    def tick(self, count: int = 1) -> None:
        for _ in range(count):
            self.loop.step()
            self.loop.pace = {False: self.pace, True: self.pace}
            self.clock.now += 1

    def run(self, most: int = 10_000) -> list[Any]:
        """Until nobody is left; who ended, in order."""
        for _ in range(most):
            if not self.loop.live:
                return self.answers.order
            self.tick()
        raise AssertionError(f"still there after {most} steps: {len(self.loop.live)} jobs")


def test_a_job_joins_at_the_next_step_and_leaves_at_its_own_last():
    sampler = Sampler(slots=2)
    sampler.submit("long", make_job(1, steps=5))
    sampler.tick(2)
    sampler.submit("short", make_job(2, steps=2))
    sampler.tick(2)
    assert sampler.stages.runs == [("step", 1)] * 2 + [("step", 2)] * 2
    assert sampler.answers.order == ["short"]
    sampler.submit("next", make_job(3, steps=1))
    sampler.tick()
    assert sampler.stages.runs[-1] == ("step", 2)
    assert sampler.answers.order == ["short", "long", "next"]
    # Nobody waited for anything but the step that was running.
    assert [ticks for _, ticks in sampler.events.joins] == [0, 0, 0]


def test_who_finishes_makes_room_at_once_and_rows_stay_with_their_jobs():
    sampler = Sampler(slots=3)
    jobs = {seed: make_job(seed, steps=1 + seed * 5 % 7, sampler=("ddim", "unipc")[seed % 2]) for seed in range(12)}
    for seed, job in jobs.items():
        sampler.submit(seed, job)
    sampler.run()
    total = sum(job.table.steps for job in jobs.values())
    rows = [count for _, count in sampler.stages.runs]
    assert sum(rows) == total
    assert all(count == 3 for count in rows[: total // 3 - 7])
    for seed, job in jobs.items():
        np.testing.assert_array_equal(sampler.answers.done[seed].latent, expected_latent(job))


def test_without_a_known_pace_the_order_is_that_of_arrival():
    sampler = Sampler()
    for name, steps in (("first", 9), ("second", 1), ("third", 4)):
        sampler.submit(name, make_job(steps=steps))
        sampler.clock.now += 0.1
    assert sampler.run() == ["first", "second", "third"]


def test_a_higher_priority_goes_first_and_pauses_who_runs():
    sampler = Sampler()
    slow = make_job(1, steps=6, sampler="unipc")
    sampler.submit("slow", slow)
    sampler.tick(2)
    urgent = make_job(2, steps=3, priority=1)
    sampler.submit("urgent", urgent)
    sampler.tick(3)
    assert sampler.answers.order == ["urgent"]
    assert sampler.jobs["slow"].step == 2
    sampler.tick(4)
    assert sampler.answers.order == ["urgent", "slow"]
    # A pause leaves no trace in the sample.
    np.testing.assert_array_equal(sampler.answers.done["slow"].latent, expected_latent(slow))
    assert sampler.answers.done["slow"].timings.sampling == 8  # on the clock that stands still within a step


def test_a_short_job_passes_a_long_one():
    sampler = Sampler(pace=1.0)
    sampler.submit("long", make_job(steps=18))
    sampler.tick(2)
    sampler.submit("short", make_job(steps=2))
    assert sampler.run() == ["short", "long"]


def test_a_job_is_not_passed_by_those_submitted_after_it_was_due():
    sampler = Sampler(pace=1.0)
    sampler.submit("long", make_job(steps=10))
    submitted = sampler.clock.now
    short = 0
    while "long" not in sampler.answers.order:
        sampler.submit(short, make_job(steps=1))  # as many as the slot can take: an endless stream
        short += 1
        sampler.tick()
        assert short < 1000
    passed = sampler.clock.now - submitted - 10
    assert passed == STRETCH * 10 - STRETCH * 1


def test_a_low_priority_waits_no_longer_than_its_levels_are_worth():
    sampler = Sampler(pace=0.001)
    sampler.submit("low", make_job(steps=3, priority=-1))
    submitted, high = sampler.clock.now, 0
    while "low" not in sampler.answers.order:
        sampler.submit(high, make_job(steps=1, priority=1))
        high += 1
        sampler.tick()
        assert high < 1000
    assert sampler.clock.now - submitted == pytest.approx(2 * PRIORITY_SECONDS + 3, abs=2)


def test_earlier_deadlines_go_first_and_none_means_some_times_the_own_work():
    sampler = Sampler(pace=1.0)
    sampler.tick()
    for name, deadline in (("none", None), ("late", 9), ("soon", 6), ("later", 17)):
        sampler.submit(name, make_job(steps=4, deadline=deadline and sampler.clock.now + deadline))
    assert sampler.run() == ["soon", "late", "none", "later"]


def test_a_deadline_ends_a_job_that_waits_and_one_that_runs():
    sampler = Sampler()
    sampler.submit("runs", make_job(steps=9, deadline=sampler.clock.now + 3))
    sampler.submit("waits", make_job(steps=9, deadline=sampler.clock.now + 4))
    sampler.tick(4)
    assert sampler.answers.order == ["runs"]
    sampler.tick()
    assert sampler.answers.order == ["runs", "waits"]
    for name, steps in (("runs", 3), ("waits", 1)):
        error = sampler.answers.errors[name]
        assert isinstance(error, DeadlineExceededError)
        assert str(error).startswith(f"deadline exceeded: {steps} of 9 steps were done;")
    assert not sampler.loop.live
    assert [outcome for outcome, _ in sampler.events.ends] == ["expired", "expired"]


def test_a_deadline_that_cannot_be_met_any_more_costs_no_step():
    sampler = Sampler(pace=1.0)
    sampler.submit("first", make_job(steps=1))
    sampler.tick()
    sampler.submit("hopeless", make_job(steps=5, deadline=sampler.clock.now + 4))
    sampler.submit("just", make_job(steps=5, deadline=sampler.clock.now + 5))
    sampler.tick()
    assert "hopeless" in sampler.answers.errors
    assert str(sampler.answers.errors["hopeless"]) == (
        "deadline exceeded: found 4 s left for 5 of 5 steps, expected 5 s at least; allow more time, or use fewer steps"
    )
    assert sampler.run() == ["first", "hopeless", "just"]
    assert "just" in sampler.answers.done


@pytest.mark.parametrize("way", ["ticket", "polled"])
def test_cancellation_is_honored_before_the_next_step(way: str):
    sampler = Sampler(slots=2)
    cancelled = set()
    for name in ("a", "b", "c"):
        extra = {"is_cancelled": lambda name=name: name in cancelled} if way == "polled" else {}
        sampler.submit(name, make_job(steps=6), **extra)
    sampler.tick(2)
    for name in ("a", "c"):  # one that runs, one that waits
        cancelled.add(name)
        if way == "ticket":
            sampler.jobs[name].cancel_requested = True
    before = len(sampler.stages.runs)
    sampler.tick()
    assert sorted(sampler.answers.errors) == ["a", "c"]
    assert all(isinstance(error, RequestCancelledError) for error in sampler.answers.errors.values())
    assert sampler.stages.runs[before:] == [("step", 1)]
    assert sampler.jobs["a"].step == 2
    sampler.run()
    np.testing.assert_array_equal(sampler.answers.done["b"].latent, expected_latent(make_job(steps=6)))


def test_who_cannot_tell_whether_it_was_cancelled_fails_alone():
    sampler = Sampler(slots=2)

    def broken() -> bool:
        raise OSError("gone")

    sampler.submit("broken", make_job(), is_cancelled=broken)
    sampler.submit("fine", make_job())
    sampler.run()
    assert isinstance(sampler.answers.errors["broken"], OSError)
    assert "fine" in sampler.answers.done


def test_guided_jobs_run_through_their_own_stage():
    sampler = Sampler(slots=4)
    jobs = {scale: make_job(7, steps=3, guidance_scale=scale) for scale in (0.0, 1.0, 2.5, -1.0)}
    for scale, job in jobs.items():
        sampler.submit(scale, job)
    sampler.run()
    assert sampler.stages.runs == [("step", 2), ("step_guided", 2)] * 3
    for scale, job in jobs.items():
        np.testing.assert_array_equal(sampler.answers.done[scale].latent, expected_latent(job))


def test_previews_are_the_estimates_of_their_steps():
    sampler = Sampler()
    job = make_job(3, sampler="unipc", steps=7, preview_every=2, progress_every=3)
    estimates: dict[int, np.ndarray] = {}
    expected_latent(job, lambda index, _, history: estimates.__setitem__(index + 1, history[:, 1].copy()))
    sampler.submit("it", job)
    sampler.run()
    assert [step for step, _ in sampler.answers.previews["it"]] == [2, 4, 6]
    for step, estimate in sampler.answers.previews["it"]:
        np.testing.assert_array_equal(estimate, estimates[step])
    assert sampler.answers.progress["it"] == [3, 6]


def test_a_failed_step_fails_its_own_run_alone():
    sampler = Sampler(slots=4)

    def fail(stage: str, tensors: tuple[Any, ...]) -> None:
        if stage == "step_guided":
            raise RuntimeError("out of memory")

    for seed in range(2):
        sampler.submit(("guided", seed), make_job(seed, guidance_scale=2.0))
        sampler.submit(("plain", seed), make_job(seed))
    sampler.tick()
    sampler.stages.before = fail
    sampler.tick()
    assert sorted(sampler.answers.errors) == [("guided", 0), ("guided", 1)]
    for error in sampler.answers.errors.values():
        assert isinstance(error, EngineError)
        assert "out of memory" in str(error)
    sampler.stages.before = None
    after = make_job(9, guidance_scale=3.0)
    sampler.submit("after", after)
    sampler.run()
    for name, job in ((("plain", 0), make_job(0)), (("plain", 1), make_job(1)), ("after", after)):
        np.testing.assert_array_equal(sampler.answers.done[name].latent, expected_latent(job))


@pytest.mark.parametrize("fixed_batch", [False, True])
def test_who_makes_a_step_fail_fails_alone(fixed_batch: bool):
    """The others take the step again, with the noise that they had, and do not notice."""
    sampler = Sampler(slots=3, fixed_batch=fixed_batch)
    poison = make_job(1, steps=6)
    poison.context[...] = 77

    def fail(stage: str, tensors: tuple[Any, ...]) -> None:
        if (tensors[1] == 77).any():
            raise RuntimeError("a row that the engine cannot take")

    fine = {"a": make_job(0, steps=6), "c": make_job(2, steps=4)}
    assert all(job.table.draws_noise.any() for job in fine.values())
    sampler.submit("a", fine["a"])
    sampler.tick(2)
    sampler.stages.before = fail
    sampler.submit("poison", poison)
    sampler.submit("c", fine["c"])
    sampler.run()
    assert list(sampler.answers.errors) == ["poison"]
    assert "a row that the engine cannot take" in str(sampler.answers.errors["poison"])
    for name, job in fine.items():
        np.testing.assert_array_equal(sampler.answers.done[name].latent, expected_latent(job))


@pytest.mark.parametrize("fixed_batch", [False, True])
def test_a_job_that_is_not_finite_any_more_fails_alone(fixed_batch: bool):
    sampler = Sampler(slots=3, fixed_batch=fixed_batch)
    bad = make_job(1, steps=6)
    for name, job in (("a", make_job(0, steps=6)), ("bad", bad), ("c", make_job(2, steps=6))):
        sampler.submit(name, job)
    sampler.tick(2)
    bad.context[...] = np.nan  # a mistake of the engine, as it were
    rows = sampler.loop._rows[False]
    assert isinstance(rows, Rows)
    rows._context[rows.jobs.index(sampler.jobs["bad"])] = np.nan
    sampler.tick()
    assert list(sampler.answers.errors) == ["bad"]
    assert "step 3 of 6 gave values that are not finite" in str(sampler.answers.errors["bad"])
    late = make_job(5, steps=2)
    sampler.submit("late", late)
    sampler.run()
    for name, job in (("a", make_job(0, steps=6)), ("c", make_job(2, steps=6)), ("late", late)):
        np.testing.assert_array_equal(sampler.answers.done[name].latent, expected_latent(job))


def test_a_fixed_batch_is_always_full_and_its_empty_rows_stay_zero():
    sampler = Sampler(slots=4, fixed_batch=True)
    seen = []
    sampler.stages.before = lambda stage, tensors: seen.append([array.copy() for array in tensors])
    jobs = {seed: make_job(seed, steps=2 + seed, guidance_scale=(1.0, 2.0)[seed % 2]) for seed in range(6)}
    for seed, job in jobs.items():
        sampler.submit(seed, job)
    sampler.run()
    assert {count for _, count in sampler.stages.runs} == {4}
    last = seen[-1]
    assert any(np.any(array[0] != 0) for array in last)
    for array in last:
        assert not np.any(array[1:])
    for seed, job in jobs.items():
        np.testing.assert_array_equal(sampler.answers.done[seed].latent, expected_latent(job))


def test_the_observer_hears_of_everything():
    sampler = Sampler(slots=2)
    for seed in range(3):
        sampler.submit(seed, make_job(seed, steps=2))
    sampler.run()
    assert [(tick.running, tick.waiting, tick.slots) for tick in sampler.events.ticks] == [
        (2, 1, 2), (2, 1, 2), (1, 0, 2), (1, 0, 2)
    ]  # fmt: skip
    assert sampler.events.joins == [(0.0, 0), (0.0, 0), (2.0, 2)]
    assert [(outcome, timings.queued, timings.steps) for outcome, timings in sampler.events.ends] == [
        ("finished", 0.0, 2), ("finished", 0.0, 2), ("finished", 2.0, 2)
    ]  # fmt: skip
    counts = sampler.loop.counts
    assert (counts.ticks, counts.steps, counts.finished, counts.running) == (4, 6, 3, 0)


def test_an_observer_that_fails_stops_nothing(caplog: pytest.LogCaptureFixture):
    sampler = Sampler()

    class Broken(Events):
        def ticked(self, tick: Tick) -> None:
            raise ValueError("no such metric")

    sampler.loop._observer = Broken()
    sampler.submit("it", make_job())
    sampler.run()
    assert "it" in sampler.answers.done
    assert "the observer failed" in caplog.text
