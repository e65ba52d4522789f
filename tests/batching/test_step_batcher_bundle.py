"""The sampler over real engines: a sample is the pipeline's, in any company."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from lfdm_export.batching.jobs import SampleJob
from lfdm_export.batching.step_batcher import StepBatcher
from lfdm_export.bundle.reader import Bundle
from lfdm_export.generate.encoded import Encoded
from lfdm_export.generate.pipeline import Pipeline
from tests.sampler_fakes import Answers

Float32 = NDArray[np.float32]
#: Of a latent within [-1, 1] against the same sample in other company; the largest that was seen is 1.5e-6.
TOLERANCE = 2e-5
#: Sampler, steps, guidance scale of jobs that differ in everything.
MIX = (("ddim", 3, 1.0), ("unipc", 5, 2.5), ("dpm++2m", 2, 1.0), ("ddim", 4, 0.0), ("unipc", 3, 1.0))


@pytest.fixture(scope="module")
def pipeline(small_bundle: Bundle) -> Pipeline:
    return Pipeline(small_bundle, threads=1)


@pytest.fixture(scope="module")
def photographs() -> list[NDArray[np.uint8]]:
    return list(np.random.default_rng(5).integers(0, 256, (len(MIX), 64, 64, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def encoded(pipeline: Pipeline, photographs: Sequence[NDArray[np.uint8]]) -> list[Encoded]:
    return [pipeline.encode(photograph) for photograph in photographs]


@pytest.fixture(scope="module")
def jobs(pipeline: Pipeline, encoded: Sequence[Encoded]) -> list[SampleJob]:
    return [
        SampleJob(
            encoded[index].context,
            pipeline.bundle.embeddings[index],
            pipeline.sampler_table(sampler, steps),
            scale,
            seed=10 + index,
        )
        for index, (sampler, steps, scale) in enumerate(MIX)
    ]


def draw(pipeline: Pipeline, jobs: Iterable[SampleJob], slots: int, *, fixed_batch: bool = False) -> list[Float32]:
    """The latents, and a look at whether every job ended well."""
    answers, jobs = Answers(), list(jobs)
    manifest, null = pipeline.bundle.manifest, pipeline.bundle.null_embedding
    with StepBatcher(pipeline.stages, manifest.geometry, null, slots=slots, fixed_batch=fixed_batch) as batcher:
        for index, job in enumerate(jobs):
            batcher.submit(job, on_done=answers.on_done(index), on_error=answers.on_error(index))
        assert batcher.drain(100)
    assert answers.errors == {}
    return [answers.done[index].latent for index in range(len(jobs))]


@pytest.fixture(scope="module")
def alone(pipeline: Pipeline, photographs: Sequence[NDArray[np.uint8]], jobs: Sequence[SampleJob]) -> list[Float32]:
    """What `Pipeline.generate` samples."""
    return [
        pipeline.generate(
            photograph,
            text_embedding=job.embedding,
            sampler=sampler,
            steps=steps,
            guidance_scale=scale,
            seed=job.seed,
        ).latent
        for photograph, job, (sampler, steps, scale) in zip(photographs, jobs, MIX, strict=True)
    ]


def test_in_one_slot_a_sample_is_the_pipelines_in_every_bit(
    pipeline: Pipeline, jobs: Sequence[SampleJob], alone: Sequence[Float32]
):
    for drawn, expected in zip(draw(pipeline, jobs, 1), alone, strict=True):
        np.testing.assert_array_equal(drawn, expected)


def test_in_company_a_sample_is_the_pipelines(pipeline: Pipeline, jobs: Sequence[SampleJob], alone: Sequence[Float32]):
    for drawn, expected in zip(draw(pipeline, jobs, 4), alone, strict=True):
        np.testing.assert_allclose(drawn, expected, rtol=0, atol=TOLERANCE)


def test_a_fixed_batch_gives_the_same_bits_in_any_slot_and_company(pipeline: Pipeline, jobs: Sequence[SampleJob]):
    slots = 3
    together = draw(pipeline, jobs, slots, fixed_batch=True)
    reversed_order = draw(pipeline, reversed(jobs), slots, fixed_batch=True)[::-1]
    by_themselves = [draw(pipeline, [job], slots, fixed_batch=True)[0] for job in jobs]
    for in_company, elsewhere, by_itself in zip(together, reversed_order, by_themselves, strict=True):
        np.testing.assert_array_equal(in_company, by_itself)
        np.testing.assert_array_equal(elsewhere, by_itself)
