from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import ExportError
from lfdm_export.graphs import trace
from lfdm_export.ops.domain import DOMAIN
from lfdm_export.stages import BATCH, StageSpec, TensorSpec
from tests.closeness import assert_same_floats


@pytest.fixture(scope="module")
def graphs(small_bundle: Bundle) -> dict[str, onnx.ModelProto]:
    """Every stage's graph, without its external weights."""
    return {name: onnx.load(small_bundle.stage_path(name), load_external_data=False) for name in small_bundle.stages}


def test_names_and_axes_are_the_specifications(small_bundle: Bundle, graphs: dict[str, onnx.ModelProto]) -> None:
    for name, spec in small_bundle.stages.items():
        graph = graphs[name].graph
        for values, tensors in ((graph.input, spec.inputs), (graph.output, spec.outputs)):
            assert [value.name for value in values] == [tensor.name for tensor in tensors]
        for value, tensor in zip(graph.input, spec.inputs, strict=True):
            axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
            assert axes == list(tensor.shape)


def test_opset_and_checker(small_bundle: Bundle, graphs: dict[str, onnx.ModelProto]) -> None:
    for name, model in graphs.items():
        assert {entry.domain: entry.version for entry in model.opset_import}[""] >= 20
        onnx.checker.check_model(str(small_bundle.stage_path(name)), full_check=True)


def test_operators_are_functions_that_a_plugin_may_replace(graphs: dict[str, onnx.ModelProto]) -> None:
    used = {}
    for name, model in graphs.items():
        bodies = {function.name for function in model.functions if function.domain == DOMAIN}
        nodes = [node for node in model.graph.node if node.domain == DOMAIN]
        used[name] = {node.op_type for node in nodes}
        assert used[name] == bodies, "no operator without a body, no body without use"
        for node in nodes:
            attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
            assert attributes["plugin_namespace"] == DOMAIN.encode()
            assert attributes["plugin_version"] == b"1"
    assert used["decode"] == {"Warp", "WarpBlend"}
    assert "ThresholdedStep" in used["step"] & used["step_guided"]
    assert "ThresholdedStep" not in used["denoise"] | used["denoise_guided"]
    assert not used["encode"] | used["estimate_motion"]


def test_no_topk_beyond_what_tensorrt_takes(graphs: dict[str, onnx.ModelProto]) -> None:
    for model in graphs.values():
        nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
        assert not [node for node in nodes if node.op_type == "TopK"]


def test_unet_graphs_share_their_weights(small_bundle: Bundle, graphs: dict[str, onnx.ModelProto]) -> None:
    def weights(name: str) -> set[tuple[str, ...]]:
        external = [tensor for tensor in graphs[name].graph.initializer if tensor.external_data]
        return {tuple(entry.value for entry in tensor.external_data) for tensor in external}

    assert weights("step") == weights("denoise")
    # The guided graph holds the null embedding too.
    assert weights("step") <= weights("step_guided") == weights("denoise_guided")
    files = sorted(path.name for path in (small_bundle.path / "onnx").glob("*.data"))
    assert files == ["decode.data", "encode.data", "estimate_motion.data", "unet.data"]


def test_graphs_say_nothing_of_the_machine_that_made_them(small_bundle: Bundle) -> None:
    for name in small_bundle.stages:
        text = small_bundle.stage_path(name).read_bytes()
        assert not re.search(rb"site-packages|stack_trace|\.py\b", text), name
        for folder in (Path(__file__).parents[2], small_bundle.path.parent):
            assert str(folder).encode() not in text


def test_denoise_is_what_step_updates_with(small_bundle: Bundle) -> None:
    """Coefficients that pass the predicted noise on: both graphs are one."""
    spec = small_bundle.stages["step"]
    generator = torch.Generator().manual_seed(0)
    feeds = {t.name: trace.example(t, {BATCH: 2}, generator).numpy() for t in spec.inputs}
    feeds["coefficients"] = np.zeros_like(feeds["coefficients"])
    feeds["coefficients"][:, 4] = 1
    step = session(small_bundle, "step").run(["next_latent"], feeds)[0]
    denoise = small_bundle.stages["denoise"]
    expected = session(small_bundle, "denoise").run(None, {t.name: feeds[t.name] for t in denoise.inputs})[0]
    assert_same_floats(step, expected, roundings=256)  # two graphs, which the engine may optimize otherwise


def session(bundle: Bundle, stage: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(bundle.stage_path(stage), providers=["CPUExecutionProvider"])


class Scale(nn.Module):
    weight: Tensor

    def __init__(self, fixed: bool) -> None:
        super().__init__()
        self.fixed = fixed
        self.register_buffer("weight", torch.arange(2048.0))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.fixed:
            x = x.reshape(2, 2048)
        return x * self.weight, x + self.weight


SPEC = StageSpec(
    "scale",
    (TensorSpec("x", "float32", (BATCH, 2048)),),
    (TensorSpec("product", "float32", (BATCH, 2048)), TensorSpec("sum", "float32", (BATCH, 2048))),
    (1, 1, 8),
    {},
)


def test_a_lost_dynamic_axis_is_an_error() -> None:
    with pytest.raises((ExportError, torch.onnx.OnnxExporterError)):
        trace.trace(Scale(fixed=True), SPEC.inputs, SPEC.outputs)


def test_equal_weights_are_stored_once_and_parts_run(tmp_path: Path) -> None:
    whole = trace.trace(Scale(fixed=False), SPEC.inputs, SPEC.outputs)
    part = StageSpec("part", SPEC.inputs, SPEC.outputs[1:], SPEC.batch, {})
    trace.save({"scale": whole, "part": trace.select(whole, part)}, tmp_path, "weights.data")
    assert (tmp_path / "weights.data").stat().st_size == 2048 * 4
    trace.check(tmp_path, {"scale": SPEC, "part": part})
    x = np.ones((3, 2048), np.float32)
    found = onnxruntime.InferenceSession(tmp_path / "part.onnx").run(None, {"x": x})
    assert len(found) == 1
    np.testing.assert_array_equal(found[0], 1 + np.tile(np.arange(2048, dtype=np.float32), (3, 1)))


def test_a_broken_graph_is_an_error(tmp_path: Path) -> None:
    whole = trace.trace(Scale(fixed=False), SPEC.inputs, SPEC.outputs)
    trace.save({"scale": whole}, tmp_path, "weights.data")
    model = onnx.load(tmp_path / "scale.onnx", load_external_data=False)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "scale.onnx")
    with pytest.raises(ExportError, match="not valid ONNX"):
        trace.check(tmp_path, {"scale": SPEC})
