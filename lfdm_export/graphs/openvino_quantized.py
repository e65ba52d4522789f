"""Quantized activations in a form that OpenVINO's CPU plugin computes correctly on every processor.

Where convolutions do not support signed activations (a processor without AMX), the plugin shifts int8 to uint8, and
moves a `QuantizeLinear` after a `Concat` to the concatenated tensors. This loses the zero point, so that the
convolution's result is off by a sixth of its magnitude (OpenVINO 2026.4; clips of the shipped model: 24 dB, not 47).
The same values stored as uint8 with a zero point of 128 are correct, and as fast with AMX.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

# Operators across which the plugin moves a quantization toward a Concat.
_TRANSPARENT = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Flatten")
_ZERO = "zero_of_uint8"


def unsigned_after_concat(graph: onnx.GraphProto) -> None:
    """Store concatenated activations as uint8 around 128 instead of int8 around 0; their values stay the same.

    Args:
        graph: without local functions; it is changed.
    """
    producers = {name: node for node in graph.node for name in node.output}
    zeros = {tensor.name for tensor in graph.initializer if tensor.data_type == onnx.TensorProto.INT8}
    changed = set()
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[2] in zeros and _concatenated(node.input[0], producers):
            node.input[2] = _ZERO
            changed.add(node.output[0])
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in changed:
            node.input[2] = _ZERO
    if changed:
        graph.initializer.append(onnx.numpy_helper.from_array(np.array(128, np.uint8), _ZERO))


def _concatenated(name: str, producers: Mapping[str, onnx.NodeProto]) -> bool:
    node = producers.get(name)
    while node is not None and node.op_type in _TRANSPARENT:
        node = producers.get(node.input[0])
    return node is not None and node.op_type == "Concat"
