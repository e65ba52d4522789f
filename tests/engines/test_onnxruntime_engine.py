from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime import engine as engine_module
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.engines.onnxruntime.gpu import require_on_gpu
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.errors import EngineError, MissingDependencyError
from lfdm_export.stages import StageSpec
from tests.closeness import assert_same_floats
from tests.fake_bundle import SPECS, Feeds, fake_graph, feeds_for, predicted_noise, with_input

DENOISE = SPECS["denoise"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "denoise.onnx"
    onnx.save(fake_graph(DENOISE), path)
    return path


@pytest.fixture(scope="module")
def engine(path: Path) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(path, DENOISE, threads=1)


@pytest.mark.parametrize("batch", [1, 3])
def test_run_gives_the_graphs_outputs(engine: OnnxRuntimeEngine, batch: int):
    feeds = feeds_for(DENOISE, batch=batch)
    outputs = engine.run(feeds)
    assert list(outputs) == ["predicted_noise"]
    expected = predicted_noise(*(feeds[tensor.name] for tensor in DENOISE.inputs)).astype(np.float32)
    np.testing.assert_allclose(outputs["predicted_noise"].astype(np.float32), expected, atol=1e-6)


def test_views_are_fine(engine: OnnxRuntimeEngine):
    feeds = feeds_for(DENOISE, batch=2)
    turned = {name: np.asfortranarray(array)[::-1] for name, array in feeds.items()}
    expected = engine.run({name: array[::-1].copy() for name, array in feeds.items()})
    assert_same_floats(engine.run(turned)["predicted_noise"], expected["predicted_noise"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("context"), "'denoise' lacks the input context; expected noisy_latent, context, text_embedd"),
        (lambda f: f.update(more=f["context"]), "'denoise' has the unexpected input more; expected"),
        (
            lambda f: f.update(context=f["context"].astype(np.float64)),
            "input context has dtype float64, expected float32",
        ),
        (
            lambda f: f.update(timestep=f["timestep"].astype(np.int32)),
            "input timestep has dtype int32, expected int64",
        ),
        (
            lambda f: f.update(context=f["context"][:, :2]),
            r"input context has shape \(2, 2, 4, 4\), expected \(batch, 3, 4, 4\), batch = 2",
        ),
        (lambda f: f.update(context=f["context"][0]), r"shape \(3, 4, 4\), expected \(batch, 3, 4, 4\)"),
        (lambda f: f.update(timestep=f["timestep"][:1]), r"input timestep has shape \(1,\).*batch = 2"),
        (lambda f: f.update({name: array[:0] for name, array in f.items()}), r"noisy_latent has shape \(0,"),
        (lambda f: f.update(context=f["context"].tolist()), "context is a list, expected a numpy array"),
    ],
)
def test_wrong_feeds_are_named(engine: OnnxRuntimeEngine, change: Callable[[Feeds], Any], message: str):
    feeds = feeds_for(DENOISE, batch=2)
    change(feeds)
    with pytest.raises(EngineError, match=message):
        engine.run(feeds)


def test_every_dynamic_axis_must_agree(tmp_path: Path):
    onnx.save(fake_graph(SPECS["text"]), tmp_path / "text.onnx")
    engine = OnnxRuntimeEngine(tmp_path / "text.onnx", SPECS["text"])
    feeds = feeds_for(SPECS["text"], batch=2, tokens=4)
    assert engine.run(feeds)["text_embedding"].shape == (2, 6)
    feeds["attention_mask"] = feeds["attention_mask"][:, :3]
    with pytest.raises(EngineError, match=r"attention_mask has shape \(2, 3\).*tokens = 4"):
        engine.run(feeds)


def test_no_file(tmp_path: Path):
    with pytest.raises(EngineError, match=r"no graph at .*x\.onnx; export again"):
        OnnxRuntimeEngine(tmp_path / "x.onnx", DENOISE)


@pytest.mark.parametrize("data", [b"", b"not a graph", None])
def test_damaged_file(path: Path, tmp_path: Path, data: bytes | None):
    whole = path.read_bytes()
    damaged = tmp_path / "denoise.onnx"
    damaged.write_bytes(whole[: len(whole) // 2] if data is None else data)
    with pytest.raises(EngineError, match=r"cannot load .*denoise\.onnx.*export again") as caught:
        OnnxRuntimeEngine(damaged, DENOISE)
    assert "\n" not in str(caught.value)


def test_external_data_outside_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "onnx").mkdir()
    model = fake_graph(DENOISE)
    for tensor in model.graph.initializer:
        onnx.external_data_helper.set_external_data(tensor, "../secret", offset=0, length=len(tensor.raw_data))
        tensor.ClearField("raw_data")
    (tmp_path / "onnx" / "denoise.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(EngineError, match="cannot load"):
        OnnxRuntimeEngine(tmp_path / "onnx" / "denoise.onnx", DENOISE)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            SPECS["step"],
            "not the stage 'step': its inputs are noisy_latent, context, text_embedding, timestep, ex",
        ),
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
        (with_input(DENOISE, lambda t: replace(t, shape=("batch", "channels", 5, 4, 4))), "noisy_latent has shape"),
    ],
)
def test_the_graph_of_another_stage_is_refused(path: Path, spec: StageSpec, message: str):
    with pytest.raises(EngineError, match=message):
        OnnxRuntimeEngine(path, spec)


def test_a_failing_run_names_the_stage(tmp_path: Path):
    onnx.save(
        fake_graph(DENOISE, "    predicted_noise = Reshape (noisy_latent, timestep)\n"), tmp_path / "denoise.onnx"
    )
    engine = OnnxRuntimeEngine(tmp_path / "denoise.onnx", DENOISE)
    with pytest.raises(EngineError, match="stage 'denoise' failed in ONNX Runtime"):
        engine.run(feeds_for(DENOISE, batch=1))


def test_options_are_checked(path: Path):
    with pytest.raises(EngineError, match="threads is 0"):
        OnnxRuntimeEngine(path, DENOISE, threads=0)
    with pytest.raises(EngineError, match="unknown device 'tpu'"):
        OnnxRuntimeEngine(path, DENOISE, device="tpu")  # type: ignore[arg-type]


def test_a_device_that_is_not_there_is_no_silent_cpu(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    devices: list[Device] = ["cuda", "tensorrt"]
    for device in devices:
        with pytest.raises(EngineError, match=f"cannot run on '{device}'; install it with"):
            OnnxRuntimeEngine(path, DENOISE, device=device)
    with pytest.raises(EngineError, match="cannot run on 'tensorrt-rtx'; take a build with NvTensorRTRTX"):
        OnnxRuntimeEngine(path, DENOISE, device="tensorrt-rtx")


@pytest.mark.parametrize(
    ("device", "providers"),
    [
        ("cuda", ["CUDAExecutionProvider"]),
        ("tensorrt", ["TensorrtExecutionProvider", "CUDAExecutionProvider"]),
        ("tensorrt-rtx", ["NvTensorRTRTXExecutionProvider", "CUDAExecutionProvider"]),
    ],
)
def test_a_device_is_its_execution_providers(
    path: Path, device: Device, providers: list[str], monkeypatch: pytest.MonkeyPatch
):
    asked: list[list[str]] = []
    told: list[dict[str, str]] = []
    real = onnxruntime.InferenceSession

    def session(graph: bytes, options: Any, providers: list[str], provider_options: list[dict[str, str]]) -> Any:
        asked.append(providers)
        told.append(dict(zip(providers, provider_options, strict=True))["CUDAExecutionProvider"])
        return real(graph, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(EngineError, match=f"could not start {providers[0]}"):  # the session fell back to the CPU
        OnnxRuntimeEngine(path, DENOISE, device=device)
    with pytest.raises(EngineError, match="could not start"):
        OnnxRuntimeEngine(path, DENOISE, device=device, tf32=True)
    assert asked == [providers] * 2
    assert told == [{"use_tf32": "0"}, {"use_tf32": "1"}]


# ------------------------------------------------------------------------------------------- on a GPU

GPU_DEVICES: list[Device] = ["cuda", "tensorrt", "tensorrt-rtx"]
GPU_PROVIDERS = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


class Placed:
    """Real sessions on the CPU that report the first given provider; operators in `kept` stay on the CPU."""

    def __init__(self, kept: Collection[str]) -> None:
        self.kept, self.nodes = kept, 0

    def __call__(self, graph: Any, options: Any, providers: list[str], provider_options: Any) -> Any:
        session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        nodes = [node for part in session.get_provider_graph_assignment_info() for node in part.get_nodes()]
        self.nodes = len(nodes)
        stay = [node for node in nodes if node.op_type in self.kept]
        parts = [
            SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: stay),
            SimpleNamespace(ep_name=providers[0], get_nodes=lambda: [node for node in nodes if node not in stay]),
        ]
        return SimpleNamespace(
            get_providers=lambda: [*providers, "CPUExecutionProvider"],
            disable_fallback=lambda: None,
            get_inputs=session.get_inputs,
            get_outputs=session.get_outputs,
            run=session.run,
            get_provider_graph_assignment_info=lambda: parts,
        )


def on_gpu(monkeypatch: pytest.MonkeyPatch, *kept: str) -> Placed:
    placed = Placed(kept)
    fake = SimpleNamespace(**{**vars(onnxruntime), "InferenceSession": placed})
    fake.get_available_providers = lambda: [*GPU_PROVIDERS, "CPUExecutionProvider"]
    monkeypatch.setattr(engine_module, "_onnxruntime", lambda: fake)
    return placed


needs_placement = pytest.mark.skipif(
    not hasattr(onnxruntime.InferenceSession, "get_provider_graph_assignment_info"),
    reason="this onnxruntime does not say where nodes are placed",
)


@needs_placement
@pytest.mark.parametrize("device", GPU_DEVICES)
def test_gpu_providers_get_the_bodies_for_a_gpu(small_bundle: Bundle, device: Device, monkeypatch: pytest.MonkeyPatch):
    """Fewer nodes with the same results (1,626 for 2,056 in the shipped model's step), with weights beside the file."""
    path, spec = small_bundle.stage_path("step"), small_bundle.stages["step"]
    feeds = random_feeds(spec)
    exact = OnnxRuntimeEngine(path, spec, threads=1)
    stored = onnxruntime_nodes(path)
    placed = on_gpu(monkeypatch, "Shape", "Gather", "Concat")  # operators on shapes may stay on the CPU
    engine = OnnxRuntimeEngine(path, spec, threads=1, device=device)
    assert placed.nodes < 0.85 * stored
    if device == "cuda":
        expected, found = exact.run(feeds), engine.run(feeds)
        for name, values in expected.items():
            assert largest_error(found[name], values) <= 1e-4, name


def largest_error(found: Any, expected: Any) -> float:
    """Return the largest error, relative to the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def onnxruntime_nodes(path: Path) -> int:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return sum(len(part.get_nodes()) for part in session.get_provider_graph_assignment_info())


def random_feeds(spec: StageSpec) -> dict[str, Any]:
    draw = np.random.default_rng(7)
    return {
        tensor.name: draw.standard_normal(tensor.concrete(batch=1)).astype(np.float32)
        if tensor.dtype == "float32"
        else np.full(tensor.concrete(batch=1), 500)
        for tensor in spec.inputs
    }


@needs_placement
def test_what_a_gpu_leaves_to_the_cpu_is_refused(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    """Older releases leave GridSample to the CPU, without a message."""
    path, spec = small_bundle.stage_path("decode"), small_bundle.stages["decode"]
    on_gpu(monkeypatch, "GridSample", "Shape")
    with pytest.raises(EngineError, match=r"would run 8 nodes of .*decode\.onnx on the CPU \(8 GridSample\)"):
        OnnxRuntimeEngine(path, spec, threads=1, device="cuda")


def test_an_onnxruntime_that_cannot_say_where_nodes_are_is_refused(path: Path):
    with pytest.raises(EngineError, match=r"cannot say which nodes it places on a GPU.*onnxruntime-gpu"):
        require_on_gpu(SimpleNamespace(), path)


def test_missing_onnxruntime(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"onnxruntime.*pip install 'lfdm-export\[run\]'"):
        OnnxRuntimeEngine(path, DENOISE)
