"""Clips that stay on a device: on the fake GPU, whose copies are counted, and on PyTorch's CPU."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.device import Layout, Pool
from lfdm_export.engines.device_batch import DeviceState, RowStep, batch_sizes
from lfdm_export.engines.device_chain import FRAMES, WARPED, DeviceChain, runs
from lfdm_export.engines.tensorrt.device import GpuArray
from lfdm_export.errors import EngineError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.ops.cuda.host import HostKernels
from lfdm_export.pictures.preprocess import to_float
from tests.closeness import assert_same_floats
from tests.device_place import Place, make_place
from tests.fake_bundle import GEOMETRY, SIZE, TRAINING_STEPS, write_fake_bundle

Chain = DeviceChain[GpuArray]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("device") / "fake")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def place(request: pytest.FixtureRequest, bundle: Bundle, tmp_path: Path, device_kernels: HostKernels) -> Place:
    return make_place(bundle, tmp_path, device_kernels, request.param)


def photo(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def make_clip(chain: Chain, pipeline: Pipeline, seed: int, *, steps: int, scale: float = 1.0) -> dict[str, np.ndarray]:
    """One clip through the chain, alone in its batch."""
    table = pipeline.sampler_table("ddim", steps, 1.0)
    stage = "step" if scale in (0.0, 1.0) else "step_guided"
    inputs = {"text_embedding": pipeline.bundle.embedding("happiness")[None], "guidance_scale": np.array([scale])}
    encoded = chain.encode(to_float(photo(seed)[None]))
    sample = chain.sample(stage, encoded, inputs, seed, table)
    batch = chain.batch(stage, 1)
    batch.begin(0, sample)
    for index in range(steps):
        batch.step([RowStep(sample, index, bool(table.draws_noise[index]))])
    latent = batch.latent(0)
    parts = list(chain.decode(encoded, latent, wanted=(FRAMES, WARPED)))
    frames, warped = (np.concatenate([pictures[which] for _, pictures in parts]) for which in range(2))
    return {"frames": frames, "warped": warped, "latent": chain.latent(latent)}


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_clip_is_that_of_the_host(place: Place, bundle: Bundle, scale: float):
    pipeline = Pipeline(bundle, threads=1, target="onnxruntime")
    for seed in (3, 2**63):
        found = make_clip(place.chain, pipeline, seed, steps=4, scale=scale)
        expected = pipeline.generate(
            photo(seed), label="happiness", sampler="ddim", steps=4, eta=1.0, seed=seed, guidance_scale=scale
        )
        assert_same_floats(found["latent"], expected.latent[0])
        assert np.abs(found["frames"].astype(int) - expected.frames[0]).max() <= 1
        assert np.abs(found["warped"].astype(int) - expected.warped[0]).max() <= 1


def test_what_crosses_to_the_host_does_not_depend_on_the_steps(place: Place, bundle: Bundle):
    pipeline = Pipeline(bundle, threads=1, target="onnxruntime")
    make_clip(place.chain, pipeline, 0, steps=2)
    place.copies()
    found = set()
    for steps in (2, 5, 10):
        make_clip(place.chain, pipeline, steps, steps=steps)
        found.add(place.copies())
    # image, embedding, seed, timesteps, coefficients; frames, warped, flag, latent
    assert found == {(5, 4)}


def test_the_second_clip_takes_no_memory(place: Place, bundle: Bundle):
    pipeline = Pipeline(bundle, threads=1, target="onnxruntime")
    chain = place.chain
    table = pipeline.sampler_table("ddim", 4, 1.0)
    batch = chain.batch("step", 1)

    def clip(seed: int) -> None:
        encoded = chain.encode(to_float(photo(seed)[None]))
        sample = chain.sample("step", encoded, {"text_embedding": np.zeros((1, 6), np.float32)}, seed, table)
        batch.begin(0, sample)
        for index in range(4):
            batch.step([RowStep(sample, index, bool(table.draws_noise[index]))])
        list(chain.decode(encoded, batch.latent(0)))

    for seed in range(2):
        clip(seed)
    place.gpu.library.calls.clear()
    clip(9)
    assert not [name for name in place.gpu.library.calls if "Alloc" in name or "Free" in name]


def test_a_state_that_is_saved_and_resumed_elsewhere_leaves_no_trace(place: Place, bundle: Bundle):
    pipeline = Pipeline(bundle, threads=1, target="onnxruntime")
    chain, table = place.chain, pipeline.sampler_table("unipc", 6)
    encoded = chain.encode(to_float(photo(1)[None]))
    inputs = {"text_embedding": bundle.embedding("Anger")[None]}
    one, other = (chain.sample("step", encoded, inputs, seed, table) for seed in (1, 2))
    batch = chain.batch("step", 3)

    def step(sample: Any, index: int) -> RowStep[GpuArray]:
        return RowStep(sample, index, bool(table.draws_noise[index]))

    batch.begin(0, one)
    batch.begin(1, other)
    for index in range(3):
        batch.step([step(one, index), step(other, index)])
    state: DeviceState[GpuArray] = batch.save(0)
    batch.move(1, 0)
    batch.step([step(other, 3)])
    batch.resume(1, one, state)
    for index in range(3, 6):
        batch.step([step(other, min(index + 1, 5)), step(one, index)])
    expected = pipeline.generate(photo(1), label="Anger", sampler="unipc", steps=6, seed=1).latent[0]
    assert_same_floats(chain.latent(batch.latent(1)), expected)


@pytest.mark.parametrize(
    ("indices", "each", "found"),
    [
        (range(5), 2, [(0, 0, 2), (2, 2, 2), (4, 4, 1)]),
        (range(5), 8, [(0, 0, 5)]),
        ([0, 2, 3, 4], 3, [(0, 0, 1), (1, 2, 2), (3, 4, 1)]),
    ],
)
def test_neighboring_frames_are_copied_together(indices: Sequence[int], each: int, found: list[Any]):
    assert list(runs(list(indices), each)) == found


def test_some_frames_are_those_of_the_clip(place: Place, bundle: Bundle):
    pipeline = Pipeline(bundle, threads=1, target="onnxruntime")
    chain = place.chain
    assert chain.layout == Layout(3, 2)  # five frames, two per row
    table = pipeline.sampler_table("ddim", 2)
    encoded = chain.encode(to_float(photo(1)[None]))
    sample = chain.sample("step", encoded, {"text_embedding": bundle.embedding("Anger")[None]}, 1, table)
    batch = chain.batch("step", 1)
    batch.begin(0, sample)
    batch.step([RowStep(sample, 0, True)])
    latent = batch.latent(0)
    ((_, (whole,)),) = chain.decode(encoded, latent)
    ((_, (some,)),) = chain.decode(encoded, latent, [0, 3, 4])
    np.testing.assert_array_equal(some, whole[[0, 3, 4]])


def test_without_memory_for_a_whole_clip_fewer_frames_are_decoded_at_once(
    bundle: Bundle, tmp_path: Path, device_kernels: HostKernels
):
    place = make_place(bundle, tmp_path, device_kernels)
    pipeline = Pipeline(bundle, threads=1, target="onnxruntime")
    expected = make_clip(place.chain, pipeline, 5, steps=3)
    place.gpu.library.memory = 2 * 2 * 3 * SIZE * SIZE * 4 - 1  # less than a float output of two rows
    small: Chain = DeviceChain(place.device, bundle.stages, GEOMETRY, TRAINING_STEPS)
    assert small.layout == Layout(1, 2)
    found = make_clip(small, pipeline, 5, steps=3)
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    place.gpu.library.memory = 1000
    with pytest.raises(EngineError, match="out of memory"):
        DeviceChain(place.device, bundle.stages, GEOMETRY, TRAINING_STEPS)


def test_values_that_are_not_finite_are_an_error(place: Place, bundle: Bundle):
    pipeline = Pipeline(bundle, threads=1, target="onnxruntime")
    chain, table = place.chain, pipeline.sampler_table("ddim", 2)
    encoded = chain.encode(to_float(photo(1)[None]))
    inputs = {"text_embedding": np.full((1, 6), np.nan, np.float32)}
    sample = chain.sample("step", encoded, inputs, 1, table)
    batch = chain.batch("step", 2)
    batch.begin(0, sample)
    batch.step([RowStep(sample, 0, True)])
    with pytest.raises(EngineError, match="not finite; the weights or the engine are at fault"):
        list(chain.decode(encoded, batch.latent(0)))


def test_too_many_steps_or_slots_are_refused(place: Place, bundle: Bundle):
    chain = place.chain
    encoded = chain.encode(to_float(photo(1)[None]))
    table = Pipeline(bundle).sampler_table("ddpm")
    longer = dataclasses.replace(table, timesteps=np.repeat(table.timesteps, 2))
    with pytest.raises(EngineError, match="takes 40 steps, expected at most 20"):
        chain.sample("step", encoded, {}, 0, longer)
    with pytest.raises(EngineError, match="found 17 slots, expected at most 16, the most that step_guided runs"):
        chain.batch("step_guided", 17)


def test_batch_sizes_end_with_all_rows():
    assert [batch_sizes(slots) for slots in (1, 2, 3, 8, 12)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4, 8],
        [1, 2, 4, 8, 12],
    ]


def test_memory_is_lent_once_at_a_time():
    made: list[list[int]] = []

    class Holder:
        pass

    def make() -> list[int]:
        made.append([len(made)])
        return made[-1]

    pool = Pool(make)
    holder = pool.lend(Holder(), pool.take())
    assert pool.take() == [1]
    del holder
    assert pool.take() is made[0]
    assert len(made) == 2
