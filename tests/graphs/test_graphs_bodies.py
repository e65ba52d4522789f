"""Bodies for other backends, run by ONNX Runtime, against the torch references and the stored bodies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.openvino.engine import shared_core
from lfdm_export.errors import ExportError
from lfdm_export.graphs.bodies import OPENVINO_OPSET, with_bodies
from lfdm_export.graphs.trace import example
from lfdm_export.ops.domain import DOMAIN
from lfdm_export.ops.group_norm_silu.onnx_function import whole_group_norm_silu_function
from lfdm_export.ops.group_norm_silu.reference import group_norm_silu
from lfdm_export.ops.small_conv.onnx_function import plain_small_conv_function
from lfdm_export.ops.small_conv.reference import small_conv, transforms
from lfdm_export.ops.spatial_attention.onnx_function import explicit_spatial_attention_function
from lfdm_export.ops.spatial_attention.reference import SpatialWeights, spatial_attention
from lfdm_export.ops.temporal_attention import operator_name
from lfdm_export.ops.temporal_attention.onnx_function import explicit_temporal_attention_function
from lfdm_export.ops.temporal_attention.reference import TemporalWeights, temporal_attention
from lfdm_export.ops.thresholded_step.onnx_function import thresholded_step_function
from lfdm_export.sampling import rows
from lfdm_export.sampling.loop import quantile_rank
from lfdm_export.stages import BATCH
from tests.ops.test_ops import hostile_values, normal, run_node, thresholded, torch_of
from tests.processor import needs_openvino

Array: TypeAlias = NDArray[Any]
KINDS = ("tensorrt", "openvino")
GRAPHS = ("encode", "step", "step_guided", "denoise", "decode", "estimate_motion")


@pytest.mark.parametrize(("heads", "head_width"), [(2, 12), (1, 5), (8, 32)])
def test_explicit_spatial_attention(heads: int, head_width: int) -> None:
    frames, pixels, channels, hidden = 3, 6, 16, heads * head_width
    sizes = {"gamma": (channels,), "query": (channels, hidden), "key": (channels, hidden), "value": (channels, hidden)}
    weights = {name: normal(seed, *size) for seed, (name, size) in enumerate(sizes.items())}
    weights["out"] = normal(9, hidden, channels)
    x = normal(7, frames, pixels, channels)
    functions = [explicit_spatial_attention_function(heads, head_width)]
    (found,) = run_node("SpatialAttention", functions, {"x": x, **weights}, {"y": 3}, heads=heads)
    constants = SpatialWeights(**{name: torch_of(value) for name, value in weights.items()})
    np.testing.assert_allclose(found, spatial_attention(torch_of(x), constants, heads=heads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotary_operator", [True, False])
@pytest.mark.parametrize(
    ("heads", "head_width", "rotary_width", "pixels", "frames"), [(2, 8, 8, 6, 5), (2, 8, 4, 7, 5), (8, 32, 32, 3, 1)]
)
def test_explicit_temporal_attention(
    heads: int, head_width: int, rotary_width: int, pixels: int, frames: int, rotary_operator: bool
) -> None:
    channels, hidden = 16, heads * head_width
    angle = normal(9, frames, rotary_width // 2)
    weights: dict[str, Array] = {
        "gamma": normal(1, channels),
        "query": normal(2, channels, hidden) / 4,
        "key": normal(3, channels, hidden) / 4,
        "value": normal(4, channels, hidden),
        "out": normal(5, hidden, channels),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "bias": normal(6, 1, heads, frames, frames),
        "position": np.arange(frames)[None],
    }
    x = normal(7, 2 * pixels, frames, channels)
    body = explicit_temporal_attention_function(3, heads, head_width, rotary_width, rotary_operator=rotary_operator)
    attributes = {"heads": heads, "rotary_width": rotary_width}
    (found,) = run_node(operator_name(3), [body], {"x": x, **weights}, {"y": 3}, **attributes)
    constants = TemporalWeights(**{name: torch_of(value) for name, value in weights.items()})
    expected = temporal_attention(torch_of(x), constants, heads=heads, pixels=pixels).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize(("batch", "frames", "channels", "groups"), [(2, 3, 16, 8), (1, 1, 6, 2), (3, 2, 8, 8)])
@pytest.mark.parametrize("modulated", [False, True])
def test_whole_group_norm_silu(modulated: bool, batch: int, frames: int, channels: int, groups: int) -> None:
    side = 4
    x = 2 + normal(1, batch * frames, channels, side, side)
    feeds = {"x": x, "gamma": normal(2, channels), "beta": normal(3, channels)}
    modulation: dict[str, Array] = {}
    if modulated:
        modulation = {"scale": normal(4, batch, channels), "shift": normal(5, batch, channels)}
    name = "ModulatedGroupNormSilu" if modulated else "GroupNormSilu"
    (found,) = run_node(
        name,
        [whole_group_norm_silu_function(name, groups)],
        feeds | modulation,
        {"y": 4},
        grouped=[-1, frames, groups, channels // groups * side * side],
        per_group=[1, groups, channels // groups],
        per_channel=[-1, 1, channels, 1, 1],
        clip=[-1, frames, channels, side, side],
        flat=[-1, channels, side, side],
    )
    scale_shift = (torch_of(modulation["scale"]), torch_of(modulation["shift"])) if modulated else None
    gamma, beta = torch_of(feeds["gamma"]), torch_of(feeds["beta"])
    expected = group_norm_silu(torch_of(x), gamma, beta, scale_shift, frames=frames, groups=groups)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (2, 4)])
def test_plain_small_conv(size: tuple[int, int]) -> None:
    arrays = {"x": normal(1, 3, 5, *size), "weight": normal(2, 6, 5, 3, 3), "bias": normal(3, 6)}
    matrices = dict(zip(("kernel", "spread", "gather"), (m.float().numpy() for m in transforms(*size)), strict=True))
    functions = [plain_small_conv_function()]
    (found,) = run_node("SmallConv", functions, {**arrays, **matrices}, {"y": 4}, height=size[0], width=size[1])
    expected = small_conv(*(torch_of(array) for array in arrays.values())).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [122_880, 6_144, 1_007])
def test_quantile_of_many_pivots_is_exact(count: int) -> None:
    cases = hostile_values(count)
    values = np.stack(list(cases.values())).astype(np.float32)
    lower, weight = quantile_rank(count)
    latent = values.reshape(len(values), 1, 1, count, 1)
    zeros = np.zeros_like(latent)
    coefficients = np.zeros((len(values), 11), np.float32)
    coefficients[:, [rows.X0_FROM_LATENT, rows.NEXT_FROM_X0]] = 1
    feeds = {
        "latent": latent,
        "predicted_noise": zeros,
        "history": np.stack([zeros, zeros], axis=1),
        "noise": zeros,
        "coefficients": coefficients,
    }
    functions = [thresholded_step_function(float(weight), pivots_at_once=True)]
    attributes = {"lower_rank": lower, "weight": float(weight)}
    found, _ = run_node("ThresholdedStep", functions, feeds, {"x": 5, "h": 6}, **attributes)
    for i, (name, expected) in enumerate(zip(cases, thresholded(values), strict=True)):
        np.testing.assert_allclose(found[i].ravel(), expected, rtol=2.5e-7, atol=0, err_msg=name)


@pytest.fixture(scope="module")
def folder(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the weights (onnx's checker refuses links), beside which changed graphs are written."""
    copy = tmp_path_factory.mktemp("bodies")
    for data in (small_bundle.path / "onnx").glob("*.data"):
        shutil.copy(data, copy)
    return copy


def changed(bundle: Bundle, stage: str, target: str, folder: Path) -> Path:
    """A stage's graph with the target's bodies, checked."""
    path = folder / f"{stage}.{target}.onnx"
    onnx.save(with_bodies(onnx.load(bundle.stage_path(stage), load_external_data=False), target), path)
    onnx.checker.check_model(str(path), full_check=True)
    return path


def outputs(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


@pytest.mark.parametrize("stage", GRAPHS)
def test_graphs_compute_the_same(small_bundle: Bundle, stage: str, folder: Path) -> None:
    spec = small_bundle.stages[stage]
    generator = torch.Generator().manual_seed(1)
    feeds = {tensor.name: example(tensor, {BATCH: 2}, generator).numpy() for tensor in spec.inputs}
    expected = outputs(small_bundle.stage_path(stage), feeds)
    for target in KINDS:
        found = outputs(changed(small_bundle, stage, target, folder), feeds)
        for array, other in zip(found, expected, strict=True):
            scale = max(1.0, float(np.abs(other).max()))
            assert np.abs(array - other).max() <= spec.tolerance["fp32"] * scale, target


@pytest.mark.parametrize("target", KINDS)
def test_nodes_stay_and_operators_are_what_the_backend_knows(small_bundle: Bundle, target: str) -> None:
    for stage in GRAPHS:
        stored = onnx.load(small_bundle.stage_path(stage), load_external_data=False)
        before = stored.SerializeToString(deterministic=True)
        model = with_bodies(stored, target)
        assert stored.SerializeToString(deterministic=True) == before, "the stored graph was changed"
        operators = {node.op_type for holder in (model.graph, *model.functions) for node in holder.node}
        assert "Attention" not in operators
        if target == "openvino":
            assert not model.functions
            assert not [node for node in model.graph.node if node.domain]
            assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPENVINO_OPSET)]
            assert "RotaryEmbedding" not in operators
        else:
            assert list(model.graph.node) == list(stored.graph.node)
            assert {function.name for function in model.functions} == {function.name for function in stored.functions}
            searches = [function for function in model.functions if function.name == "ThresholdedStep"]
            # TensorRT's builder takes exponentially long over the 34 rounds of bisection of a small latent.
            assert all(len(function.node) < 250 for function in searches)


def test_stored_bodies_are_kept(small_bundle: Bundle) -> None:
    stored = onnx.load(small_bundle.stage_path("step"), load_external_data=False)
    assert with_bodies(stored, "stored") == stored


@needs_openvino
@pytest.mark.parametrize("stage", ["step", "decode"])
def test_openvino_reads_and_runs_its_graph(small_bundle: Bundle, stage: str, folder: Path) -> None:
    spec = small_bundle.stages[stage]
    generator = torch.Generator().manual_seed(1)
    feeds = {tensor.name: example(tensor, {BATCH: 1}, generator).numpy() for tensor in spec.inputs}
    expected = outputs(small_bundle.stage_path(stage), feeds)
    core = shared_core()
    model = core.read_model(changed(small_bundle, stage, "openvino", folder))
    options = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    found = core.compile_model(model, "CPU", options)(feeds)
    for tensor, other in zip(spec.outputs, expected, strict=True):
        scale = max(1.0, float(np.abs(other).max()))
        assert np.abs(found[tensor.name] - other).max() <= spec.tolerance["fp32"] * scale


def test_bad_kinds_and_graphs_are_errors(small_bundle: Bundle) -> None:
    stored = onnx.load(small_bundle.stage_path("step"), load_external_data=False)
    with pytest.raises(ExportError, match="unknown bodies 'tpu'"):
        with_bodies(stored, "tpu")
    nodes = [node for node in stored.graph.node if node.op_type == "GroupNormSilu"]
    attribute = next(a for a in nodes[0].attribute if a.name == "per_group")
    attribute.ints[1] *= 2
    with pytest.raises(ExportError, match="GroupNormSilu"):
        with_bodies(stored, "tensorrt")
    attribute.ints[1] //= 2
    spatial = next(node for node in stored.graph.node if node.domain == DOMAIN and node.op_type == "SpatialAttention")
    spatial.input[2] = "elsewhere"
    with pytest.raises(ExportError, match="are not a constant"):
        with_bodies(stored, "tensorrt")
