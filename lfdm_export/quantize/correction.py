"""Bias correction: the mean shift that rounding causes in each output of a layer is taken back by the layer's bias.

Rounded weights and activations move a layer's outputs by errors with a mean that is not zero. This mean hardly depends
on state, label and noise level, so that errors of many steps add up: all pictures of a clip are shifted the same way.

Source: Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction (2019), section 4.2: the
empirical correction, layer after layer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.graphs import trace
from lfdm_export.quantize.layers import Layer, find_layers
from lfdm_export.quantize.qdq import add_after, initializer, insert_qdq
from lfdm_export.quantize.ranges import Format
from lfdm_export.quantize.sensitivity import MEASURED, ratio_of
from lfdm_export.quantize.states import Feeds
from lfdm_export.stages import StageSpec, TensorSpec

Float32: TypeAlias = NDArray[np.float32]
# The mean output (outputs,) of a layer: that of the float32 graph, and what is added to reach it.
_MEAN, _SHIFT = "layer_mean", "layer_shift"
_TINY = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class Errors:
    """The errors of a quantized stage.

    Attributes:
        ratio: ratio of signal to error of its output in dB.
        shift: the largest mean error of a channel of its output, as a share of the output's root mean square.
    """

    ratio: float
    shift: float


def measure_errors(
    exact: ir.Model, found: ir.Model, spec: StageSpec, states: Sequence[Feeds], *, threads: int | None = None
) -> Errors:
    """Compare a stage's output of two graphs, over all states.

    Args:
        exact: float32.
        found: quantized.
        spec: specification of the stage.
        states: feeds of the stage.
        threads: threads of ONNX Runtime; None for all cores.

    Raises:
        EngineError: a graph cannot be run.
    """
    outputs = []
    for model in (exact, found):
        with _loaded(model.clone(), spec, (), (), threads) as loaded:
            runs = [loaded.engine.run(feeds)[MEASURED[spec.name]] for feeds in states]
            outputs.append(np.concatenate(runs).astype(np.float64))
    size = float(np.sqrt(np.square(outputs[0]).mean()))
    error = outputs[1] - outputs[0]
    channels = error.mean(axis=tuple(axis for axis in range(error.ndim) if axis != 1))
    return Errors(ratio_of([outputs[0]], [outputs[1]]), float(np.abs(channels).max()) / max(size, _TINY))


def measure_shifts(
    graph: ir.Model,
    spec: StageSpec,
    scales: Mapping[str, np.float32],
    form: Format,
    states: Sequence[Feeds],
    *,
    threads: int | None = None,
) -> dict[str, Float32]:
    """The mean of exact minus quantized output of each quantized layer, with all layers before it corrected.

    One run per state measures all layers: in the run, each layer's outputs get the exact means of this state, so that
    the layers after it take corrected inputs.

    Args:
        graph: float32; it is not changed.
        spec: specification of the stage.
        scales: scale of each quantized layer's activation, by the layer's name.
        form: "int8" or "fp8".
        states: feeds of the stage; all count the same.
        threads: threads of ONNX Runtime; None for all cores.

    Returns:
        (outputs,) for each quantized layer, by its name: what to add to its bias.

    Raises:
        EngineError: a graph cannot be run.
    """
    layers = [layer for layer in find_layers(graph) if layer.name in scales]
    sums = {layer.name: np.zeros(layer.weight.shape[layer.axis], np.float64) for layer in layers}
    if not sums:
        return {}
    observing, correcting = _with_means(graph, layers), _with_corrections(insert_qdq(graph, scales, form), layers)
    with _loaded(observing, spec, (), _specs(_MEAN, layers), threads) as exact:
        means = [{name: found[name] for name in exact.added} for found in map(exact.engine.run, states)]
    with _loaded(correcting, spec, _specs(_MEAN, layers), _specs(_SHIFT, layers), threads) as quantized:
        for feeds, mean in zip(states, means, strict=True):
            found = quantized.engine.run({**feeds, **mean})
            for name, layer in zip(quantized.added, layers, strict=True):
                sums[layer.name] += np.asarray(found[name], np.float64)
    return {name: (total / len(states)).astype(np.float32) for name, total in sums.items()}


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """A loaded graph, and the names of the outputs that the stage does not have."""

    engine: OnnxRuntimeEngine
    added: tuple[str, ...]


@contextlib.contextmanager
def _loaded(
    model: ir.Model,
    spec: StageSpec,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    threads: int | None,
) -> Iterator[_Loaded]:
    """A graph of a stage with additional inputs and outputs, from a temporary folder."""
    wide = dataclasses.replace(spec, inputs=(*spec.inputs, *inputs), outputs=(*spec.outputs, *outputs))
    with tempfile.TemporaryDirectory(prefix="lfdm-correction-") as folder:
        trace.save({spec.name: model}, Path(folder), f"{spec.name}.data")
        engine = OnnxRuntimeEngine(Path(folder) / f"{spec.name}.onnx", wide, threads=threads)
        yield _Loaded(engine, tuple(tensor.name for tensor in outputs))


def _specs(name: str, layers: Sequence[Layer]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"{name}_{index}", "float32", (layer.weight.shape[layer.axis],))
        for index, layer in enumerate(layers)
    )


def _with_means(model: ir.Model, layers: Sequence[Layer]) -> ir.Model:
    """The graph with the mean of each layer's outputs as a further output."""
    observing = model.clone()
    nodes = {node.name: node for node in observing.graph}
    for index, layer in enumerate(layers):
        node = nodes[layer.node.name]
        mean = _mean(observing.graph, node, layer, f"{_MEAN}_{index}")
        observing.graph.insert_after(node, mean)
        observing.graph.outputs.append(mean.outputs[0])
    return observing


def _with_corrections(quantized: ir.Model, layers: Sequence[Layer]) -> ir.Model:
    """Let each layer's outputs have the means that further inputs give; what is added for it is a further output."""
    graph = quantized.graph
    nodes = {node.name: node for node in graph}
    for index, layer in enumerate(layers):
        node = nodes[layer.node.name]
        wanted = ir.Value(
            name=f"{_MEAN}_{index}",
            shape=ir.Shape((layer.weight.shape[layer.axis],)),
            type=ir.TensorType(ir.DataType.FLOAT),
        )
        graph.inputs.append(wanted)
        mean = _mean(graph, node, layer, f"found_mean_{index}")
        shift = _vector(ir.node("Sub", [wanted, mean.outputs[0]]), layer, f"{_SHIFT}_{index}")
        # Along the outputs' axis: the shape (outputs, 1, 1) but for products, whose outputs are last.
        trailing = layer.rank - 1 - layer.output_axis
        shape = initializer(graph, f"outputs_first_{trailing}", np.array([-1] + [1] * trailing, np.int64))
        aligned = ir.node("Reshape", [shift.outputs[0], shape], name=f"{_SHIFT}_{index}/Reshape")
        aligned.outputs[0].name = f"{_SHIFT}_{index}_aligned"
        add_after(graph, node, aligned.outputs[0])
        mean.replace_input_with(0, node.outputs[0])  # of the layer itself, not of the sum
        graph.insert_after(node, [mean, shift, aligned])
        graph.outputs.append(shift.outputs[0])
    return quantized


def _mean(graph: ir.Graph, node: ir.Node, layer: Layer, name: str) -> ir.Node:
    """A node with the mean of each of a layer's outputs, (outputs,)."""
    others = [axis for axis in range(layer.rank) if axis != layer.output_axis]
    axes = initializer(graph, f"all_but_{layer.output_axis}_of_{layer.rank}", np.array(others, np.int64))
    return _vector(ir.node("ReduceMean", [node.outputs[0], axes], attributes={"keepdims": 0}), layer, name)


def _vector(node: ir.Node, layer: Layer, name: str) -> ir.Node:
    """The node with names, and an output of type and shape (outputs,) float32."""
    node.name = f"{name}/{node.op_type}"
    out = node.outputs[0]
    out.name, out.shape = name, ir.Shape((layer.weight.shape[layer.axis],))
    out.type = ir.TensorType(ir.DataType.FLOAT)
    return node
