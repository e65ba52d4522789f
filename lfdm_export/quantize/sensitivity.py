"""Measure the cost of quantizing each layer, and decide which layers stay float.

A stage runs as one float32 graph. For each layer, an entry of the input `quantized` switches between exact and
quantized values, and the scales are an input as well, so that one session makes all measurements.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfdm_export.engines.checks import Array
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.graphs import trace
from lfdm_export.quantize.layers import find_layers, kept_reason
from lfdm_export.quantize.qdq import initializer
from lfdm_export.quantize.ranges import Format, quantize, rounded, weight_scales
from lfdm_export.quantize.report import Sensitivity, StageSensitivity
from lfdm_export.quantize.states import Feeds
from lfdm_export.stages import StageSpec, TensorSpec

Float32: TypeAlias = NDArray[np.float32]
_GATES, _SCALES = "quantized", "scales"
#: The output whose error is measured, by stage; for `encode`, the UNet's input.
MEASURED = {"encode": "context", "denoise": "predicted_noise", "decode": "frames"}
#: A layer stays float if its stage's output has less than this many dB when only the layer is quantized.
FLOOR = 35.0
#: Smallest dB of a whole quantized stage: groups stay float, worst first, until it is reached.
TOGETHER: Mapping[Format, float] = {"int8": 32.0, "fp8": 26.0}
# A higher ratio of signal to error is float32's own rounding.
_EXACT = 150.0


def measure_stage(
    graph: ir.Model,
    spec: StageSpec,
    scales: Mapping[str, np.float32],
    states: Sequence[Feeds],
    form: Format,
    *,
    seconds: float | None,
    floor: float = FLOOR,
    together: float | None = None,
    threads: int | None = None,
    each_way: bool = False,
) -> StageSensitivity:
    """Measure one stage, and decide which layers stay float.

    Args:
        graph: float32; it is not changed.
        spec: specification of the stage.
        scales: scale of every layer's activation, by the layer's name.
        states: feeds that calibration did not use.
        form: "int8" or "fp8".
        seconds: time for measuring single layers, after the groups and the layers that `floor` requires; None for all.
        floor: layers with a lower ratio of signal to error when only they are quantized stay float, in dB.
        together: smallest ratio of the whole quantized stage, in dB; default: TOGETHER. Groups of layers stay float
            until it is reached, those with the lowest ratio first.
        threads: threads of ONNX Runtime; None for all cores.
        each_way: measure layers and groups `without` too.

    Raises:
        EngineError: the graph cannot be run.
    """
    with switchable(graph, spec, scales, form, threads) as switch:
        wanted = TOGETHER[form] if together is None else together
        return _Measurement(switch, spec, states, each_way).run(seconds, floor, wanted)


class _Measurement:
    """The measurements of `measure_stage`."""

    def __init__(self, switch: Switchable, spec: StageSpec, states: Sequence[Feeds], each_way: bool) -> None:
        self.switch, self.spec, self.states, self.each_way = switch, spec, states, each_way
        self.output = MEASURED[spec.name]
        self.all = np.ones(len(switch.names), bool)
        self.exact = [self._run(feeds, ~self.all) for feeds in states]
        reasons = {name: kept_reason(name) for name in switch.names}
        self.kept = {name: reason for name, reason in reasons.items() if reason is not None}

    def run(self, seconds: float | None, floor: float, wanted: float) -> StageSensitivity:
        """Measure groups, the layers of groups below the floor, then other layers until the time limit."""
        names = list(dict.fromkeys(self.switch.groups))
        groups = {name: (self._members(name), self._ratio(self._members(name))) for name in names}
        worst_first = sorted(groups, key=lambda name: groups[name][1])
        alone: dict[int, float] = {}
        for name in worst_first:
            if groups[name][1] < floor:
                alone |= {index: self._ratio(self._only(index)) for index in _indices(groups[name][0])}
        for index, ratio in alone.items():
            if ratio < floor:
                self.kept.setdefault(self.switch.names[index], f"alone it leaves {ratio:.1f} dB, below {floor:g}")
        together = self._keep_groups([(name, groups[name][0]) for name in worst_first], wanted)
        end = math.inf if seconds is None else time.monotonic() + seconds
        for index in (index for name in worst_first for index in _indices(groups[name][0])):
            if index not in alone and time.monotonic() < end:
                alone[index] = self._ratio(self._only(index))
        layers = [self._row(self.switch.names[index], self._only(index), ratio) for index, ratio in alone.items()]
        return StageSensitivity(
            stage=self.spec.name,
            output=self.output,
            states=len(self.states),
            together=together,
            everything=self._ratio(self.all),
            groups=tuple(self._row(name, *groups[name]) for name in worst_first),
            layers=tuple(sorted(layers, key=lambda layer: layer.alone)),
            total_layers=len(self.all),
            kept=self.kept,
        )

    def _keep_groups(self, worst_first: Sequence[tuple[str, NDArray[np.bool_]]], wanted: float) -> float:
        """Let groups stay float until the stage reaches `wanted` dB; returns the ratio reached."""
        together = self._ratio(self._quantized())
        for group, members in worst_first:
            if together >= wanted:
                break
            before = f"with {group} the stage leaves {together:.1f} dB, below {wanted:g}"
            if (members & self._quantized()).any():
                for index in _indices(members):
                    self.kept.setdefault(self.switch.names[index], before)
                together = self._ratio(self._quantized())
        return together

    def _row(self, name: str, members: NDArray[np.bool_], alone: float) -> Sensitivity:
        reasons = {self.kept.get(self.switch.names[index]) for index in _indices(members)}
        quantized = self._quantized()
        measured = self.each_way and bool((quantized & members).any())
        return Sensitivity(
            name=name,
            layers=int(members.sum()),
            weights=int(self.switch.weights[members].sum()),
            kept=reasons.pop() if len(reasons) == 1 else None,
            alone=alone,
            without=self._ratio(quantized & ~members) if measured else None,
        )

    def _quantized(self) -> NDArray[np.bool_]:
        return np.array([name not in self.kept for name in self.switch.names])

    def _members(self, group: str) -> NDArray[np.bool_]:
        return np.array([one == group for one in self.switch.groups])

    def _only(self, index: int) -> NDArray[np.bool_]:
        only: NDArray[np.bool_] = np.arange(len(self.all)) == index
        return only

    def _run(self, feeds: Feeds, on: NDArray[np.bool_]) -> Array:
        return self.switch.run(feeds, on)[self.output]

    def _ratio(self, on: NDArray[np.bool_]) -> float:
        return ratio_of(self.exact, [self._run(feeds, on) for feeds in self.states])


def _indices(members: NDArray[np.bool_]) -> list[int]:
    return [int(index) for index in np.flatnonzero(members)]


def ratio_of(exact: Sequence[Array], found: Sequence[Array]) -> float:
    """Ratio of signal to error in dB over all pairs of arrays."""
    signal = sum(float(np.square(one, dtype=np.float64).sum()) for one in exact)
    error = sum(float(np.square(np.subtract(a, b, dtype=np.float64)).sum()) for a, b in zip(found, exact, strict=True))
    return min(10 * math.log10(signal / error), _EXACT) if error > 0 and signal > 0 else _EXACT


class Switchable:
    """A loaded stage whose layers can be quantized one by one.

    Attributes:
        names: names of the layers.
        groups: group of each layer.
        weights: number of weights of each layer, (layers,).
    """

    def __init__(
        self,
        graph: ir.Model,
        spec: StageSpec,
        scales: Mapping[str, np.float32],
        form: Format,
        folder: Path,
        threads: int | None,
    ) -> None:
        """Write the graph into a folder, and load it."""
        switched, self.names, self.groups, self.weights = _with_switches(graph, scales, form)
        self._scales = np.array([scales[name] for name in self.names], np.float32)
        count = len(self.names)
        extra = (TensorSpec(_GATES, "float32", (count,)), TensorSpec(_SCALES, "float32", (count,)))
        trace.save({spec.name: switched}, folder, f"{spec.name}.data")
        wide = dataclasses.replace(spec, inputs=(*spec.inputs, *extra))
        self._engine = OnnxRuntimeEngine(folder / f"{spec.name}.onnx", wide, threads=threads)

    def run(self, feeds: Feeds, on: NDArray[np.bool_], scales: Float32 | None = None) -> dict[str, Array]:
        """Run it.

        Args:
            feeds: feeds of the stage.
            on: the quantized layers, (layers,).
            scales: scales of the layers' activations, (layers,); None for those of the constructor.
        """
        return self._engine.run(
            {**feeds, _GATES: on.astype(np.float32), _SCALES: self._scales if scales is None else scales}
        )


@contextlib.contextmanager
def switchable(
    graph: ir.Model, spec: StageSpec, scales: Mapping[str, np.float32], form: Format, threads: int | None = None
) -> Iterator[Switchable]:
    """`Switchable` in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="lfdm-sensitivity-") as folder:
        yield Switchable(graph, spec, scales, form, Path(folder), threads)


def _with_switches(
    model: ir.Model, scales: Mapping[str, np.float32], form: Format
) -> tuple[ir.Model, list[str], list[str], NDArray[np.int64]]:
    """Each layer as x + g (q(x) - x) of activation and weights, with a switch g of 0 or 1."""
    switched = model.clone()
    graph = switched.graph
    layers = [layer for layer in find_layers(switched) if layer.name in scales]
    gates, factors = (
        ir.Value(name=name, shape=ir.Shape((len(layers),)), type=ir.TensorType(ir.DataType.FLOAT))
        for name in (_GATES, _SCALES)
    )
    graph.inputs.extend((gates, factors))
    for index, layer in enumerate(layers):
        node = layer.node
        position = initializer(graph, f"{_GATES}_{index}", np.array(index, np.int64))
        zero = initializer(graph, "zero_of_activations", quantize(np.zeros((), np.float32), np.float32(1), form))
        # Weights are exact when their change by quantizing is switched off.
        shape = [1] * layer.weight.ndim
        shape[layer.axis] = -1
        per_output = weight_scales(layer.weight, layer.axis, form).reshape(shape)
        exact = initializer(graph, f"weight_{index}", layer.weight)
        change = initializer(graph, f"change_{index}", rounded(layer.weight, per_output, form) - layer.weight)

        made: list[ir.Node] = []

        def make(operator: str, *inputs: ir.Value, made: list[ir.Node] = made, index: int = index) -> ir.Value:
            made.append(ir.node(operator, list(inputs), name=f"switch_{index}/{operator}_{len(made)}"))
            made[-1].outputs[0].name = f"switch_{index}_{len(made)}"
            return made[-1].outputs[0]

        gate, factor = make("Gather", gates, position), make("Gather", factors, position)
        stored = make("QuantizeLinear", layer.activation, factor, zero)
        read = make("DequantizeLinear", stored, factor, zero)
        error = make("Sub", read, layer.activation)
        activation = make("Add", layer.activation, make("Mul", error, gate))
        weight = make("Add", exact, make("Mul", change, gate))
        graph.insert_before(node, made)
        node.replace_input_with(0, activation)
        node.replace_input_with(1, weight)
    groups = [layer.group for layer in layers]
    return switched, [layer.name for layer in layers], groups, np.array([layer.weight.size for layer in layers])
