from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.interface import KeepsState, StateLoop
from lfdm_export.engines.onnxruntime.binding import BoundOnnxRuntimeEngine
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.errors import EngineError
from lfdm_export.sampling.loop import sample
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.tables import sampler_table
from lfdm_models.schedule import cosine_schedule
from tests.closeness import assert_same_floats
from tests.fake_bundle import GEOMETRY, SPECS, TRAINING_STEPS, fake_graph

SHAPE = (3, GEOMETRY.frames, GEOMETRY.latent_size, GEOMETRY.latent_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("binding")
    for stage in ("step", "step_guided", "denoise"):
        onnx.save(fake_graph(SPECS[stage]), folder / f"{stage}.onnx")
    return folder


def engine_of(folder: Path, stage: str) -> BoundOnnxRuntimeEngine:
    return BoundOnnxRuntimeEngine(folder / f"{stage}.onnx", SPECS[stage], threads=1, device="cpu")


def fixed_inputs(batch: int, *, guided: bool) -> dict[str, Any]:
    rng = np.random.default_rng(3)
    fixed = {
        "context": rng.standard_normal((batch, 3, 4, 4), np.float32),
        "text_embedding": rng.standard_normal((batch, 6), np.float32),
    }
    return {**fixed, "guidance_scale": np.full(batch, 2.0, np.float32)} if guided else fixed


def plain(engine: OnnxRuntimeEngine, table: SamplerTable, fixed: dict[str, Any], seeds: list[int]) -> Any:
    """Run the chain with every array on the host."""

    def step(noisy_latent: Any, timestep: Any, history: Any, noise: Any, coefficients: Any) -> Any:
        state = {
            "noisy_latent": noisy_latent, "timestep": timestep, "history": history, "noise": noise,
            "coefficients": coefficients,
        }  # fmt: skip
        outputs = engine.run({**fixed, **state})
        return outputs["next_latent"], outputs["next_history"]

    source = seeded_noise(seeds, SHAPE)
    return sample(step, table, source(START), source)


def bound(loop: StateLoop, table: SamplerTable, fixed: dict[str, Any], seeds: list[int]) -> Any:
    source = seeded_noise(seeds, SHAPE)
    loop.begin(source(START), fixed, table)
    for index in range(table.steps):
        loop.step(index, source(index) if table.draws_noise[index] else None)
    np.testing.assert_array_equal(loop.latent(), loop.latent())
    return loop.finish()


@pytest.mark.parametrize("stage", ["step", "step_guided"])
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 4), ("ddim", 5), ("unipc", 4), ("dpm++2m", 3)])
def test_the_loop_gives_the_same_chain(folder: Path, stage: str, sampler: str, steps: int):
    engine = engine_of(folder, stage)
    assert isinstance(engine, KeepsState)
    table = sampler_table(sampler, cosine_schedule(TRAINING_STEPS), steps)
    loop = engine.denoise_loop(2)
    for seeds in ([1, 2], [3, 4]):  # the state of an earlier chain must not matter
        fixed = fixed_inputs(2, guided=stage == "step_guided")
        fixed["context"] *= np.float32(seeds[0])
        expected = plain(engine, table, fixed, seeds)
        assert_same_floats(bound(loop, table, fixed, seeds), expected)


def test_what_was_given_stays_the_callers(folder: Path):
    engine = engine_of(folder, "step")
    table = sampler_table("ddim", cosine_schedule(TRAINING_STEPS), 3)
    loop, fixed = engine.denoise_loop(1), fixed_inputs(1, guided=False)
    start = seeded_noise([0], SHAPE)(START)
    kept = start.copy()
    loop.begin(start, fixed, table)
    loop.step(0, None)
    first = loop.latent()
    copied = first.copy()
    loop.step(1, None)
    loop.step(2, None)
    np.testing.assert_array_equal(start, kept)
    np.testing.assert_array_equal(first, copied)


def test_steps_without_noise_take_none(folder: Path):
    """The noise of an earlier step must not be added again."""
    engine = engine_of(folder, "step")
    schedule = cosine_schedule(TRAINING_STEPS)
    table = sampler_table("ddim", schedule, 3, 1.0)
    silent = SamplerTable("ddim", table.timesteps, table.coefficients, np.array([True, False, False]))
    expected = plain(engine, silent, fixed_inputs(1, guided=False), [5])
    assert_same_floats(bound(engine.denoise_loop(1), silent, fixed_inputs(1, guided=False), [5]), expected)


def test_errors(folder: Path):
    with pytest.raises(EngineError, match="'denoise' keeps no state"):
        engine_of(folder, "denoise").denoise_loop(1)
    loop = engine_of(folder, "step").denoise_loop(2)
    table = sampler_table("ddim", cosine_schedule(TRAINING_STEPS), 3)
    with pytest.raises(EngineError, match="has not begun"):
        loop.step(0, None)
    start = seeded_noise([1, 2], SHAPE)(START)
    fixed = fixed_inputs(2, guided=False)
    with pytest.raises(EngineError, match="lacks the input context"):
        loop.begin(start, {"text_embedding": fixed["text_embedding"]}, table)
    with pytest.raises(EngineError, match="batch"):
        loop.begin(start[:1], fixed, table)


def test_the_real_step(small_bundle: Bundle):
    path, spec = small_bundle.stage_path("step"), small_bundle.stages["step"]
    engine = BoundOnnxRuntimeEngine(path, spec, threads=1, device="cpu")
    g = small_bundle.manifest.geometry
    rng = np.random.default_rng(0)
    fixed = {
        "context": rng.standard_normal((1, g.context_channels, g.latent_size, g.latent_size), np.float32),
        "text_embedding": small_bundle.embeddings[:1],
    }
    table = sampler_table("ddim", cosine_schedule(small_bundle.manifest.config.dm.training_steps), 3)
    shape = (3, g.frames, g.latent_size, g.latent_size)
    source = seeded_noise([1], shape)
    loop = engine.denoise_loop(1)
    loop.begin(source(START), fixed, table)
    latent: NDArray[Any] = source(START)
    history: NDArray[Any] = np.zeros((1, 2, *shape), np.float32)
    for index in range(table.steps):
        noise = source(index)
        loop.step(index, noise)
        feeds: dict[str, NDArray[Any]] = {
            **fixed, "noisy_latent": latent, "history": history, "noise": noise,
            "timestep": table.timesteps[index : index + 1], "coefficients": table.coefficients[index : index + 1],
        }  # fmt: skip
        outputs = engine.run(feeds)
        latent, history = outputs["next_latent"], outputs["next_history"]
        assert_same_floats(loop.latent(), latent, roundings=256)
