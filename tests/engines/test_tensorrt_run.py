from __future__ import annotations

import dataclasses
import functools
import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export import Pipeline
from lfdm_export.bundle.reader import Bundle, fingerprint
from lfdm_export.engines.cuda_driver import CudaDriver, Gpu
from lfdm_export.engines.device import DeviceMemoryError
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.tensorrt import device_loop, gpu_session
from lfdm_export.engines.tensorrt import engine as tensorrt_run
from lfdm_export.engines.tensorrt.engine import TensorRtEngine
from lfdm_export.engines.tensorrt.gpu_memory import DeviceBuffer
from lfdm_export.engines.tensorrt.grid_samples import GRID_SAMPLING
from lfdm_export.engines.tensorrt.plan_context import PlanContext
from lfdm_export.engines.tensorrt.plans import BuildOptions, Fingerprint, PlanFolder, PlanRecord
from lfdm_export.errors import EngineError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.sampling.noise import START, NoiseSource, seeded_noise
from lfdm_export.sampling.tables import sampler_table
from lfdm_export.stages import StageSpec
from lfdm_models.schedule import cosine_schedule
from tests.closeness import assert_same_floats
from tests.fake_bundle import CHUNK, FRAMES, LATENT, SIZE, TRAINING_STEPS, feeds_for, write_fake_bundle
from tests.fake_gpu import FakeGpu, FakeLibrary, fake_plan

SHAPE = (3, FRAMES, LATENT, LATENT)
SCHEDULE = cosine_schedule(TRAINING_STEPS)
WAITS = ("cuStreamSynchronize", "cuEventSynchronize")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("tensorrt") / "fake")


def write_plans(bundle: Bundle, target: Target, gpu: Gpu, options: BuildOptions | None = None) -> None:
    """Write fake plans with valid records."""
    folder = PlanFolder(bundle.path, target)
    folder.path.mkdir(parents=True, exist_ok=True)
    options = options or BuildOptions()
    for stage, spec in bundle.stages.items():
        path = fake_plan(bundle, stage, folder.plan(stage))
        name = f"onnx/{stage}.onnx"
        made = Fingerprint(
            target=target,
            stage=stage,
            precision="fp32",
            sources={} if options.strip else {name: bundle.manifest.files[name].sha256},
            structure="",
            batch=spec.batch,
            library=f"{'TensorRT for RTX' if target == 'tensorrt-rtx' else 'TensorRT'} 11.4.0",
            gpus=(gpu.architecture, gpu.name) if target == "tensorrt" else (gpu.architecture,),
            options=options,
            grid_sampling=GRID_SAMPLING,
        )
        record = PlanRecord(made, fingerprint(path), 1.0, 1, {})
        folder.record_path(stage).write_text(json.dumps(to_plain(record)), encoding="utf-8")


@dataclasses.dataclass
class Place:
    bundle: Bundle
    gpu: FakeGpu
    runner: StageRunner

    @property
    def calls(self) -> list[str]:
        return self.gpu.library.calls


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A bundle with plans, on a machine that appears able to run them."""
    return make_place(request.param, tmp_path, monkeypatch)


def make_place(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: BuildOptions | None = None
) -> Place:
    bundle = write_fake_bundle(tmp_path / "fake")
    gpu = FakeGpu(target, bundle.stages)
    write_plans(bundle, target, gpu.session.gpu, options)
    monkeypatch.setattr(tensorrt_run, "gpu_session", lambda target: gpu.session)
    runner = StageRunner(bundle, target=target)
    runner.__dict__["choice"] = dataclasses.make_dataclass("Choice", ["target", "reason"])(target, "as requested")
    return Place(bundle, gpu, runner)


def conditions(batch: int, *, guided: bool = False) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    fixed = {
        "context": rng.standard_normal((batch, 3, LATENT, LATENT)).astype(np.float32),
        "text_embedding": rng.standard_normal((batch, 6)).astype(np.float32),
    }
    return {**fixed, "guidance_scale": np.linspace(1, 3, batch, dtype=np.float32)} if guided else fixed


def chain(
    runner: StageRunner,
    *,
    batch: int = 1,
    sampler: str = "ddim",
    steps: int | None = 6,
    eta: float | None = None,
    guided: bool = False,
    every_latent: bool = False,
) -> tuple[np.ndarray, list[np.ndarray | None]]:
    """Run a chain, and return its last latent and the latent reported at each step."""
    told: list[np.ndarray | None] = []
    table = sampler_table(sampler, SCHEDULE, steps, eta)
    source = seeded_noise(range(batch), SHAPE)
    latent = runner.sample(
        "step_guided" if guided else "step",
        conditions(batch, guided=guided),
        table,
        source,
        on_step=lambda _, latent: told.append(latent),
        every_latent=every_latent,
    )
    return latent, told


# --------------------------------------------------------------------------------------- the driver


def test_the_driver_tells_what_gpus_there_are():
    driver = CudaDriver(FakeLibrary(("NVIDIA L4", (8, 9)), ("NVIDIA H200", (9, 0))))
    first, second = driver.gpus()
    assert first == Gpu("NVIDIA L4", (8, 9), 24 << 30, "13.0")
    assert (first.architecture, second.architecture) == ("SM89", "SM90")
    assert CudaDriver(FakeLibrary(("none", (0, 0)))).gpus() == ()


def test_an_error_of_the_driver_is_told_in_its_words():
    library = FakeLibrary()
    driver = CudaDriver(library)
    driver.use_first_gpu()
    library.memory = 100
    with pytest.raises(EngineError, match=r"failed in cuMemAlloc_v2: out of memory \(error 2\)"):
        driver.allocate(101)
    stream = driver.create_stream()
    driver.begin_capture(stream)
    with pytest.raises(EngineError, match=r"failed in cuStreamBeginCapture_v2: error 900"):
        driver.begin_capture(stream)


def test_a_context_is_one_threads():
    """The fake is as strict as the driver; the tests with threads rely on this."""
    driver = CudaDriver(FakeLibrary())
    driver.use_first_gpu()
    with pytest.raises(EngineError, match=r"cuMemAlloc_v2: invalid device context \(error 201\)"):
        in_thread(lambda: driver.allocate(1))

    def bound() -> int:
        driver.bind()
        return driver.allocate(1)

    assert in_thread(bound)


# ------------------------------------------------------------------------------------------ threads


def in_thread(work: Callable[[], Any]) -> Any:
    """Run work in a new thread, and return its result or raise its exception."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_any_thread_may_load_and_run(place: Place):
    feeds = feeds_for(place.bundle.stages["decode"], batch=1)
    expected = OnnxRuntimeEngine(place.bundle.stage_path("decode"), place.bundle.stages["decode"], threads=1).run(feeds)
    engine = in_thread(lambda: place.runner.engine("decode"))
    for found in (in_thread(lambda: engine.run(feeds)), engine.run(feeds)):
        np.testing.assert_array_equal(found["frames"], expected["frames"])


def test_any_thread_may_take_a_chains_steps(place: Place):
    expected, _ = chain(place.runner)
    table = sampler_table("ddim", SCHEDULE, 6, None)
    source = seeded_noise(range(1), SHAPE)
    loop = in_thread(lambda: place.runner.engine("step").denoise_loop(1))  # type: ignore[attr-defined]
    in_thread(lambda: loop.begin(source(START), conditions(1), table))
    for index in range(6):
        noise = source(index) if table.draws_noise[index] else None
        in_thread(functools.partial(loop.step, index, noise))
    np.testing.assert_array_equal(in_thread(loop.latent), expected)
    np.testing.assert_array_equal(in_thread(loop.finish), expected)


def test_any_thread_gives_memory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = make_place("tensorrt", tmp_path, monkeypatch)
    library, before = place.gpu.library, len(place.gpu.library.device)
    buffers = [DeviceBuffer(place.gpu.session.driver, 8), DeviceBuffer(place.gpu.session.driver, 8)]
    assert len(library.device) == before + 2
    in_thread(buffers.clear)
    assert len(library.device) == before


def test_threads_take_turns(place: Place, monkeypatch: pytest.MonkeyPatch):
    """If a thread replaced the activation memory between another's `prepare` and `enqueue`, the other would run in
    freed memory."""
    stages = ("encode", "denoise", "decode")
    engines = {stage: place.runner.engine(stage) for stage in stages}
    prepare, enqueue = PlanContext.prepare, PlanContext.enqueue
    order: list[tuple[str, int]] = []

    def slow_prepare(context: PlanContext, shapes: Any) -> bool:
        fresh = prepare(context, shapes)
        order.append(("prepare", threading.get_ident()))
        time.sleep(0.002)  # lets another thread run in between, if possible
        return fresh

    def noted_enqueue(context: PlanContext) -> None:
        order.append(("enqueue", threading.get_ident()))
        enqueue(context)

    monkeypatch.setattr(PlanContext, "prepare", slow_prepare)
    monkeypatch.setattr(PlanContext, "enqueue", noted_enqueue)
    together = threading.Barrier(len(stages))

    def work(stage: str) -> None:
        together.wait(60)
        for batch in (1, 2, 3, 4):  # each needs more memory than the one before
            feeds = feeds_for(place.bundle.stages[stage], batch=batch)
            found = engines[stage].run(feeds)
            exact = OnnxRuntimeEngine(place.bundle.stage_path(stage), place.bundle.stages[stage], threads=1).run(feeds)
            for name, values in exact.items():
                np.testing.assert_array_equal(found[name], values)

    with ThreadPoolExecutor(len(stages)) as pool:
        for running in [pool.submit(work, stage) for stage in stages]:
            running.result()
    assert len(order) == 2 * 4 * len(stages)
    for (first, one), (second, other) in zip(order[::2], order[1::2], strict=True):
        assert (first, second, one) == ("prepare", "enqueue", other)


def test_threads_that_come_first_together_get_one_session(monkeypatch: pytest.MonkeyPatch):
    made: list[object] = []
    together = threading.Barrier(2)

    def make(_api: object, _driver: object) -> object:
        made.append(object())
        time.sleep(0.01)  # lets the other thread run too
        return made[-1]

    monkeypatch.setattr(gpu_session, "GpuSession", make)
    monkeypatch.setattr(gpu_session, "load_api", lambda target: None)
    monkeypatch.setattr(gpu_session, "load_driver", lambda: None)
    monkeypatch.setattr(gpu_session, "_session", functools.cache(gpu_session._session.__wrapped__))

    def first() -> object:
        together.wait(60)
        return gpu_session.gpu_session("tensorrt")

    with ThreadPoolExecutor(2) as pool:
        one, other = [running.result() for running in [pool.submit(first), pool.submit(first)]]
    assert one is other
    assert len(made) == 1


# ------------------------------------------------------------------------------------------ one run


@pytest.mark.parametrize("stage", ["encode", "denoise", "step_guided", "decode", "estimate_motion"])
def test_a_run_gives_what_the_graph_gives(place: Place, stage: str):
    spec = place.bundle.stages[stage]
    engine = place.runner.engine(stage)
    reference = OnnxRuntimeEngine(place.bundle.stage_path(stage), spec, threads=1)
    for batch in (1, 3, 2, 2):
        feeds = feeds_for(spec, batch=batch)
        found, expected = engine.run(feeds), reference.run(feeds)
        assert list(found) == [tensor.name for tensor in spec.outputs]
        for name, values in expected.items():
            assert_same_floats(found[name], values)


def test_a_run_in_order(place: Place):
    engine = place.runner.engine("denoise")
    place.calls.clear()
    engine.run(feeds_for(engine.spec, batch=2))
    asked = [entry.partition(": ")[2] for entry in place.gpu.log]
    assert list(dict.fromkeys(asked)) == ["shape", "size", "memory", "address", "execute"]
    assert asked.count("address") == len(engine.spec.inputs) + len(engine.spec.outputs)
    assert place.calls.count("cuStreamSynchronize") == 1
    assert place.calls[-1] == "cuStreamSynchronize"
    assert len(place.gpu.library.streams) == 1
    place.gpu.log.clear()
    place.calls.clear()
    engine.run(feeds_for(engine.spec, batch=2))
    assert not [entry for entry in place.gpu.log if entry.endswith(("shape", "size", "memory"))], "nothing changed"
    assert not [name for name in place.calls if "Alloc" in name]


def test_results_are_the_callers_own(place: Place):
    engine = place.runner.engine("encode")
    first = engine.run(feeds_for(engine.spec, batch=1))
    kept = {name: values.copy() for name, values in first.items()}
    engine.run({name: values * 2 for name, values in feeds_for(engine.spec, batch=1).items()})
    for name, values in kept.items():
        np.testing.assert_array_equal(first[name], values)


def test_activations_are_shared_and_grow(place: Place):
    encode, decode = place.runner.engine("encode"), place.runner.engine("decode")
    encode.run(feeds_for(encode.spec, batch=1))
    decode.run(feeds_for(decode.spec, batch=1))
    (context_1,), (context_2,) = (place.gpu.loaded[stage].contexts for stage in ("encode", "decode"))
    assert context_1.memory == context_2.memory
    decode.run(feeds_for(decode.spec, batch=4))
    assert context_2.memory != context_1.memory
    found = encode.run(feeds_for(encode.spec, batch=1))  # its former memory is freed
    assert context_1.memory == context_2.memory
    assert np.isfinite(found["context"]).all()


def test_memory_is_given_back(place: Place):
    engine = place.runner.engine("decode")
    engine.run(feeds_for(engine.spec, batch=2))
    held = len(place.gpu.library.device), len(place.gpu.library.pinned)
    assert held == (1 + len(engine.spec.inputs) + len(engine.spec.outputs), held[0] - 1)
    place.runner._engines.clear()
    del engine
    assert (len(place.gpu.library.device), len(place.gpu.library.pinned)) == (1, 0), "the activations stay"


def test_wrong_feeds_are_named(place: Place):
    engine = place.runner.engine("denoise")
    feeds = feeds_for(engine.spec, batch=2)
    with pytest.raises(EngineError, match="input context has dtype float64, expected float32"):
        engine.run({**feeds, "context": feeds["context"].astype(np.float64)})
    decode = place.runner.engine("decode")
    too_many = feeds_for(decode.spec, batch=9)
    with pytest.raises(EngineError, match=r"stage 'decode' in TensorRT.* 11\.4\.0 refuses the shape \(9, .* profile"):
        decode.run(too_many)


def test_a_failing_run_names_the_stage(place: Place):
    engine = place.runner.engine("encode")
    place.gpu.failing = True
    with pytest.raises(EngineError, match=r"stage 'encode' in TensorRT.* failed: the kernel failed$"):
        engine.run(feeds_for(engine.spec, batch=1))


def test_a_plan_of_another_stage_is_refused(bundle: Bundle, tmp_path: Path):
    gpu = FakeGpu("tensorrt", bundle.stages)
    path = fake_plan(bundle, "encode", tmp_path / "x.plan")
    with pytest.raises(EngineError, match=r"x\.plan is not the stage 'step': its inputs are image, expected noisy"):
        TensorRtEngine(path, bundle.stages["step"], session=gpu.session)

    def changed(**change: Any) -> StageSpec:
        spec = bundle.stages["encode"]
        return dataclasses.replace(spec, inputs=(dataclasses.replace(spec.inputs[0], **change),))

    with pytest.raises(EngineError, match=r"image is a tensor\(float\), expected tensor\(int64\)"):
        TensorRtEngine(path, changed(dtype="int64"), session=gpu.session)
    with pytest.raises(EngineError, match=r"image has shape \(-1, 3, 16, 16\), expected"):
        TensorRtEngine(path, changed(shape=("batch", 3, SIZE, 8)), session=gpu.session)
    (tmp_path / "x.plan").write_bytes(b"junk")
    with pytest.raises(EngineError, match=r"cannot load .*x\.plan on NVIDIA L4: the plan is damaged"):
        TensorRtEngine(path, bundle.stages["encode"], session=gpu.session)


def test_rtx_keeps_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = make_place("tensorrt-rtx", tmp_path, monkeypatch)
    engine = place.runner.engine("encode")
    engine.run(feeds_for(engine.spec, batch=1))
    kept = place.bundle.path / "plans" / "tensorrt-rtx" / "kernels-SM89.cache"
    assert kept.read_bytes() == b"kernels of encode"
    (context,) = place.gpu.loaded["encode"].contexts
    assert context.config.cuda_graph_strategy.name == "WHOLE_GRAPH_CAPTURE"
    assert context.config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
    again = FakeGpu("tensorrt-rtx", place.bundle.stages)
    monkeypatch.setattr(tensorrt_run, "gpu_session", lambda target: again.session)
    place.runner._engines.clear()
    place.runner.engine("decode")
    cache = again.loaded["decode"].contexts[0].config.cache
    assert cache is not None
    assert cache.data == b"kernels of encode"


# ----------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize(
    ("sampler", "steps", "eta", "batch", "guided"),
    [
        ("ddim", 6, 1.0, 1, False),
        ("ddim", 6, 0.0, 3, False),
        ("ddim", 5, 0.5, 2, True),
        ("ddpm", None, None, 2, False),
        ("dpm++2m", 6, None, 1, True),
        ("unipc", 7, None, 2, False),
        ("ddim", 1, 1.0, 1, False),
        ("ddim", 3, 1.0, 35, False),
        ("ddim", 3, 1.0, 17, True),
    ],
)
def test_a_chain_is_that_of_the_host(
    place: Place, sampler: str, steps: int | None, eta: float | None, batch: int, guided: bool
):
    host = StageRunner(place.bundle, threads=1, target="onnxruntime")
    expected, _ = chain(host, batch=batch, sampler=sampler, steps=steps, eta=eta, guided=guided)
    for _ in range(2):
        found, told = chain(place.runner, batch=batch, sampler=sampler, steps=steps, eta=eta, guided=guided)
        assert_same_floats(found, expected)
        assert set(map(type, told)) == {type(None)}, "the latents stayed where they were"
    assert found.flags.owndata


def test_nothing_waits_within_a_chain(place: Place):
    chain(place.runner, batch=2)
    place.calls.clear()
    place.gpu.log.clear()
    found: list[list[str]] = []
    table = sampler_table("ddim", SCHEDULE, 6, 1.0)
    source = seeded_noise(range(2), SHAPE)
    place.runner.sample(
        "step", conditions(2), table, source, on_step=lambda *_: found.append(list(place.calls)), every_latent=False
    )
    assert not set(found[-1]) & set(WAITS), "from the first byte to the last step"
    assert [name for name in place.calls if name in WAITS] == ["cuStreamSynchronize"]
    assert not [name for name in place.calls if "Alloc" in name], "the second chain takes no memory"
    assert len(place.gpu.library.streams) == 1


def test_the_step_is_captured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = make_place("tensorrt", tmp_path, monkeypatch)
    chain(place.runner, steps=6)
    assert place.calls.count("cuStreamBeginCapture_v2") == 1
    assert place.calls.count("cuGraphInstantiateWithFlags") == 1
    assert place.calls.count("cuGraphLaunch") == 5, "all but the first, which prepares"
    assert place.gpu.log.count("step: execute") == 2, "the first, and the captured one"
    chain(place.runner, steps=4)
    assert place.calls.count("cuStreamBeginCapture_v2") == 1
    assert place.calls.count("cuGraphLaunch") == 9
    chain(place.runner, steps=4, batch=2)
    assert place.calls.count("cuStreamBeginCapture_v2") == 2, "another batch is another graph"
    assert len(place.gpu.library.graphs) == 2


def test_a_graph_knows_its_own_context_and_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = make_place("tensorrt", tmp_path, monkeypatch)
    host = StageRunner(place.bundle, threads=1, target="onnxruntime")
    for batch in (1, 2, 1):
        engine = place.runner.engine("step")
        engine.run(feeds_for(engine.spec, batch=3))  # a single run of the same engine, before the chain
        assert_same_floats(chain(place.runner, batch=batch)[0], chain(host, batch=batch)[0])
    assert len(place.gpu.loaded["step"].contexts) == 3, "the engine's own, and one for each batch"


def test_rtx_captures_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = make_place("tensorrt-rtx", tmp_path, monkeypatch)
    chain(place.runner, steps=6)
    assert not [name for name in place.calls if "Capture" in name or "Graph" in name]
    assert place.gpu.log.count("step: execute") == 6


def test_memory_that_moves_has_the_step_captured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = make_place("tensorrt", tmp_path, monkeypatch)
    expected, _ = chain(place.runner, steps=6)
    decode = place.runner.engine("decode")
    decode.run(feeds_for(decode.spec, batch=4))
    found, _ = chain(place.runner, steps=6)
    assert_same_floats(found, expected)
    assert place.calls.count("cuStreamBeginCapture_v2") == 2


def test_parts_of_a_batch_may_move_each_others_memory(place: Place):
    host = StageRunner(place.bundle, threads=1, target="onnxruntime")
    expected, _ = chain(host, batch=33, steps=4)
    assert_same_floats(chain(place.runner, batch=33, steps=4)[0], expected)
    place.gpu.activation_bytes = 1 << 16
    place.runner._loops.clear()
    assert_same_floats(chain(place.runner, batch=33, steps=4)[0], expected)


def test_little_pinned_memory_makes_it_wait_but_not_wrong(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(device_loop, "NOISE_BYTES", 1)
    host = StageRunner(place.bundle, threads=1, target="onnxruntime")
    found, _ = chain(place.runner, batch=2, sampler="ddpm", steps=None)
    assert_same_floats(found, chain(host, batch=2, sampler="ddpm", steps=None)[0])
    assert place.calls.count("cuEventSynchronize") > 0


def test_every_latent_can_be_had(place: Place):
    host = StageRunner(place.bundle, threads=1, target="onnxruntime")
    last, expected = chain(host, batch=2, every_latent=True)
    found_last, found = chain(place.runner, batch=2, every_latent=True)
    assert_same_floats(found_last, last)
    assert len(found) == len(expected) == 6
    for one, other in zip(found, expected, strict=True):
        assert one is not None
        assert other is not None
        assert_same_floats(one, other)


def test_a_chain_left_half_done_leaves_no_trace(place: Place):
    expected, _ = chain(place.runner)

    class Stop(Exception):
        pass

    def stop(index: int, _: Any) -> None:
        if index == 2:
            raise Stop

    table, source = sampler_table("ddim", SCHEDULE, 6, 1.0), seeded_noise([9], SHAPE)
    with pytest.raises(Stop):
        place.runner.sample("step", conditions(1), table, source, on_step=stop)
    assert_same_floats(chain(place.runner)[0], expected)


def test_a_capture_that_fails_leaves_the_stream_usable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = make_place("tensorrt", tmp_path, monkeypatch)
    expected, _ = chain(place.runner, steps=1)
    place.gpu.failing = True
    with pytest.raises(EngineError, match=r"stage 'step' in TensorRT 11\.4\.0 failed"):
        chain(place.runner)
    assert place.calls.count("cuStreamBeginCapture_v2") == place.calls.count("cuStreamEndCapture") == 1
    place.gpu.failing = False
    assert place.gpu.library.graphs == {}
    assert_same_floats(chain(place.runner, steps=1)[0], expected)


def test_pinned_noise_may_be_changed_at_once(place: Place):
    """A caller may reuse one array for all noise."""
    host = StageRunner(place.bundle, threads=1, target="onnxruntime")
    table = sampler_table("ddim", SCHEDULE, 6, 1.0)

    def draws(*, reused: bool) -> NoiseSource:
        draw = np.empty((1, *SHAPE), np.float32)

        def source(step: int) -> Any:
            draw[...] = np.random.default_rng(step + 5).standard_normal(draw.shape)
            return draw if reused else draw.copy()

        return source

    found = place.runner.sample("step", conditions(1), table, draws(reused=True))
    assert_same_floats(found, host.sample("step", conditions(1), table, draws(reused=False)))


# ---------------------------------------------------------------------------------- whole clips


def test_a_clip_is_the_one_of_onnx_runtime(place: Place):
    photo = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)
    pipe = Pipeline.open(place.bundle)
    pipe.stages = place.runner
    reference = Pipeline.open(place.bundle, threads=1, target="onnxruntime")
    for guidance in (1.0, 2.0, 0.0):
        clip = pipe.generate(photo, label=["anger", "happiness"], seed=3, guidance_scale=guidance)
        expected = reference.generate(photo, label=["anger", "happiness"], seed=3, guidance_scale=guidance)
        assert_same_floats(clip.latent, expected.latent)
        assert np.abs(clip.frames.astype(int) - expected.frames).max() <= 1
        assert np.abs(clip.warped.astype(int) - expected.warped).max() <= 1


def latents(batch: int, frames: int) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((batch, 3, frames, LATENT, LATENT), np.float32)


@pytest.mark.parametrize(
    ("batch", "frames", "runs"), [(1, 5, 1), (2, 5, 1), (3, 5, 2), (1, 20, 2), (5, 5, 3), (1, 2, 1)]
)
def test_what_all_frames_share_is_uploaded_once(place: Place, batch: int, frames: int, runs: int):
    """The image and the encoder's outputs of each sample go up once per clip, and chunks are rows of few runs."""
    pipe, latent = Pipeline.open(place.bundle), latents(batch, frames)
    pipe.stages = place.runner
    photos = np.random.default_rng(0).integers(0, 256, (batch, SIZE, SIZE, 3), np.uint8)
    encoded = pipe.encode(photos)
    pipe.decode(encoded, latent)
    place.calls.clear()
    found = pipe.decode(encoded, latent)
    shared = 1 + len(encoded.skips)
    alone = frames == CHUNK  # one run takes all at once
    assert place.calls.count("cuMemcpyHtoDAsync_v2") == (shared if alone else batch * shared) + runs
    assert place.calls.count("cuMemcpyDtoHAsync_v2") == 2 * runs
    assert not [name for name in place.calls if "Alloc" in name or "Free" in name]
    reference = Pipeline.open(place.bundle, threads=1, target="onnxruntime")
    for one, expected in zip(found, reference.decode(encoded, latent), strict=True):
        assert_same_floats(one, expected)


def test_as_many_rows_as_the_memory_allows(place: Place, monkeypatch: pytest.MonkeyPatch):
    pipe, latent = Pipeline.open(place.bundle), latents(1, 20)
    pipe.stages = place.runner
    encoded = pipe.encode(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    rows: list[int] = []
    real = TensorRtEngine.keep

    def keep(engine: TensorRtEngine, inputs: Any, count: int) -> Any:
        rows.append(count)
        if count > 2:
            raise DeviceMemoryError("no memory")
        return real(engine, inputs, count)

    monkeypatch.setattr(TensorRtEngine, "keep", keep)
    found = pipe.decode(encoded, latent)
    assert rows == [5, 2], "ten chunks as two runs of five, then as five of two"
    reference = Pipeline.open(place.bundle, threads=1, target="onnxruntime")
    for one, expected in zip(found, reference.decode(encoded, latent), strict=True):
        assert_same_floats(one, expected)
    rows.clear()
    pipe.decode(encoded, latent)
    assert rows == [2], "what does not fit is not tried again"


def test_kept_inputs_are_checked(place: Place):
    engine = place.runner.engine("decode")
    assert isinstance(engine, TensorRtEngine)
    feeds = feeds_for(engine.spec, batch=2)
    fixed = {name: values for name, values in feeds.items() if name != "latent"}
    kept = engine.keep(fixed, 1)
    with pytest.raises(EngineError, match="lacks the input latent"):
        kept.run({})
    with pytest.raises(EngineError, match="unexpected input image"):
        kept.run(feeds)
    with pytest.raises(EngineError, match="expected batch 2, found 1"):
        kept.run({"latent": feeds["latent"][:1]})
    with pytest.raises(EngineError, match="image has dtype float64"):
        engine.keep({**fixed, "image": fixed["image"].astype(np.float64)}, 1)
    for name, values in engine.run(feeds).items():
        assert_same_floats(kept.run({"latent": feeds["latent"]})[name], values)


def test_values_that_are_not_finite_are_found_at_the_end(place: Place, monkeypatch: pytest.MonkeyPatch):
    pipe = Pipeline.open(place.bundle)
    pipe.stages = place.runner
    monkeypatch.setattr(device_loop.DeviceLoop, "finish", lambda self: np.full((1, *SHAPE), np.nan, np.float32))
    photo = np.zeros((SIZE, SIZE, 3), np.uint8)
    with pytest.raises(EngineError, match="step 4 of 4 gave values that are not finite"):
        pipe.generate(photo, label="anger")


# ------------------------------------------------------------------------------------- stripped plans


def test_a_stripped_plan_gets_the_bundles_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lfdm_export.engines.tensorrt.plan_graph import builder_graph

    place = make_place("tensorrt", tmp_path, monkeypatch, BuildOptions(strip=True))
    with pytest.raises(EngineError, match=r"of another structure than the bundle's; make it with: .* --strip"):
        place.runner.engine("encode")
    graph, structure, _ = builder_graph(place.bundle, "encode", "tensorrt")
    path = PlanFolder(place.bundle.path, "tensorrt").record_path("encode")
    record = json.loads(path.read_text(encoding="utf-8"))
    record["fingerprint"]["structure"] = structure
    path.write_text(json.dumps(record), encoding="utf-8")
    place.runner.engine("encode")
    assert place.gpu.loaded["encode"].refitted == [graph]


def test_weights_that_do_not_fit_are_an_error(bundle: Bundle, tmp_path: Path):
    gpu = FakeGpu("tensorrt", bundle.stages)
    path = fake_plan(bundle, "encode", tmp_path / "x.plan")
    with pytest.raises(EngineError, match="the weights do not fit the plan"):
        TensorRtEngine(path, bundle.stages["encode"], session=gpu.session, weights=(b"", "x"))


# -------------------------------------------------------------- the fakes and the real packages


def names_of(kind: type) -> set[str]:
    return {name for name in vars(kind) if not name.startswith("_")}


def test_the_fakes_have_no_name_that_the_real_ones_lack():
    import onnxruntime_ep_nv_tensorrt_rtx  # noqa: F401  # loads the libraries of the next
    import tensorrt_rtx_bindings as trt

    from tests import fake_gpu

    for fake, real in (
        (fake_gpu.FakeRuntime, trt.Runtime),
        (fake_gpu.FakeContext, trt.IExecutionContext),
        (fake_gpu.FakeRuntimeConfig, trt.IRuntimeConfig),
        (fake_gpu.FakeRuntimeCache, trt.IRuntimeCache),
        (fake_gpu.FakeEngine, trt.ICudaEngine),
        (fake_gpu.FakeRefitter, trt.Refitter),
        (fake_gpu.FakeParserRefitter, trt.OnnxParserRefitter),
    ):
        assert names_of(fake) - {"batch"} <= set(dir(real)), fake
    for kind in ("ExecutionContextAllocationStrategy", "TensorIOMode", "DataType", "CudaGraphStrategy"):
        gpu = FakeGpu("tensorrt", {})
        assert {one.name for one in getattr(gpu.module, kind)} <= set(getattr(trt, kind).__members__), kind
