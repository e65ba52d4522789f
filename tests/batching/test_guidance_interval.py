"""Jobs whose guidance begins and ends at their steps, beside others: each step runs the graph that it needs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.batching.jobs import SampleJob
from lfdm_export.batching.step_batcher import StepBatcher
from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.ops.cuda.host import HostKernels
from lfdm_export.sampling.loop import sample
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.options import guided_steps
from tests.batching.test_device_rows import expected_clip, job_of, photo
from tests.batching.test_step_loop import Sampler
from tests.closeness import assert_same_floats
from tests.device_place import make_place
from tests.fake_bundle import GEOMETRY, NULL, TRAINING_STEPS, write_fake_bundle
from tests.sampler_fakes import SHAPE, Answers, NumpyStages, make_job

INTERVAL = (0.25, 0.8)
PATIENCE = 120.0


def inside(job: SampleJob, interval: tuple[float, float] = INTERVAL) -> SampleJob:
    return replace(job, guided_steps=guided_steps(job.table.timesteps, TRAINING_STEPS, interval))


def expected(job: SampleJob) -> np.ndarray:
    """The latent of the shared loop, with the stage that each step needs."""
    stages, index = NumpyStages(), iter(range(job.table.steps))

    def step(noisy_latent: Any, timestep: Any, history: Any, noise: Any, coefficients: Any) -> Any:
        guided = job.is_guided(next(index))
        guidance = [np.array([job.guidance_scale], np.float32)] if guided else []
        inputs = [noisy_latent, job.context, job.embedding[None], timestep, *guidance, history, noise, coefficients]
        return stages.run("step_guided" if guided else "step", *inputs)

    source = seeded_noise([job.seed], SHAPE)
    return sample(step, job.table, source(START), source)


@pytest.mark.parametrize("fixed_batch", [False, True])
@pytest.mark.parametrize("slots", [1, 2, 5])
def test_each_sample_is_that_of_the_shared_loop(slots: int, fixed_batch: bool):
    settings = [("ddim", 7, 2.0), ("unipc", 6, 3.0), ("dpm++2m", 5, 2.0), ("ddim", 9, 1.0), ("ddim", 4, 0.5)]
    jobs = [inside(make_job(seed, sampler=name, steps=steps, guidance_scale=scale))
            for seed, (name, steps, scale) in enumerate(settings)]  # fmt: skip
    jobs += [make_job(9, steps=6, guidance_scale=2.0), make_job(10, steps=3)]
    answers, stages = Answers(), NumpyStages()
    with StepBatcher(stages, GEOMETRY, NULL, slots=slots, fixed_batch=fixed_batch) as batcher:
        for name, job in enumerate(jobs):
            batcher.submit(job, on_done=answers.on_done(name), on_error=answers.on_error(name))
        assert batcher.drain(PATIENCE)
    assert answers.errors == {}
    for name, job in enumerate(jobs):
        np.testing.assert_array_equal(answers.done[name].latent, expected(job))


def test_steps_outside_the_interval_run_the_unguided_graph():
    sampler, job = Sampler(), inside(make_job(1, steps=6, guidance_scale=2.0))
    guided = [job.is_guided(index) for index in range(6)]
    assert sorted(set(guided)) == [False, True]
    assert guided[0] is guided[-1] is False
    sampler.submit("it", job)
    sampler.run()
    assert sampler.stages.runs == [("step_guided" if one else "step", 1) for one in guided]


def test_the_whole_range_changes_nothing():
    job = make_job(1, steps=5, guidance_scale=2.0)
    runs = []
    for one in (job, inside(job, (0.0, 1.0))):
        sampler = Sampler()
        sampler.submit("it", one)
        sampler.run()
        runs.append((sampler.stages.runs, sampler.answers.done["it"].latent.tobytes()))
    assert runs[0] == runs[1]


def test_a_job_is_due_by_the_steps_that_it_takes():
    """A guided step takes 3 s, an unguided one 1 s."""
    sampler, job = Sampler(), make_job(1, steps=4, guidance_scale=2.0)
    live = sampler.submit("it", replace(job, guided_steps=np.array([False, True, True, False])))
    assert live.seconds_from(0, {False: 1.0, True: 3.0}) == 8
    assert live.seconds_from(2, {False: 1.0, True: 3.0}) == 4
    assert sampler.submit("whole", job).seconds_from(1, {False: 1.0, True: 3.0}) == 9
    assert sampler.submit("plain", make_job(2, steps=4)).seconds_from(1, {False: 1.0, True: 3.0}) == 3


def test_a_step_that_fails_as_guidance_ends_loses_one_job_alone():
    job = inside(make_job(1, steps=6, guidance_scale=2.0))
    other = make_job(2, steps=6)
    calls = []

    def before(stage: str, tensors: tuple[Any, ...]) -> None:
        calls.append(stage)
        if stage == "step" and len(tensors[0]) == 2 and "step_guided" in calls:
            raise RuntimeError("no memory for two")

    sampler = Sampler(slots=2)
    sampler.stages.before = before
    sampler.submit("it", job)
    sampler.submit("other", other)
    sampler.run()
    assert sampler.answers.errors == {}
    for name, one in (("it", job), ("other", other)):
        np.testing.assert_array_equal(sampler.answers.done[name].latent, expected(one))


def test_marks_that_do_not_match_the_table_are_refused():
    job = replace(make_job(1, steps=4, guidance_scale=2.0), guided_steps=np.ones(3, bool))
    with StepBatcher(NumpyStages(), GEOMETRY, NULL) as batcher, pytest.raises(InputError, match=r"guided: found bool"):
        batcher.submit(job, on_done=lambda _: None, on_error=lambda _: None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("interval") / "fake")


@pytest.mark.parametrize("slots", [1, 2])
def test_on_a_device_the_state_stays_there(bundle: Bundle, tmp_path: Path, device_kernels: HostKernels, slots: int):
    place = make_place(bundle, tmp_path, device_kernels)
    pipeline = Pipeline(bundle, threads=1, target="onnxruntime")
    job = inside(job_of(place.chain, pipeline, 1, "unipc", 6, 2.0))
    sampler = Sampler(chain=place.chain, slots=slots)
    place.copies()
    sampler.submit("it", job)
    sampler.submit("other", job_of(place.chain, pipeline, 2, "ddim", 4, 2.0))
    place.copies()
    sampler.run()
    # Embedding, seed, timesteps, coefficients: for each of both stages; a guidance scale for the guided one.
    assert place.copies() == (4 + 5 + 5, 0)
    found = pipeline.generate(
        photo(1), label=bundle.labels[0], sampler="unipc", steps=6, guidance_scale=2.0, guidance_interval=INTERVAL,
        seed=1,
    )  # fmt: skip
    assert_same_floats(place.chain.latent(sampler.answers.done["it"].latent), found.latent[0])
    whole = expected_clip(pipeline, 2, "ddim", 4, 2.0)
    assert_same_floats(place.chain.latent(sampler.answers.done["other"].latent), whole.latent[0])
