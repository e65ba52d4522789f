from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.compiled_cache import SIZE_VARIABLE, CompiledCache, user_compiled_cache
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.engines.openvino.cache import cache_key
from lfdm_export.engines.openvino.engine import OpenVinoEngine, shared_core
from lfdm_export.errors import EngineError, InputError
from lfdm_export.files.atomic import part_name, replacing
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.generate.stage_runner import load_engine
from lfdm_export.sampling import rows
from lfdm_export.sampling.loop import apply_step
from lfdm_export.stages import StageSpec, TensorSpec
from tests.closeness import assert_same_floats
from tests.fake_bundle import SPECS, Feeds, fake_graph, feeds_for, predicted_noise, with_input
from tests.processor import needs_openvino

pytestmark = needs_openvino
DENOISE = SPECS["denoise"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "denoise.onnx"
    onnx.save(fake_graph(DENOISE), path)
    return path


@pytest.fixture(scope="module")
def engine(path: Path) -> OpenVinoEngine:
    return OpenVinoEngine(path, DENOISE, threads=1)


@pytest.mark.parametrize("batch", [1, 3])
def test_run_gives_the_graphs_outputs(engine: OpenVinoEngine, batch: int):
    feeds = feeds_for(DENOISE, batch=batch)
    outputs = engine.run(feeds)
    assert list(outputs) == ["predicted_noise"]
    expected = predicted_noise(*(feeds[tensor.name] for tensor in DENOISE.inputs)).astype(np.float32)
    np.testing.assert_allclose(outputs["predicted_noise"].astype(np.float32), expected, atol=1e-6)


def test_views_are_fine_and_results_are_the_callers(engine: OpenVinoEngine):
    feeds = feeds_for(DENOISE, batch=2)
    turned = {name: np.asfortranarray(array)[::-1] for name, array in feeds.items()}
    expected = engine.run({name: array[::-1].copy() for name, array in feeds.items()})
    found = engine.run(turned)["predicted_noise"]
    engine.run(feeds)  # must not overwrite earlier outputs
    assert_same_floats(found, expected["predicted_noise"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("context"), "'denoise' lacks the input context"),
        (lambda f: f.update(more=f["context"]), "'denoise' has the unexpected input more"),
        (lambda f: f.update(context=f["context"].astype(np.float64)), "context has dtype float64, expected float32"),
        (lambda f: f.update(context=f["context"][:, :2]), r"context has shape \(2, 2, 4, 4\), expected"),
        (lambda f: f.update(context=f["context"][:1]), "batch = 2"),
    ],
)
def test_feeds_are_checked(engine: OpenVinoEngine, change: Callable[[Feeds], object], message: str):
    feeds = feeds_for(DENOISE, batch=2)
    change(feeds)
    with pytest.raises(EngineError, match=message):
        engine.run(feeds)


def test_two_dynamic_axes(tmp_path: Path):
    onnx.save(fake_graph(SPECS["text"]), tmp_path / "text.onnx")
    engine = OpenVinoEngine(tmp_path / "text.onnx", SPECS["text"], threads=1)
    for tokens in (4, 7):
        feeds = feeds_for(SPECS["text"], batch=1, tokens=tokens)
        total = float((feeds["input_ids"] * feeds["attention_mask"]).sum())
        found: NDArray[Any] = engine.run(feeds)["text_embedding"]
        np.testing.assert_allclose(found, np.full((1, 6), total))


def test_no_file(tmp_path: Path):
    with pytest.raises(EngineError, match=r"no graph at .*x\.onnx; export again"):
        OpenVinoEngine(tmp_path / "x.onnx", DENOISE)


@pytest.mark.parametrize("data", [b"", b"not a graph", None])
def test_damaged_file(path: Path, tmp_path: Path, data: bytes | None):
    whole = path.read_bytes()
    damaged = tmp_path / "denoise.onnx"
    damaged.write_bytes(whole[: len(whole) // 2] if data is None else data)
    with pytest.raises(EngineError, match=r"cannot load .*denoise\.onnx.*export again|not the stage") as caught:
        OpenVinoEngine(damaged, DENOISE)
    assert "\n" not in str(caught.value)


def external(model: onnx.ModelProto, location: str, length: int | None = None) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(
            tensor, location, offset=0, length=len(tensor.raw_data) if length is None else length
        )
        tensor.ClearField("raw_data")
    return model


def test_external_weights_must_lie_beside_the_graph_and_be_whole(tmp_path: Path):
    (tmp_path / "secret").write_bytes(bytes(4096))
    folder = tmp_path / "onnx"
    folder.mkdir()
    graph = folder / "denoise.onnx"
    graph.write_bytes(external(fake_graph(DENOISE), "../secret").SerializeToString())
    with pytest.raises(EngineError, match="which is not a file beside it"):
        OpenVinoEngine(graph, DENOISE)
    graph.write_bytes(external(fake_graph(DENOISE), "weights").SerializeToString())
    with pytest.raises(EngineError, match="cannot load"):
        OpenVinoEngine(graph, DENOISE)
    (folder / "weights").write_bytes(bytes(1))
    with pytest.raises(EngineError, match="too short"):
        OpenVinoEngine(graph, DENOISE)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SPECS["step"], "not the stage 'step': its inputs are noisy_latent, context, text_embedding, timestep, ex"),
        (replace(DENOISE, inputs=DENOISE.inputs[::-1]), "its inputs are"),
        (
            replace(DENOISE, outputs=(replace(DENOISE.outputs[0], name="noise"),)),
            "outputs are predicted_noise, expected noise",
        ),
        (
            with_input(DENOISE, lambda t: replace(t, dtype="int64")),
            r"noisy_latent is a tensor\(float\), expected tensor\(int64\)",
        ),
        (with_input(DENOISE, lambda t: replace(t, shape=("batch", 4, 5, 4, 4))), "noisy_latent has shape .*expected"),
        (with_input(DENOISE, lambda t: replace(t, shape=("batch", 3))), "noisy_latent has shape"),
    ],
)
def test_the_graph_of_another_stage_is_refused(path: Path, spec: StageSpec, message: str):
    with pytest.raises(EngineError, match=message):
        OpenVinoEngine(path, spec)


def test_a_failing_run_names_the_stage(tmp_path: Path):
    onnx.save(
        fake_graph(DENOISE, "    predicted_noise = Reshape (noisy_latent, timestep)\n"), tmp_path / "denoise.onnx"
    )
    engine = OpenVinoEngine(tmp_path / "denoise.onnx", DENOISE, threads=1)
    with pytest.raises(EngineError, match="stage 'denoise' failed in OpenVINO"):
        engine.run(feeds_for(DENOISE, batch=2))


def test_inputs_that_lead_nowhere_are_still_the_stages(tmp_path: Path):
    onnx.save(fake_graph(DENOISE, "    predicted_noise = Neg (noisy_latent)\n"), tmp_path / "denoise.onnx")
    engine = OpenVinoEngine(tmp_path / "denoise.onnx", DENOISE, threads=1)
    for batch in (1, 2):
        feeds = feeds_for(DENOISE, batch=batch)
        np.testing.assert_array_equal(engine.run(feeds)["predicted_noise"], -feeds["noisy_latent"])
    del feeds["context"]
    with pytest.raises(EngineError, match="lacks the input context"):
        engine.run(feeds)


def test_options_are_checked(path: Path):
    with pytest.raises(EngineError, match="threads is 0"):
        OpenVinoEngine(path, DENOISE, threads=0)
    with pytest.raises(EngineError, match="unknown precision 'fp4' for OpenVINO; expected one of fp32"):
        OpenVinoEngine(path, DENOISE, precision="fp4")


def test_a_precision_that_the_processor_has_not_is_no_silent_fp32(path: Path, monkeypatch: pytest.MonkeyPatch):
    import openvino

    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(EngineError, match=r"no bf16 for OpenVINO .*export fp32"):
        OpenVinoEngine(path, DENOISE, precision="bf16")
    # The parts of an int8 graph that are not quantized make no promise of precision.
    OpenVinoEngine(path, DENOISE, precision="int8")


@pytest.mark.parametrize("package", ["openvino", "onnx"])
def test_missing_packages(path: Path, package: str):
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from lfdm_export.engines.openvino.engine import OpenVinoEngine\n"
        "from lfdm_export.errors import MissingDependencyError\n"
        "from lfdm_export.stages import StageSpec\n"
        f"try:\n    OpenVinoEngine({str(path)!r}, StageSpec('denoise', (), (), (1, 1, 1), {{}}))\n"
        "except MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert package in done.stdout, done.stderr
    assert "pip install 'lfdm-export[openvino]'" in done.stdout


def test_signals_after_an_engine_is_gone(path: Path):
    """With one core per engine, destroyed with the engine, this program ended by SIGSEGV."""
    code = (
        "import gc, os, signal\n"
        "from lfdm_export.engines.openvino.engine import OpenVinoEngine\n"
        "from tests.fake_bundle import SPECS, feeds_for\n"
        f"engines = [OpenVinoEngine({str(path)!r}, SPECS['denoise'], threads=1) for _ in range(2)]\n"
        "for engine in engines:\n    engine.run(feeds_for(SPECS['denoise'], batch=1))\n"
        "del engine\n"
        "while engines:\n    del engines[0]\n    gc.collect()\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('heard'))\n"
        "os.kill(os.getpid(), signal.SIGUSR1)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr


def run_both(bundle: Bundle, stage: str, feeds: Feeds, **options: Any) -> tuple[Feeds, Feeds]:
    path, spec = bundle.stage_path(stage), bundle.stages[stage]
    expected = OnnxRuntimeEngine(path, spec, threads=1).run(feeds)
    return OpenVinoEngine(path, spec, threads=1, **options).run(feeds), expected


def drawn(bundle: Bundle, stage: str, batch: int) -> Feeds:
    """Draw feeds within the ranges of the stage's specification."""
    rng = np.random.default_rng(1)

    def draw(tensor: TensorSpec) -> Any:
        shape = tensor.concrete(batch=batch)
        if tensor.dtype == "int64":
            return rng.integers(0, 999, shape)
        if tensor.low is None or tensor.high is None:
            return rng.standard_normal(shape, np.float32)
        return rng.uniform(tensor.low, tensor.high, shape).astype(np.float32)

    return {tensor.name: draw(tensor) for tensor in bundle.stages[stage].inputs}


@pytest.mark.parametrize(("stage", "batch"), [("encode", 2), ("step", 1), ("step_guided", 2), ("decode", 1)])
def test_stages_agree_with_onnxruntime(small_bundle: Bundle, stage: str, batch: int):
    found, expected = run_both(small_bundle, stage, drawn(small_bundle, stage, batch))
    assert list(found) == list(expected)
    for name, array in expected.items():
        scale = max(1.0, float(np.abs(array).max()))
        assert np.abs(found[name] - array).max() <= small_bundle.stages[stage].tolerance["fp32"] * scale, name


def has_bf16() -> bool:
    return "BF16" in shared_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def test_bf16_rounds_the_network_but_not_coordinates_and_update(small_bundle: Bundle):
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    if limit != "ALL" and not limit.startswith("AVX512_CORE"):
        return  # OpenVINO queries the processor, not oneDNN, and crashes where they differ
    if not has_bf16():  # the error is tested above, on every machine
        with pytest.raises(EngineError, match="no bf16"):
            run_both(small_bundle, "decode", drawn(small_bundle, "decode", 1), precision="bf16")
        return
    feeds = drawn(small_bundle, "decode", 1)
    found, expected = run_both(small_bundle, "decode", feeds, precision="bf16")
    # If the coordinates were rounded, an error of 2^-9 would move the samples by an eighth of a pixel.
    assert np.abs(found["warped"] - expected["warped"]).max() < 1e-4
    assert 0 < np.abs(found["frames"] - expected["frames"]).max() < 5e-2

    feeds = drawn(small_bundle, "step", 1)
    # An update without the prediction: c2 x + c7 noise, exact in float32.
    feeds["coefficients"] = np.zeros((1, 11), np.float32)
    feeds["coefficients"][0, [rows.NEXT_FROM_LATENT, rows.NEXT_FROM_NOISE]] = 0.7, 0.3
    found, _ = run_both(small_bundle, "step", feeds, precision="bf16")
    exact, _ = apply_step(
        feeds["noisy_latent"], np.zeros_like(feeds["noise"]), feeds["history"], feeds["noise"], feeds["coefficients"]
    )
    np.testing.assert_allclose(found["next_latent"], exact, atol=1e-6)
    denoise = {name: feeds[name] for name in ("noisy_latent", "context", "text_embedding", "timestep")}
    rounded, whole = run_both(small_bundle, "denoise", denoise, precision="bf16")
    assert 0 < np.abs(rounded["predicted_noise"] - whole["predicted_noise"]).max() < 0.3


def test_a_clip(small_bundle: Bundle):
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    clips = []
    for target in ("onnxruntime", "openvino"):
        pipe = Pipeline(small_bundle, threads=1, target=target)
        clips.append(pipe.generate(image, label="happiness", steps=3, seed=1))
    difference = np.abs(clips[0].frames.astype(int) - clips[1].frames)
    assert (difference <= 1).mean() > 0.999


def test_the_cache_serves_exactly_what_it_was_made_of(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "cache"
    cache = CompiledCache(folder)
    feeds = feeds_for(DENOISE, batch=1)
    expected = OpenVinoEngine(path, DENOISE, threads=1, cache=cache).run(feeds)["predicted_noise"]
    (entry,) = folder.iterdir()
    whole = entry.read_bytes()

    import openvino

    def compile_model(*_: object) -> None:
        raise AssertionError("it was in the cache")

    with monkeypatch.context() as patch:
        patch.setattr(openvino.Core, "compile_model", compile_model)
        found = OpenVinoEngine(path, DENOISE, threads=1, cache=cache).run(feeds)["predicted_noise"]
        assert_same_floats(found, expected)
        with pytest.raises(AssertionError):  # another number of threads is another compiled model
            OpenVinoEngine(path, DENOISE, threads=2, cache=cache).run(feeds)
    for damaged in (whole[:-1], whole[: len(whole) // 2], b"", b"{}\n"):
        entry.write_bytes(damaged)
        again = OpenVinoEngine(path, DENOISE, threads=1, cache=cache).run(feeds)["predicted_noise"]
        assert_same_floats(again, expected)
        assert [one.name for one in folder.iterdir()] == [entry.name]
        assert len(entry.read_bytes()) > len(damaged), "the damaged entry was not replaced"


def test_a_cache_that_cannot_be_written_costs_nothing_but_itself(path: Path, tmp_path: Path):
    (tmp_path / "file").write_text("no folder")
    engine = OpenVinoEngine(path, DENOISE, threads=1, cache=CompiledCache(tmp_path / "file"))
    assert engine.run(feeds_for(DENOISE, batch=1))["predicted_noise"].shape == (1, 3, 5, 4, 4)


def test_cache_keys():
    weights = {"w": np.arange(4, dtype=np.uint8)}
    key = cache_key(b"graph", weights, {"threads": 1})
    assert key == cache_key(b"graph", {"w": weights["w"].copy()}, {"threads": 1})
    others = [
        cache_key(b"grapf", weights, {"threads": 1}),
        cache_key(b"graph", {"w": weights["w"][::-1].copy()}, {"threads": 1}),
        cache_key(b"graph", {"v": weights["w"]}, {"threads": 1}),
        cache_key(b"graph", weights, {"threads": 2}),
    ]
    assert key not in others
    assert len(set(others)) == len(others)


def test_cache_entries(tmp_path: Path):
    cache = CompiledCache(tmp_path / "deep" / "folder")
    assert cache.read("a", "key") is None
    cache.write("a", "key", b"blob")
    assert cache.read("a", "key") == b"blob"
    assert cache.read("a", "other") is None
    assert cache.read("b", "key") is None
    cache.write("a", "other", memoryview(b"more"))
    assert cache.read("a", "key") == b"blob"  # both entries stay, e.g. of two processors
    assert cache.read("a", "other") == b"more"
    assert cache.folder.stat().st_mode & 0o077 == 0


def names(cache: CompiledCache) -> list[str]:
    return sorted(path.name.partition("-")[0] for path in cache.folder.iterdir())


def test_a_full_cache_loses_what_was_used_longest_ago(tmp_path: Path):
    cache = CompiledCache(tmp_path, size=3 * 1200)
    for age, name in enumerate(("newest", "middle", "oldest")):
        cache.write(name, f"key of {name}", bytes(1000))
        (entry,) = tmp_path.glob(f"{name}-*")
        os.utime(entry, (1e9 - age, 1e9 - age))
    assert cache.read("oldest", "key of oldest") == bytes(1000)  # reading makes it the newest
    cache.write("more", "key", bytes(1000))
    assert names(cache) == ["more", "newest", "oldest"]
    cache.write("more", "key", bytes(1001))  # replaces itself; no other entry is removed
    assert names(cache) == ["more", "newest", "oldest"]
    cache.write("too large", "key", bytes(4000))
    assert names(cache) == ["more", "newest", "oldest"]
    cache.write("large", "key", bytes(3400))
    assert names(cache) == ["large"]


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path):
    cache = CompiledCache(tmp_path)
    part_name(tmp_path / "forgotten.compiled").write_bytes(bytes(10))
    with replacing(tmp_path / "another.compiled"):
        cache.write("a", "key", b"blob")
        kept = {path.name.split(".")[1] for path in tmp_path.iterdir() if path.suffix == ".part"}
        assert kept == {"another"}


@pytest.mark.parametrize(
    ("said", "size"), [("", 4_000_000_000), ("500MB", 500_000_000), ("1.5 gb", 1_500_000_000), ("7", 7), ("2k", 2000)]
)
def test_the_size_of_the_users_cache(said: str, size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SIZE_VARIABLE, said)
    assert user_compiled_cache("openvino") == CompiledCache(tmp_path / "lfdm-export" / "openvino", size)


def test_a_user_may_have_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(SIZE_VARIABLE, "0")
    assert user_compiled_cache("openvino") is None
    monkeypatch.setenv(SIZE_VARIABLE, "much")
    with pytest.raises(InputError, match="LFDM_CACHE_SIZE is 'much', expected a size such as 4GB"):
        user_compiled_cache("openvino")
    monkeypatch.delenv(SIZE_VARIABLE)
    monkeypatch.setattr("lfdm_export.engines.compiled_cache.optional_cache", lambda: None)
    assert user_compiled_cache("openvino") is None


def test_a_bundle_is_left_as_it_is(small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def files() -> list[str]:
        return sorted(str(path.relative_to(small_bundle.path)) for path in small_bundle.path.rglob("*"))

    before = files()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(SIZE_VARIABLE, raising=False)
    feeds = drawn(small_bundle, "encode", 1)
    load_engine(small_bundle, "encode", "openvino", threads=1).run(feeds)
    assert files() == before
    (entry,) = (tmp_path / "lfdm-export" / "openvino").iterdir()
    assert entry.name.startswith("encode-1-")
