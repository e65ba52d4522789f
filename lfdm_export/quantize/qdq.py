"""Explicit quantization: a quantize and a dequantize node before every activation, a dequantize node after weights.

Activations have one scale per tensor, weights have one per output. Zero is stored as zero, as TensorRT and OpenVINO's
matrix units require. Biases, and everything that is not a layer, stay float32. A bias can take back the mean error of
rounding: see `lfdm_export.quantize.correction`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfdm_export.graphs.policy import module_of, node_name
from lfdm_export.quantize.layers import find_layers
from lfdm_export.quantize.ranges import Format, quantize, weight_scales

_TYPES: Mapping[Format, ir.DataType] = {"int8": ir.DataType.INT8, "fp8": ir.DataType.FLOAT8E4M3FN}


def insert_qdq(
    model: ir.Model,
    scales: Mapping[str, np.float32],
    form: Format,
    shifts: Mapping[str, NDArray[np.float32]] | None = None,
) -> ir.Model:
    """Quantize the layers of a graph.

    Args:
        model: float32; it is not changed.
        scales: scale of each layer's activation, by the layer's name; layers without one stay float.
        form: storage format of activations and weights.
        shifts: (outputs,) added to the bias of quantized layers, by the layer's name; None adds nothing.

    Returns:
        A new graph with the same inputs and outputs; small convolutions become ordinary ones.
    """
    quantized = model.clone()
    graph = quantized.graph
    activations: dict[tuple[ir.Value, float], ir.Value] = {}
    for layer in find_layers(quantized):
        if layer.name not in scales:
            continue
        scale, node = scales[layer.name], layer.node
        key = layer.activation, float(scale)
        if key not in activations:
            activations[key] = _round_trip(graph, layer.activation, scale, form, node)
        weight = _stored(graph, node, layer.weight, layer.axis, form)
        if node.op_type == "SmallConv":
            node = _plain_convolution(graph, node)
        node.replace_input_with(0, activations[key])
        node.replace_input_with(1, weight)
        if shifts is not None and layer.name in shifts:
            _add_to_bias(graph, node, shifts[layer.name])
    _drop_unused(quantized)
    return quantized


def _round_trip(graph: ir.Graph, value: ir.Value, scale: np.float32, form: Format, before: ir.Node) -> ir.Value:
    """The value quantized and dequantized, right before a node."""
    factor = initializer(graph, f"{value.name}_scale", np.array(scale, np.float32))
    zero = initializer(graph, f"{value.name}_zero", _zeros((), form))
    name = f"{value.name}_{form}"
    module = module_of(before)
    store = ir.node("QuantizeLinear", [value, factor, zero], name=node_name(module, name))
    read = ir.node("DequantizeLinear", [store.outputs[0], factor, zero], name=node_name(module, f"{name}_read"))
    for node, out, dtype in ((store, name, _TYPES[form]), (read, f"{name}_read", ir.DataType.FLOAT)):
        node.outputs[0].name, node.outputs[0].shape = out, value.shape
        node.outputs[0].type = ir.TensorType(dtype)
    graph.insert_before(before, [store, read])
    return read.outputs[0]


def _stored(graph: ir.Graph, before: ir.Node, weight: NDArray[np.float32], axis: int, form: Format) -> ir.Value:
    """The quantized weights, dequantized right before a node."""
    name = node_name(before.name or "", "weight").replace("/", ".")
    scales = weight_scales(weight, axis, form)
    shape = [1] * weight.ndim
    shape[axis] = -1
    inputs = [
        initializer(graph, f"{name}_{form}", quantize(weight, scales.reshape(shape), form)),
        initializer(graph, f"{name}_scale", scales),
        initializer(graph, f"{name}_zero", _zeros(scales.shape, form)),
    ]
    read = ir.node("DequantizeLinear", inputs, attributes={"axis": axis}, name=f"{before.name}_weight")
    out = read.outputs[0]
    out.name, out.shape, out.type = f"{name}_read", ir.Shape(weight.shape), ir.TensorType(ir.DataType.FLOAT)
    graph.insert_before(before, read)
    return out


def _plain_convolution(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """A SmallConv as a Conv: otherwise, Winograd's intermediate sums would be quantized."""
    convolution = ir.node(
        "Conv", node.inputs[:3], attributes={"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, name=node.name
    )
    old, new = node.outputs[0], convolution.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    ir.convenience.replace_nodes_and_values(graph, node, [node], [convolution], [old], [new])
    return convolution


def _add_to_bias(graph: ir.Graph, node: ir.Node, shift: NDArray[np.float32]) -> None:
    """Add (outputs,) to a layer's outputs: in a convolution's bias, or after a product, which has none."""
    name = node_name(node.name or "", "bias").replace("/", ".")
    if node.op_type != "MatMul":
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            assert bias.const_value is not None, f"the bias of {node.name} is not a constant"
            shift = bias.const_value.numpy() + shift
        node.resize_inputs(3)
        node.replace_input_with(2, initializer(graph, name, shift))
        return
    add_after(graph, node, initializer(graph, name, shift))


def add_after(graph: ir.Graph, node: ir.Node, term: ir.Value) -> None:
    """Add a value to a node's output; the sum takes the output's name and place."""
    out = node.outputs[0]
    add = ir.node("Add", [out, term], name=f"{node.name}_sum")
    total = add.outputs[0]
    total.name, total.shape, total.type = out.name, out.shape, out.type
    out.name = f"{out.name}_unshifted"
    out.replace_all_uses_with(total, replace_graph_outputs=True)
    add.replace_input_with(0, out)
    graph.insert_after(node, add)


def _zeros(shape: tuple[int, ...], form: Format) -> NDArray[np.generic]:
    return quantize(np.zeros(shape, np.float32), np.float32(1), form)


def initializer(graph: ir.Graph, name: str, values: NDArray[np.generic]) -> ir.Value:
    """A constant of the graph, created or found by its name."""
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.initializers[name] = value
    return value


def _drop_unused(model: ir.Model) -> None:
    """Remove replaced weights, the nodes that selected them from a stack, and bodies of unused operators."""
    graph = model.graph
    kept = set(graph.outputs)
    for node in reversed(list(graph)):
        if not any(value.uses() or value in kept for value in node.outputs):
            graph.remove(node, safe=True)
    for name in [name for name, value in graph.initializers.items() if not value.uses()]:
        del graph.initializers[name]
    used = {(node.domain, node.op_type) for node in graph}
    for key in [key for key in model.functions if key[:2] not in used]:
        del model.functions[key]
