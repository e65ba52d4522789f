"""A typed graph -> a float32 graph that rounds wherever the typed one stores a value of lower precision.

ONNX Runtime's CPU provider has no bfloat16 kernels for most operators, and does not follow float16 graphs: it computes
in float32 and omits casts between neighbors. The simulated graph shows the results of a GPU's tensor cores: products
and sums inside an operator in float32, each result rounded. Fused kernels of a GPU round less often.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx.inliner
import onnx_ir as ir

from lfdm_export.bundle.reader import EMBEDDINGS, ONNX_FOLDER, REFERENCE, TOKENIZER_FOLDER, Bundle
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.errors import InputError
from lfdm_export.graphs import trace
from lfdm_export.graphs.bodies import with_bodies
from lfdm_export.graphs.typed import MOVING, TYPES, LowPrecision

_FLOAT32 = ir.DataType.FLOAT


def simulate_bundle(bundle: Bundle, folder: str | os.PathLike[str]) -> Bundle:
    """A float32 bundle that rounds as an fp16 or bf16 bundle does on a GPU.

    Args:
        bundle: the bundle to simulate.
        folder: folder of the simulated bundle.

    Raises:
        InputError: the bundle has another precision.
        BundleError: the folder cannot be written.
    """
    precision = bundle.manifest.precision
    if precision not in TYPES:
        raise InputError(f"{bundle.path} has the precision {precision!r}, expected one of {', '.join(TYPES)}")
    with BundleWriter(folder) as writer:
        for stage in bundle.stages:
            graph = simulate(bundle.stage_path(stage), precision)
            trace.save({stage: graph}, writer.folder / ONNX_FOLDER, f"{stage}.data")
        for name in bundle.manifest.files:
            if name in (EMBEDDINGS, REFERENCE) or name.startswith(f"{TOKENIZER_FOLDER}/"):
                (writer.folder / name).parent.mkdir(exist_ok=True)
                shutil.copy(bundle.path / name, writer.folder / name)
        return writer.finish(dataclasses.replace(bundle.manifest, precision="fp32"))


def simulate(path: Path, precision: LowPrecision, *, also: Callable[[ir.Node], bool] | None = None) -> ir.Model:
    """The simulated graph of a stage.

    Args:
        path: path of its typed graph; external weights are in the same folder.
        precision: precision of the graph.
        also: selects further nodes whose results are rounded, as if they were lowered too.

    Returns:
        A float32 graph without functions, with TensorRT's bodies and the same inputs and outputs.
    """
    # TensorRT's bodies: an operator such as Attention would hide the values inside it.
    model = with_bodies(onnx.load(path, load_external_data=False), "tensorrt")
    inlined = onnx.shape_inference.infer_shapes(
        onnx.inliner.inline_local_functions(model), check_type=True, strict_mode=True, data_prop=True
    )
    simulated = ir.from_proto(inlined)
    ir.external_data.set_base_dir(simulated.graph, path.parent)
    graph, low = simulated.graph, TYPES[precision]
    for value in graph.initializers.values():
        if value.dtype == low:
            assert value.const_value is not None
            exact = value.const_value.numpy().astype("float32")
            value.const_value = ir.Tensor(exact, name=value.name)
            value.type = ir.TensorType(_FLOAT32)
    for node in list(graph):
        rounds = also is not None and also(node)
        for value in node.outputs:
            is_low = value.dtype == low
            if is_low:
                value.type = ir.TensorType(_FLOAT32)
            # The inputs of an operator that only moves values are already rounded.
            if (is_low and node.op_type not in MOVING) or (rounds and value.dtype == _FLOAT32):
                _round(graph, node, value, low)
        if node.op_type == "CastLike":
            node.op_type = "Cast"
            node.resize_inputs(1)
            node.attributes.add(ir.AttrInt64("to", _FLOAT32))
        elif node.op_type == "Cast" and node.attributes["to"].as_int() == low:
            node.attributes.add(ir.AttrInt64("to", _FLOAT32))
    return simulated


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, low: ir.DataType) -> None:
    """Replace a value by its rounded form for all users."""
    users = list(value.uses())
    down = ir.Node("", "Cast", [value], [ir.AttrInt64("to", low)], name=f"{node.name}_{value.name}_down")
    up = ir.Node("", "Cast", down.outputs, [ir.AttrInt64("to", _FLOAT32)], name=f"{node.name}_{value.name}_up")
    for cast, kind in ((down, low), (up, _FLOAT32)):
        cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(kind), value.shape
    name = value.name
    up.outputs[0].name, down.outputs[0].name = f"{name}_rounded", f"{name}_stored"
    graph.insert_after(node, [down, up])
    for use in users:
        use.node.replace_input_with(use.idx, up.outputs[0])
    for index, output in enumerate(graph.outputs):
        if output is value:
            value.name, up.outputs[0].name = f"{name}_exact", name
            graph.outputs[index] = up.outputs[0]
