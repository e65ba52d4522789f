from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from lfdm_export.engines.onnxruntime.engine import Device, OnnxRuntimeEngine
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
    feeds = feeds_for(DENOISE, batch=1)
    still = OnnxRuntimeEngine(path, DENOISE, allow_spinning=False).run(feeds)
    assert still["predicted_noise"].shape == feeds["noisy_latent"].shape


def test_a_device_that_is_not_there_is_no_silent_cpu(path: Path, monkeypatch: pytest.MonkeyPatch):
    import onnxruntime

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
    import onnxruntime

    asked: list[list[str]] = []
    real = onnxruntime.InferenceSession

    def session(file: Path, options: Any, providers: list[str]) -> Any:
        asked.append(providers)
        return real(file, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    with pytest.raises(EngineError, match=f"could not start {providers[0]}"):  # what came is the CPU
        OnnxRuntimeEngine(path, DENOISE, device=device)
    assert asked == [providers]


def test_missing_onnxruntime(path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"onnxruntime.*pip install 'lfdm-export\[run\]'"):
        OnnxRuntimeEngine(path, DENOISE)
