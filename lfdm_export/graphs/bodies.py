"""Give operators of domain `lfdm` the bodies for a backend; their nodes do not change.

A stored graph has the bodies for ONNX Runtime. TensorRT has fused kernels for attention, group norm and small
convolutions that it recognizes by the standard operators, but no opset 23 Attention in float32. OpenVINO supports
neither local functions nor opsets beyond 20. Each operator defines its bodies: see `lfdm_export.ops.operators`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import onnx.inliner

from lfdm_export.errors import ExportError
from lfdm_export.graphs.openvino_quantized import unsigned_after_concat
from lfdm_export.ops.domain import DOMAIN
from lfdm_export.ops.operator import Body, Nodes, Operator
from lfdm_export.ops.operators import find_operator

#: The last opset in which OpenVINO supports every operator that a stage uses.
OPENVINO_OPSET = 20
#: The kinds of bodies, and which one of an operator each means; None: the stored one.
BODIES: Mapping[str, Callable[[Operator], Body | None]] = {
    "stored": lambda _: None,
    "openvino": lambda operator: operator.openvino,
    "tensorrt": lambda operator: operator.tensorrt,
}


def with_bodies(model: onnx.ModelProto, bodies: str) -> onnx.ModelProto:
    """A stage's graph with the bodies for a backend.

    Args:
        model: a stage's graph as stored, of any precision; external weights need not be loaded. It is not changed.
        bodies: "stored": those of the file. "tensorrt", for every program on a GPU: attention written out around opset
            23's RotaryEmbedding, GroupNormalization, Conv, a search with few rounds for the quantile. "openvino":
            attention and rotation written out, Conv; everything inlined, opset 20; values quantized after a Concat are
            stored as uint8.

    Returns:
        A new model with the same nodes (inlined for "openvino"), inputs, outputs and weights.

    Raises:
        ExportError: the kind of bodies or an operator is unknown, or nodes that share a body need different ones.
    """
    if bodies not in BODIES:
        raise ExportError(f"unknown bodies {bodies!r}; expected one of {', '.join(BODIES)}")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    constants = {tensor.name: tuple(tensor.dims) for tensor in changed.graph.initializer}
    for function in changed.functions:
        if function.domain == DOMAIN:
            body = BODIES[bodies](find_operator(function.name))
            nodes = [node for node in changed.graph.node if (node.domain, node.op_type) == (DOMAIN, function.name)]
            if body is not None and nodes:
                function.CopyFrom(body(Nodes(function.name, nodes, constants)))
    return _for_openvino(changed) if bodies == "openvino" else changed


def _for_openvino(model: onnx.ModelProto) -> onnx.ModelProto:
    inlined = onnx.inliner.inline_local_functions(model)
    del inlined.opset_import[:]
    inlined.opset_import.append(onnx.helper.make_opsetid("", OPENVINO_OPSET))
    unsigned_after_concat(inlined.graph)
    return inlined
