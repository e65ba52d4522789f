"""The layers of a stage's graph that can be quantized: products of an activation with constant weights."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfdm_export.graphs.policy import module_of
from lfdm_export.stages import DRIVE_STAGE

#: Patterns of the full names of modules that stay float, with the reason. Measured on both golden variants
#: (docs/precision.md): the first have three input channels and the last three output channels, so they cost almost
#: nothing.
KEPT: dict[str, str] = {
    r".*\.latent_conv": "first convolution of the noisy latent: 3 channels in",
    r".*\.final_convs\.\d+": "the predicted noise itself: 3 channels out",
    r"generator\.first\.conv": "first convolution of the image: 3 channels in",
    r"final": "the picture itself: 3 channels out",
    r"context": "runs once per clip, and its error would affect every step",
}
#: Stages without quantization: they run once per clip or never, and compute coordinates or conditions.
KEPT_STAGES = (DRIVE_STAGE, "text")

# Axis of the weights' outputs, by operator.
_OUTPUT_AXES = {"Conv": 0, "SmallConv": 0, "ConvTranspose": 1, "MatMul": 1}


@dataclass(frozen=True, eq=False)
class Layer:
    """One product that can be quantized.

    Attributes:
        name: its module, with an index if the module has several products; the same in all graphs of a network.
        node: its node in the graph.
        weight: float32.
        axis: axis of the outputs in `weight`.
    """

    name: str
    node: ir.Node
    weight: NDArray[np.float32] = field(repr=False)
    axis: int

    @property
    def activation(self) -> ir.Value:
        """The factor of the weights."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def rank(self) -> int:
        """Number of axes of the node's output."""
        shape = self.node.outputs[0].shape
        assert shape is not None, f"the output of {self.name} has no shape"
        return len(shape)

    @property
    def output_axis(self) -> int:
        """Axis of the outputs in the node's output."""
        return self.rank - 1 if self.node.op_type == "MatMul" else 1

    @property
    def group(self) -> str:
        """The part of the network that contains it, such as a level: its name up to the first number."""
        parts = self.name.removeprefix("denoise.unet.").split(".")
        for count, part in enumerate(parts, start=1):
            if re.search(r"\d", part):
                return ".".join(parts[:count])
        return parts[0]


def find_layers(model: ir.Model) -> list[Layer]:
    """All layers of a float32 graph that can be quantized, including those that stay float, in the graph's order."""
    found = []
    for node in model.graph:
        if node.op_type not in _OUTPUT_AXES or len(node.inputs) < 2:
            continue
        weight = _constant(node.inputs[1])
        if weight is None or weight.ndim < 2 or (node.op_type == "MatMul" and weight.ndim != 2):
            continue
        found.append((_module(node), node, weight))
    several = Counter(module for module, _, _ in found)
    seen: Counter[str] = Counter()
    layers = []
    for module, node, weight in found:
        name = f"{module}.{seen[module]}" if several[module] > 1 else module
        seen[module] += 1
        layers.append(Layer(name, node, weight, _OUTPUT_AXES[node.op_type]))
    return layers


def kept_reason(name: str) -> str | None:
    """Why a layer stays float; None if it is quantized."""
    return next((reason for pattern, reason in KEPT.items() if re.fullmatch(pattern, name)), None)


def _module(node: ir.Node) -> str:
    """The node's module; for the stage's own layers, the name of their weights."""
    weight = node.inputs[1]
    assert weight is not None
    return module_of(node) or (weight.name or "")


def _constant(value: ir.Value | None) -> NDArray[np.float32] | None:
    """A float32 constant, or one selected from a stack of constants."""
    if value is None:
        return None
    if value.const_value is not None:
        array = value.const_value.numpy()
        return array if array.dtype == np.float32 else None
    producer = value.producer()
    if producer is None or producer.op_type != "Gather":
        return None
    stack, index = (one.const_value if one is not None else None for one in producer.inputs)
    axis = producer.attributes.get("axis")
    if stack is None or index is None:
        return None
    taken = np.take(stack.numpy(), index.numpy(), axis=0 if axis is None else axis.as_int())
    return taken if taken.dtype == np.float32 else None
