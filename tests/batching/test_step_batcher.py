"""The sampler's threads: submitting, callbacks, bounds, draining, closing, dying."""

from __future__ import annotations

import gc
import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from benchmarks.policies import Dynamic
from lfdm_export.batching.jobs import DeadlineExceededError, QueueFullError, Sampled, SampleJob, StoppingError
from lfdm_export.batching.step_batcher import StepBatcher, Ticket
from lfdm_export.errors import EngineError, InputError
from lfdm_export.protocol.contract import RequestCancelledError
from tests.fake_bundle import GEOMETRY, NULL
from tests.sampler_fakes import Answers, Events, NumpyStages, expected_latent, make_job

#: Seconds after which a test has failed; nothing takes that long.
PATIENCE = 120.0


def make_batcher(stages: NumpyStages | None = None, **options) -> StepBatcher:
    return StepBatcher(stages or NumpyStages(), GEOMETRY, NULL, **options)


def submit(batcher: StepBatcher, answers: Answers, name: Any, job: SampleJob, **extra) -> Ticket:
    return batcher.submit(job, on_done=answers.on_done(name), on_error=answers.on_error(name), **extra)


class Gate:
    """Stages whose steps wait until they are let through, one by one or for good."""

    def __init__(self) -> None:
        self.entered, self._tokens = threading.Semaphore(0), threading.Semaphore(0)
        self._open = False
        self.stages = NumpyStages(before=self._wait)

    def _wait(self, stage: str, tensors: tuple[Any, ...]) -> None:
        self.entered.release()
        if not self._open:
            assert self._tokens.acquire(timeout=PATIENCE)

    def wait_for_step(self) -> None:
        """Until a step has begun; it then waits for `let`."""
        assert self.entered.acquire(timeout=PATIENCE)

    def let(self) -> None:
        self._tokens.release()

    def open(self) -> None:
        self._open = True
        self._tokens.release()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


def wait(event: threading.Event) -> None:
    assert event.wait(PATIENCE)


@pytest.mark.parametrize("slots", [1, 3, 8])
def test_samples_are_those_of_the_shared_loop(slots: int):
    jobs = [
        make_job(seed, sampler=sampler, steps=steps, guidance_scale=scale)
        for seed, (sampler, steps, scale) in enumerate(
            [("ddim", 4, 1.0), ("unipc", 7, 2.0), ("ddpm", None, 1.0), ("dpm++2m", 3, 0.0), ("ddim", 1, 0.5)] * 2
        )
    ]
    answers = Answers()
    with make_batcher(slots=slots) as batcher:
        for index, job in enumerate(jobs):
            submit(batcher, answers, index, job)
        assert batcher.drain(PATIENCE)
        stats = batcher.stats()
    for index, job in enumerate(jobs):
        sampled = answers.done[index]
        np.testing.assert_array_equal(sampled.latent, expected_latent(job))
        assert sampled.timings.steps == job.table.steps
    assert (stats.submitted, stats.finished, stats.outstanding, stats.waiting) == (10, 10, 0, 0)
    assert stats.steps == sum(job.table.steps for job in jobs)


def test_callbacks_come_from_one_thread_that_is_not_the_loops():
    answers, loop_threads = Answers(), set()
    stages = NumpyStages(before=lambda stage, tensors: loop_threads.add(threading.current_thread().name))
    with make_batcher(stages) as batcher:
        for seed in range(3):
            submit(batcher, answers, seed, make_job(seed))
        assert batcher.drain(PATIENCE)
    assert len(loop_threads) == len(answers.threads) == 1
    assert not loop_threads & answers.threads
    assert threading.current_thread().name not in answers.threads


def test_a_slow_receiver_holds_up_no_step():
    release, answers = threading.Event(), Answers()
    with make_batcher() as batcher:
        batcher.submit(make_job(0), on_done=lambda sampled: wait(release), on_error=answers.on_error(0))
        submit(batcher, answers, 1, make_job(1))
        wait_until(lambda: batcher.stats().finished == 2)
        assert answers.order == []
        assert batcher.stats().outstanding == 2
        release.set()
        assert batcher.drain(PATIENCE)
    assert answers.order == [1]


def test_a_slow_receiver_of_previews_gets_the_newest():
    release, answers = threading.Event(), Answers()
    seen: list[int] = []

    def on_preview(step: int, estimate: np.ndarray) -> None:
        seen.append(step)
        release.wait(PATIENCE)

    gate = Gate()
    with make_batcher(gate.stages) as batcher:
        submit(batcher, answers, "it", make_job(steps=12, preview_every=1), on_preview=on_preview)
        gate.wait_for_step()
        gate.let()
        wait_until(lambda: seen == [1])  # the first one blocks its receiver; then ten more are made
        for _ in range(10):
            gate.wait_for_step()
            gate.let()
        gate.wait_for_step()
        release.set()
        wait_until(lambda: len(seen) == 2)
        gate.open()
        assert batcher.drain(PATIENCE)
    assert seen[:2] == [1, 11]
    assert answers.order == ["it"]


def test_a_callback_that_fails_is_logged_and_the_next_one_is_called(caplog: pytest.LogCaptureFixture):
    answers = Answers()

    def broken(sampled: Sampled) -> None:
        raise OSError("the client has gone")

    with make_batcher() as batcher:
        batcher.submit(make_job(0), on_done=broken, on_error=answers.on_error(0))
        submit(batcher, answers, 1, make_job(1))
        assert batcher.drain(PATIENCE)
    assert answers.order == [1]
    assert "the client has gone" in caplog.text


def test_a_callback_may_submit_and_cancel():
    answers, tickets = Answers(), []
    with make_batcher() as batcher:

        def again(sampled: Sampled) -> None:
            tickets.append(submit(batcher, answers, "second", make_job(1)))

        batcher.submit(make_job(0), on_done=again, on_error=answers.on_error(0))
        wait_until(lambda: bool(answers.order))
    assert answers.order == ["second"]
    assert tickets[0].ended
    assert tickets[0].cancel() is False


def test_more_jobs_than_the_bound_are_refused_until_there_is_room():
    gate, answers, events = Gate(), Answers(), Events()
    with make_batcher(gate.stages, slots=2, queue_limit=3, observer=events) as batcher:
        tickets = [submit(batcher, answers, seed, make_job(seed)) for seed in range(5)]
        with pytest.raises(QueueFullError, match=r"^queue full: 5 requests"):
            submit(batcher, answers, "refused", make_job())
        assert (batcher.stats().rejected, events.rejections) == (1, 1)
        assert tickets[4].cancel()
        gate.open()
        wait_until(lambda: 4 in answers.errors)
        wait_until(lambda: batcher.stats().outstanding < 5)
        submit(batcher, answers, "taken", make_job())
        assert batcher.drain(PATIENCE)
    assert sorted(answers.done, key=str) == [0, 1, 2, 3, "taken"]
    assert isinstance(answers.errors[4], RequestCancelledError)


def test_a_cancelled_job_takes_no_further_step():
    gate, answers = Gate(), Answers()
    with make_batcher(gate.stages) as batcher:
        ticket = submit(batcher, answers, "it", make_job(steps=10))
        gate.wait_for_step()
        gate.let()
        gate.wait_for_step()
        assert ticket.cancel()
        gate.let()
        wait_until(lambda: "it" in answers.errors)
        assert isinstance(answers.errors["it"], RequestCancelledError)
        assert len(gate.stages.runs) == 2
        assert batcher.drain(PATIENCE)


def test_a_job_whose_deadline_has_passed_never_runs():
    answers = Answers()
    with make_batcher() as batcher:
        submit(batcher, answers, "late", make_job(deadline=time.monotonic() - 1))
        assert batcher.drain(PATIENCE)
        assert batcher.stats().ticks == 0
        assert batcher.stats().expired == 1
    assert isinstance(answers.errors["late"], DeadlineExceededError)


def test_a_step_that_fails_leaves_the_loop_alive():
    stages, answers = NumpyStages(), Answers()

    def fail(stage: str, tensors: tuple[Any, ...]) -> None:
        raise EngineError("no memory left")

    with make_batcher(stages, slots=4) as batcher:
        stages.before = fail
        for seed in range(3):
            submit(batcher, answers, seed, make_job(seed))
        wait_until(lambda: len(answers.errors) == 3)
        assert {str(error) for error in answers.errors.values()} == {"no memory left"}
        stages.before = None
        assert batcher.alive
        submit(batcher, answers, "after", make_job(9))
        assert batcher.drain(PATIENCE)
    np.testing.assert_array_equal(answers.done["after"].latent, expected_latent(make_job(9)))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("coefficients", np.zeros((1, 11), np.float32)),
        ("coefficients", np.full((5, 11), np.nan, np.float32)),
        ("timesteps", np.zeros((5, 1), np.int64)),
        ("timesteps", np.full(5, -1)),
        ("timesteps", np.zeros(0, np.int64)),
        ("draws_noise", np.zeros(4, np.bool_)),
    ],
)
def test_a_table_whose_rows_do_not_fit_is_refused(name: str, value: np.ndarray):
    answers, job = Answers(), make_job(steps=5)
    changed: dict[str, Any] = {name: value}
    with make_batcher() as batcher, pytest.raises(InputError, match=r"coefficients|timesteps|steps|draws_noise"):
        submit(batcher, answers, "bad", replace(job, table=replace(job.table, **changed)))


def test_draining_refuses_new_jobs_and_finishes_the_others():
    gate, answers = Gate(), Answers()
    with make_batcher(gate.stages) as batcher:
        for seed in range(2):
            submit(batcher, answers, seed, make_job(seed))
        gate.wait_for_step()
        assert batcher.drain(0.01) is False
        with pytest.raises(StoppingError, match=r"^server is stopping"):
            submit(batcher, answers, "refused", make_job())
        gate.open()
        assert batcher.drain(PATIENCE)
    assert sorted(answers.done) == [0, 1]


def test_closing_gives_up_what_is_left_and_ends_the_threads():
    gate, answers = Gate(), Answers()
    before = set(threading.enumerate())
    batcher = make_batcher(gate.stages)
    assert batcher.alive
    for seed in range(3):
        submit(batcher, answers, seed, make_job(seed, steps=10))
    gate.wait_for_step()
    closer = threading.Thread(target=batcher.close)
    closer.start()
    wait_until(lambda: not batcher.alive)
    gate.open()
    closer.join(PATIENCE)
    assert not closer.is_alive()
    assert set(threading.enumerate()) <= before
    assert sorted(answers.errors) == [0, 1, 2]
    assert all(isinstance(error, StoppingError) for error in answers.errors.values())
    assert len(gate.stages.runs) == 1
    with pytest.raises(StoppingError):
        submit(batcher, answers, "refused", make_job())
    batcher.close()  # once more does no harm


def test_closing_while_idle_is_quick():
    before = set(threading.enumerate())
    with make_batcher(policy=Dynamic()) as batcher:
        assert batcher.drain(PATIENCE)
    assert set(threading.enumerate()) <= before


def test_a_dead_loop_shows_and_leaves_nobody_waiting(caplog: pytest.LogCaptureFixture):
    answers, all_there = Answers(), threading.Event()

    def die(stage: str, tensors: tuple[Any, ...]) -> None:
        all_there.wait(PATIENCE)
        raise SystemExit

    with make_batcher(NumpyStages(die)) as batcher:
        for seed in range(3):
            submit(batcher, answers, seed, make_job(seed))
        all_there.set()
        wait_until(lambda: len(answers.errors) == 3)
        assert not batcher.alive
        assert all("loop died" in str(error) for error in answers.errors.values())
        with pytest.raises(EngineError, match="loop has died"):
            submit(batcher, answers, "refused", make_job())
        assert batcher.drain(PATIENCE)
    assert any(record.levelno == logging.CRITICAL for record in caplog.records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"context": np.zeros((1, 1, 4, 4), np.float32)}, r"context: found float32 \(1, 1, 4, 4\), expected"),
        ({"context": np.zeros((1, 3, 4, 4))}, "context: found float64"),
        ({"context": np.full((1, 3, 4, 4), np.nan, np.float32)}, "context: found values that are not finite"),
        ({"embedding": np.zeros(5, np.float32)}, r"embedding: found float32 \(5,\)"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"seed": -1}, "seed: found -1"),
        ({"preview_every": 0}, "preview_every: found 0"),
    ],
)
def test_a_job_that_does_not_fit_is_refused(change: dict[str, Any], message: str):
    job = make_job()
    fields = {name: getattr(job, name) for name in SampleJob.__dataclass_fields__} | change
    with make_batcher() as batcher:
        with pytest.raises(InputError, match=message):
            submit(batcher, Answers(), "it", SampleJob(**fields))
        assert batcher.stats().outstanding == 0


@pytest.mark.parametrize("options", [{"slots": 0}, {"queue_limit": -1}, {"slots": 17, "fixed_batch": True}])
def test_options_out_of_range_are_refused(options: dict[str, Any]):
    before = set(threading.enumerate())
    with pytest.raises(InputError, match="expected"):
        make_batcher(**options)
    assert set(threading.enumerate()) <= before


def test_many_threads_get_their_own_samples_and_one_answer_each():
    answers, refused, cancelled = Answers(), [], set()
    jobs = {
        (thread, number): make_job(
            100 * thread + number, steps=1 + number % 5, guidance_scale=(1.0, 2.0)[number % 2], priority=number % 3
        )
        for thread in range(8)
        for number in range(20)
    }
    expected = {name: expected_latent(job) for name, job in jobs.items()}
    with make_batcher(slots=4, queue_limit=40) as batcher:

        def work(thread: int) -> None:
            for number in range(20):
                name = (thread, number)
                while True:
                    try:
                        ticket = submit(batcher, answers, name, jobs[name])
                        break
                    except QueueFullError:
                        refused.append(name)
                        time.sleep(0.001)
                if number % 7 == 3 and ticket.cancel():
                    cancelled.add(name)

        threads = [threading.Thread(target=work, args=(thread,)) for thread in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert batcher.drain(PATIENCE)
        stats = batcher.stats()
    assert len(answers.order) == len(set(answers.order)) == len(jobs)
    assert set(answers.errors) <= cancelled
    for name, sampled in answers.done.items():
        np.testing.assert_array_equal(sampled.latent, expected[name])
    assert stats.rejected == len(refused)
    assert stats.submitted == stats.finished + stats.cancelled == len(jobs)


def test_nothing_of_an_ended_job_is_kept():
    kept: list[weakref.ref[Any]] = []
    ends: list[weakref.ref[Any] | None] = []
    with make_batcher(slots=2) as batcher:
        for seed in range(20):
            job = make_job(seed, preview_every=1)
            kept.append(weakref.ref(job.context))
            ticket = batcher.submit(
                job,
                on_done=lambda sampled: ends.append(weakref.ref(sampled.latent)),
                on_error=lambda error: ends.append(None),
                on_preview=lambda step, estimate: None,
            )
            if seed % 5 == 0:
                ticket.cancel()
        del job, ticket
        assert batcher.drain(PATIENCE)
        wait_until(lambda: bool(gc.collect() + 1) and not any(one() is not None for one in kept))
        assert len(ends) == 20
        wait_until(lambda: not any(one is not None and one() is not None for one in ends))
