"""The sampler with its rows on a device: the same samples as on the host, and no copies within a chain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.batching.jobs import SampleJob
from lfdm_export.batching.step_batcher import StepBatcher
from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.device_chain import DeviceChain
from lfdm_export.engines.pytorch.compiled import VARIABLE
from lfdm_export.engines.tensorrt.captured_run import CapturedRun
from lfdm_export.errors import EngineError, InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.ops.cuda.host import HostKernels
from lfdm_export.pictures.preprocess import to_float
from tests.batching.test_step_loop import Sampler
from tests.closeness import assert_same_floats
from tests.device_place import Place, make_place
from tests.fake_bundle import GEOMETRY, NULL, SIZE, write_fake_bundle
from tests.sampler_fakes import Answers
from tests.torch_bundle import write_torch_bundle

#: Sampler, steps, guidance scale of jobs that differ in everything.
MIX = (
    ("ddim", 2, 1.0), ("ddim", 5, 1.0), ("unipc", 7, 2.5), ("ddim", 10, 1.0), ("dpm++2m", 3, 0.0), ("ddim", 4, 3.0)
)  # fmt: skip
PATIENCE = 100.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("rows") / "fake")


@pytest.fixture
def place(bundle: Bundle, tmp_path: Path, device_kernels: HostKernels) -> Place:
    return make_place(bundle, tmp_path, device_kernels)


def photo(seed: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def job_of(
    chain: DeviceChain[Any], pipeline: Pipeline, seed: int, sampler: str, steps: int, scale: float, **more: Any
) -> SampleJob:
    size = pipeline.bundle.manifest.geometry.image_size
    table = pipeline.sampler_table(sampler, steps)
    encoded = chain.encode(to_float(photo(seed, size)[None]))
    return SampleJob(encoded, pipeline.bundle.embeddings[0], table, scale, seed, **more)


def expected_clip(pipeline: Pipeline, seed: int, sampler: str, steps: int, scale: float) -> Any:
    size, label = pipeline.bundle.manifest.geometry.image_size, pipeline.bundle.labels[0]
    return pipeline.generate(
        photo(seed, size), label=label, sampler=sampler, steps=steps, guidance_scale=scale, seed=seed
    )


def device_sampler(place: Place, **options: Any) -> Sampler:
    """A loop on the fake GPU whose steps the test takes."""
    return Sampler(chain=place.chain, **options)


@pytest.mark.parametrize("fixed_batch", [False, True])
@pytest.mark.parametrize("slots", [1, 3, 4])
def test_samples_are_those_of_the_host(place: Place, bundle: Bundle, slots: int, fixed_batch: bool):
    pipeline, answers = Pipeline(bundle, threads=1, target="onnxruntime"), Answers()
    jobs = [job_of(place.chain, pipeline, seed, *settings) for seed, settings in enumerate(MIX)]
    with StepBatcher(place.chain, GEOMETRY, NULL, slots=slots, fixed_batch=fixed_batch) as batcher:
        for seed, job in enumerate(jobs):
            batcher.submit(job, on_done=answers.on_done(seed), on_error=answers.on_error(seed))
        assert batcher.drain(PATIENCE)
    assert answers.errors == {}
    for seed, settings in enumerate(MIX):
        expected = expected_clip(pipeline, seed, *settings)
        latent = answers.done[seed].latent
        assert_same_floats(place.chain.latent(latent), expected.latent[0])
        ((_, (frames,)),) = place.chain.decode(jobs[seed].context, latent)
        assert np.abs(frames.astype(int) - expected.frames[0]).max() <= 1


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_between_joining_and_decoding_nothing_is_copied(place: Place, bundle: Bundle, steps: int):
    """Rows join at different steps, are paused, move and leave."""
    pipeline, sampler = Pipeline(bundle, threads=1, target="onnxruntime"), device_sampler(place, slots=2)
    jobs = {
        name: job_of(place.chain, pipeline, seed, "ddim", steps, scale, priority=priority)
        for seed, (name, scale, priority) in enumerate(
            [("a", 1.0, 0), ("b", 1.0, 0), ("guided", 2.0, 0), ("urgent", 1.0, 2), ("last", 1.0, -1)]
        )
    }
    place.copies()
    for name, job in jobs.items():
        sampler.submit(name, job)
        sampler.tick()
    sampler.run()
    assert sorted(sampler.answers.done) == sorted(jobs)
    # Embedding, seed, timesteps and coefficients of each, and one guidance scale; nothing comes back before decoding.
    assert place.copies() == (4 * len(jobs) + 1, 0)
    for job, name in zip(jobs.values(), jobs, strict=True):
        list(place.chain.decode(job.context, sampler.answers.done[name].latent))
    assert place.copies() == (0, 2 * len(jobs)), "frames and a flag"
    for seed, (name, job) in enumerate(jobs.items()):
        expected = expected_clip(pipeline, seed, "ddim", steps, job.guidance_scale)
        assert_same_floats(place.chain.latent(sampler.answers.done[name].latent), expected.latent[0])


def test_who_is_paused_continues_where_it_was(place: Place, bundle: Bundle):
    pipeline, sampler = Pipeline(bundle, threads=1, target="onnxruntime"), device_sampler(place)
    sampler.submit("slow", job_of(place.chain, pipeline, 1, "unipc", 6, 1.0))
    sampler.tick(2)
    sampler.submit("urgent", job_of(place.chain, pipeline, 2, "ddim", 3, 1.0, priority=1))
    assert sampler.run() == ["urgent", "slow"]
    expected = expected_clip(pipeline, 1, "unipc", 6, 1.0)
    assert_same_floats(place.chain.latent(sampler.answers.done["slow"].latent), expected.latent[0])


def test_previews_are_the_estimates_of_their_steps(place: Place, bundle: Bundle):
    pipeline, sampler = Pipeline(bundle, threads=1, target="onnxruntime"), device_sampler(place)
    estimates: dict[int, np.ndarray] = {}
    encoded = pipeline.encode(photo(3))
    pipeline.sample(
        encoded,
        bundle.embeddings[0],
        sampler="unipc",
        steps=5,
        seed=3,
        on_estimate=lambda index, estimate: estimates.__setitem__(index + 1, estimate.copy()),
    )
    sampler.submit("it", job_of(place.chain, pipeline, 3, "unipc", 5, 1.0, preview_every=2))
    sampler.run()
    assert [step for step, _ in sampler.answers.previews["it"]] == [2, 4]
    shown: list[tuple[int, Any]] = sampler.answers.previews["it"]
    for step, estimate in shown:
        assert_same_floats(place.chain.latent(estimate), estimates[step][0])


def test_a_step_that_fails_fails_its_jobs_and_no_later_ones(
    place: Place, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    pipeline, sampler = Pipeline(bundle, threads=1, target="onnxruntime"), device_sampler(place, slots=3)

    def fail(*_: Any) -> None:
        raise EngineError("a launch failed")

    for seed in range(2):
        sampler.submit(seed, job_of(place.chain, pipeline, seed, "ddim", 6, 1.0))
    sampler.tick()
    with monkeypatch.context() as patch:
        patch.setattr(CapturedRun, "__call__", fail)
        sampler.tick()
    assert sorted(sampler.answers.errors) == [0, 1]
    assert {str(error) for error in sampler.answers.errors.values()} == {"a launch failed"}
    sampler.submit("after", job_of(place.chain, pipeline, 7, "ddim", 3, 1.0))
    sampler.run()
    expected = expected_clip(pipeline, 7, "ddim", 3, 1.0)
    assert_same_floats(place.chain.latent(sampler.answers.done["after"].latent), expected.latent[0])


def test_who_makes_a_step_fail_once_costs_the_others_nothing(
    place: Place, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    """After a failure each row takes the step alone, with its state and its noise."""
    pipeline, sampler = Pipeline(bundle, threads=1, target="onnxruntime"), device_sampler(place, slots=3)
    for seed in range(3):
        sampler.submit(seed, job_of(place.chain, pipeline, seed, "ddim", 5, 1.0))
    sampler.tick(2)
    failures = [EngineError("once")]
    real = CapturedRun.__call__

    def fail_once(run: CapturedRun) -> None:
        if failures:
            raise failures.pop()
        real(run)

    monkeypatch.setattr(CapturedRun, "__call__", fail_once)
    sampler.run()
    assert sampler.answers.errors == {}
    for seed in range(3):
        expected = expected_clip(pipeline, seed, "ddim", 5, 1.0)
        assert_same_floats(place.chain.latent(sampler.answers.done[seed].latent), expected.latent[0])


def test_jobs_of_another_place_are_refused(place: Place, bundle: Bundle):
    pipeline, answers = Pipeline(bundle, threads=1, target="onnxruntime"), Answers()
    there = job_of(place.chain, pipeline, 0, "ddim", 3, 1.0)
    here = SampleJob(pipeline.encode(photo(0)).context, there.embedding, there.table)
    for stages, job in ((place.chain, here), (pipeline.stages, there)):
        with StepBatcher(stages, GEOMETRY, NULL) as batcher, pytest.raises(InputError, match="expected an encoding on"):
            batcher.submit(job, on_done=answers.on_done(0), on_error=answers.on_error(0))


def test_the_time_of_a_step_is_that_of_the_one_before(place: Place, bundle: Bundle):
    pipeline, sampler = Pipeline(bundle, threads=1, target="onnxruntime"), device_sampler(place)
    sampler.submit("it", job_of(place.chain, pipeline, 0, "ddim", 4, 1.0))
    sampler.loop.step()
    assert sampler.loop.pace[False] == 0.0
    sampler.loop.step()
    assert sampler.loop.pace[False] > 0.0


# --------------------------------------------------------------------------------- PyTorch's CPU


@pytest.fixture
def torch_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """A tiny model on the CPU, uncompiled."""
    monkeypatch.setenv(VARIABLE, "0")
    return Pipeline(write_torch_bundle(tmp_path / "torch"), threads=1, target="torch", self_check=False)


@pytest.mark.parametrize("slots", [1, 2])
def test_on_pytorchs_cpu_clips_are_those_of_the_host(torch_pipeline: Pipeline, slots: int):
    chain, bundle, answers = torch_pipeline.stages.device_chain, torch_pipeline.bundle, Answers()
    jobs = [job_of(chain, torch_pipeline, seed, *settings) for seed, settings in enumerate(MIX)]
    with StepBatcher(chain, bundle.manifest.geometry, bundle.null_embedding, slots=slots) as batcher:
        for seed, job in enumerate(jobs):
            batcher.submit(job, on_done=answers.on_done(seed), on_error=answers.on_error(seed))
        assert batcher.drain(PATIENCE)
    assert answers.errors == {}
    for seed, settings in enumerate(MIX):
        expected = expected_clip(torch_pipeline, seed, *settings)
        latent = answers.done[seed].latent
        assert np.abs(chain.latent(latent) - expected.latent[0]).max() < 1e-4
        ((begin, (frames, warped)),) = chain.decode(jobs[seed].context, latent, wanted=("frames", "warped"))
        assert begin == 0
        assert np.abs(frames.astype(int) - expected.frames[0]).max() <= 1
        assert np.abs(warped.astype(int) - expected.warped[0]).max() <= 1


def test_a_target_without_a_device_says_so(bundle: Bundle):
    with pytest.raises(EngineError, match="'onnxruntime' keeps no clips on a device; take one of tensorrt, "):
        _ = Pipeline(bundle, target="onnxruntime", self_check=False).stages.device_chain
