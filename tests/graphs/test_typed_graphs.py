"""Graphs of lower precision: types, casts, weights, values; and the rounding that simulates them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import ExportError
from lfdm_export.export.bundle_export import write_graphs
from lfdm_export.graphs import trace
from lfdm_export.graphs.bodies import with_bodies
from lfdm_export.graphs.policy import GROUPS, KEPT, module_of, node_name
from lfdm_export.graphs.typed import TYPES, LowPrecision, lower
from lfdm_export.ops.domain import DOMAIN
from lfdm_export.parity.simulate import simulate
from lfdm_export.stages import BATCH, StageSpec

FLOATS = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
LOW = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
BOTH: tuple[LowPrecision, ...] = ("fp16", "bf16")
#: Casts of floating values: to lower precision and back to float32. Each is the boundary of something that is kept.
CASTS = {
    "encode": (1, 4),
    "denoise": (3, 1),
    "denoise_guided": (3, 1),
    "step": (3, 1),
    "step_guided": (3, 1),
    "decode": (5, 1),
    "estimate_motion": (4, 5),
}


@pytest.fixture(scope="module")
def exact(small_bundle: Bundle) -> dict[str, ir.Model]:
    """The float32 graphs."""
    return {name: ir.load(small_bundle.stage_path(name)) for name in small_bundle.stages}


@pytest.fixture(scope="module")
def folders(
    small_bundle: Bundle, exact: dict[str, ir.Model], tmp_path_factory: pytest.TempPathFactory
) -> dict[LowPrecision, Path]:
    """The graphs in either precision, written and checked as an export does."""
    found: dict[LowPrecision, Path] = {}
    for precision in BOTH:
        found[precision] = tmp_path_factory.mktemp(precision)
        graphs = {name: lower(graph, precision) for name, graph in exact.items()}
        write_graphs(graphs, small_bundle.stages, found[precision])
    return found


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with functions inlined and the type of every value."""
    inlined = onnx.inliner.inline_local_functions(model)
    return onnx.shape_inference.infer_shapes(inlined, check_type=True, strict_mode=True, data_prop=True)


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    values = [*graph.input, *graph.output, *graph.value_info]
    return {t.name: t.data_type for t in graph.initializer} | {v.name: v.type.tensor_type.elem_type for v in values}


def disagreements(model: onnx.ModelProto) -> Iterator[str]:
    """Nodes whose inputs have different types where the operator wants one."""
    kinds, opset = types_of(model), model.opset_import[0].version
    for node in model.graph.node:
        schema = onnx.defs.get_schema(node.op_type, opset)
        found: dict[str, int] = {}
        for index, name in enumerate(node.input):
            parameter = schema.inputs[min(index, len(schema.inputs) - 1)]
            if name and found.setdefault(parameter.type_str, kinds[name]) != kinds[name]:
                yield f"{node.op_type} {node.name}: {name}"


# Not openvino in bf16: OpenVINO reads bfloat16 convolutions in opset 20, where ONNX itself has none.
@pytest.mark.parametrize(
    ("target", "precision"),
    [
        ("stored", "fp16"),
        ("stored", "bf16"),
        ("tensorrt", "fp16"),
        ("tensorrt", "bf16"),
        ("openvino", "fp16"),
    ],
)
def test_graphs_are_strongly_typed(folders: dict[LowPrecision, Path], precision: LowPrecision, target: str) -> None:
    for path in sorted(folders[precision].glob("*.onnx")):
        stored = onnx.load(path, load_external_data=False)
        model = inferred(with_bodies(stored, target))
        assert not list(disagreements(model)), path.stem
        for value in (*model.graph.input, *model.graph.output):
            assert value.type.tensor_type.elem_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64)


def test_a_disagreement_would_be_seen() -> None:
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 23]> g (float[2] x, float16[2] y) => (float[2] z) { z = Add(x, y) }'
    )
    assert list(disagreements(model)) == ["Add : y"]


@pytest.mark.parametrize("precision", BOTH)
def test_interfaces_and_operators_stay(
    small_bundle: Bundle, exact: dict[str, ir.Model], folders: dict[LowPrecision, Path], precision: LowPrecision
) -> None:
    for name, spec in small_bundle.stages.items():
        model = onnx.load(folders[precision] / f"{name}.onnx", load_external_data=False)
        assert [value.name for value in model.graph.input] == [tensor.name for tensor in spec.inputs]
        assert [value.name for value in model.graph.output] == [tensor.name for tensor in spec.outputs]
        own = [node for node in model.graph.node if node.domain == DOMAIN]
        assert [node.name for node in own] == [node.name for node in exact[name].graph if node.domain == DOMAIN]
        for node in own:
            assert {"plugin_namespace", "plugin_version"} <= {attribute.name for attribute in node.attribute}
        assert {function.name for function in model.functions} == {node.op_type for node in own}


@pytest.mark.parametrize("precision", BOTH)
def test_casts_are_few(folders: dict[LowPrecision, Path], precision: LowPrecision) -> None:
    for name, (down, up) in CASTS.items():
        model = onnx.load(folders[precision] / f"{name}.onnx", load_external_data=False)
        kinds = types_of(onnx.shape_inference.infer_shapes(model))
        casts = [node for node in model.graph.node if node.op_type == "Cast" and kinds.get(node.input[0]) in FLOATS]
        to = [node.attribute[0].i for node in casts]
        assert (to.count(LOW[precision]), to.count(onnx.TensorProto.FLOAT)) == (down, up), name
        assert len({(node.input[0], kind) for node, kind in zip(casts, to, strict=True)}) == len(casts), "cast twice"
        made = {node.output[0] for node in casts}
        assert not [node for node in casts if node.input[0] in made], "cast to and fro"


@pytest.mark.parametrize("precision", BOTH)
def test_weights_take_half_the_room_and_are_shared(
    small_bundle: Bundle, folders: dict[LowPrecision, Path], precision: LowPrecision
) -> None:
    for path in folders[precision].glob("*.data"):
        before = (small_bundle.path / "onnx" / path.name).stat().st_size
        assert path.stat().st_size <= 0.52 * before, path.name

    def weights(name: str) -> set[tuple[str, ...]]:
        model = onnx.load(folders[precision] / f"{name}.onnx", load_external_data=False)
        external = [tensor for tensor in model.graph.initializer if tensor.external_data]
        return {tuple(entry.value for entry in tensor.external_data) for tensor in external}

    assert weights("step") == weights("denoise")
    assert weights("step") <= weights("step_guided") == weights("denoise_guided")


@pytest.mark.parametrize("precision", BOTH)
def test_what_is_kept_is_float32(folders: dict[LowPrecision, Path], precision: LowPrecision) -> None:
    step = onnx.load(folders[precision] / "step_guided.onnx", load_external_data=False)
    kinds = types_of(onnx.shape_inference.infer_shapes(step))
    own = {node.op_type: node for node in step.graph.node}
    assert {kinds[name] for name in own["ThresholdedStep"].input} == {onnx.TensorProto.FLOAT}
    assert kinds[own["SpatialAttention"].input[2]] == LOW[precision]
    time = [node for node in step.graph.node if node.op_type == "Gemm" and ".time_mlp." in node.name]
    assert len(time) == 2
    assert {kinds[name] for node in time for name in node.input} == {onnx.TensorProto.FLOAT}
    mixture = [node for node in step.graph.node if node.name.startswith("denoise.unet.guidance/")]
    assert {kinds[node.output[0]] for node in mixture} == {onnx.TensorProto.FLOAT}
    decode = onnx.load(folders[precision] / "decode.onnx", load_external_data=False)
    kinds = types_of(onnx.shape_inference.infer_shapes(decode))
    warps = [node for node in decode.graph.node if node.op_type in ("Warp", "WarpBlend")]
    assert {kinds[node.input[1]] for node in warps} == {onnx.TensorProto.FLOAT}
    by_source = {node.input[0]: kinds[node.input[0]] for node in warps}
    assert by_source.pop("image") == onnx.TensorProto.FLOAT
    assert set(by_source.values()) == {LOW[precision]}
    motion = onnx.load(folders[precision] / "estimate_motion.onnx", load_external_data=False)
    kinds = types_of(onnx.shape_inference.infer_shapes(motion))
    for node in motion.graph.node:
        if node.op_type in ("GridSample", "Softmax", "Exp", "Sqrt", "Atan"):
            assert {kinds[name] for name in node.input} == {onnx.TensorProto.FLOAT}, node.name


def inputs(spec: StageSpec) -> dict[str, NDArray[np.generic]]:
    generator = torch.Generator().manual_seed(2)
    return {tensor.name: trace.example(tensor, {BATCH: 2}, generator).numpy() for tensor in spec.inputs}


def outputs(path: Path, feeds: dict[str, NDArray[np.generic]]) -> list[NDArray[np.float32]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feeds))


def errors(found: list[NDArray[np.float32]], expected: list[NDArray[np.float32]]) -> float:
    """The largest error relative to max(1, largest value), over all outputs."""
    return max(
        float(np.abs(a.astype(np.float64) - b).max() / max(1.0, float(np.abs(b).max())))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("stage", ["encode", "step", "step_guided", "decode", "estimate_motion"])
def test_values(small_bundle: Bundle, folders: dict[LowPrecision, Path], stage: str, tmp_path: Path) -> None:
    """fp16 under ONNX Runtime itself, both precisions by simulation, which rounds wherever a value is stored."""
    spec = small_bundle.stages[stage]
    feeds = inputs(spec)
    expected = outputs(small_bundle.stage_path(stage), feeds)
    assert 0 < errors(outputs(folders["fp16"] / f"{stage}.onnx", feeds), expected) <= spec.tolerance["fp16"]
    simulated = {}
    for precision in BOTH:
        graph = simulate(folders[precision] / f"{stage}.onnx", precision)
        trace.save({precision: graph}, tmp_path, f"{precision}.data")
        simulated[precision] = errors(outputs(tmp_path / f"{precision}.onnx", feeds), expected)
        assert simulated[precision] <= spec.tolerance[precision]
    # 8 bits of mantissa to 11.
    assert simulated["bf16"] > 3 * simulated["fp16"] > 0


@pytest.mark.parametrize(("precision", "dtype"), [("fp16", np.float16), ("bf16", ml_dtypes.bfloat16)])
def test_simulation_rounds_as_the_type_does(tmp_path: Path, precision: LowPrecision, dtype: type) -> None:
    # Sums of these are exact in float32, in whatever order they are taken.
    weight = np.random.default_rng(1).integers(-511, 512, (6, 5)).astype(np.float32) / np.float32(512)
    values = ", ".join(map(str, weight.ravel().tolist()))
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["": 23]> g (float[n, 6] x) => (float[n, 5] y)
        <float[6, 5] w = {{{values}}}> {{ a = MatMul(x, w)  b = Mul(a, a)  y = Sqrt(b) }}"""
    )
    low = lower(ir.from_proto(onnx.shape_inference.infer_shapes(model)), precision)
    trace.save({"low": low}, tmp_path, "low.data")
    trace.save({"simulated": simulate(tmp_path / "low.onnx", precision)}, tmp_path, "simulated.data")
    x = np.random.default_rng(2).integers(-4095, 4096, (7, 6)).astype(np.float32) / np.float32(4096)

    def stored(values: NDArray[np.float32]) -> NDArray[np.float32]:
        return values.astype(dtype).astype(np.float32)

    assert (stored(x) != x).any()
    product = stored(stored(x) @ stored(weight))
    (found,) = outputs(tmp_path / "simulated.onnx", {"x": x})
    np.testing.assert_array_equal(found, stored(np.sqrt(stored(product * product))))


def test_simulation_rounds_further_nodes_where_told(folders: dict[LowPrecision, Path], tmp_path: Path) -> None:
    def rounded(model: ir.Model) -> int:
        return sum(node.op_type == "Cast" and node.outputs[0].dtype == TYPES["bf16"] for node in model.graph)

    path = folders["bf16"] / "decode.onnx"
    more = simulate(path, "bf16", also=lambda node: node.op_type == "GridSample")
    samples = sum(node.op_type == "GridSample" for node in more.graph)
    assert rounded(more) == rounded(simulate(path, "bf16")) + samples > samples > 0


def test_groups_are_modules_that_exist(exact: dict[str, ir.Model]) -> None:
    nodes = [node for model in exact.values() for node in model.graph]
    empty = [name for name, group in GROUPS.items() if not any(group.has(node) for node in nodes)]
    assert empty == ["pooling"], "only a text encoder has that"
    assert set(GROUPS) >= KEPT
    assert module_of(ir.Node("", "Relu", [], name=node_name("ups.0", "relu_4"))) == "ups.0"


def weight_type(node: ir.Node) -> ir.DataType | None:
    weight = node.inputs[1]
    assert weight is not None
    return weight.dtype


def test_a_node_can_be_kept(exact: dict[str, ir.Model]) -> None:
    def casts(model: ir.Model) -> int:
        return sum(node.op_type == "Cast" for node in model.graph)

    kept = [node.name for node in exact["encode"].graph if node.op_type == "Conv"][1]
    before = exact["encode"].graph.initializers.keys()
    plain = lower(exact["encode"], "fp16")
    other = lower(exact["encode"], "fp16", keep_node=lambda node: node.name == kept)
    # Cast up for an output anyway; what follows stays float32 up to the next weights, an output among it.
    assert casts(other) == casts(plain) == 5
    types = {node.name: weight_type(node) for node in other.graph if node.op_type == "Conv"}
    assert types.pop(kept) == ir.DataType.FLOAT
    assert set(types.values()) == {TYPES["fp16"]}
    assert exact["encode"].graph.initializers.keys() == before, "the float32 graph was changed"


def test_a_group_can_be_lowered_and_another_kept(exact: dict[str, ir.Model]) -> None:
    def gemm_types(*kept: str) -> set[ir.DataType | None]:
        model = lower(exact["denoise"], "fp16", kept=kept)
        return {weight_type(node) for node in model.graph if node.op_type == "Gemm"}

    assert gemm_types() == {ir.DataType.FLOAT16}
    assert gemm_types("time") == {ir.DataType.FLOAT16, ir.DataType.FLOAT}
    assert gemm_types("time", "modulation") == {ir.DataType.FLOAT}


def test_what_cannot_be_is_an_error(exact: dict[str, ir.Model]) -> None:
    with pytest.raises(ExportError, match="unknown group of nodes 'tyres'; expected some of time, guidance"):
        lower(exact["encode"], "fp16", kept=["tyres"])
    large = exact["encode"].clone()
    name, value = next((name, value) for name, value in large.graph.initializers.items() if name.endswith("weight"))
    assert value.const_value is not None
    value.const_value = ir.Tensor(value.const_value.numpy() + np.float32(1e5), name=name)
    with pytest.raises(ExportError, match=r"has values up to 1e\+05, which fp16 cannot hold; export in another"):
        lower(large, "fp16")
    lower(large, "bf16")
