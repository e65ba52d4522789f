"""The operator SpatialAttention."""

import onnx

from lfdm_export.ops.operator import Node, Nodes, Operator
from lfdm_export.ops.spatial_attention.onnx_function import (
    explicit_spatial_attention_function,
    spatial_attention_function,
)

_QUERY = 2


def _explicit(nodes: Nodes) -> onnx.FunctionProto:
    return explicit_spatial_attention_function(*heads_of(nodes))


def heads_of(nodes: Nodes) -> tuple[int, int]:
    """Number and width of the heads of attention nodes, from the queries' weights (C, H·D)."""

    def of_one(node: Node) -> tuple[int, int]:
        heads = int(node.attribute("heads"))
        return heads, node.constant(_QUERY)[1] // heads

    return nodes.same(of_one)


SPATIAL_ATTENTION = Operator(
    "SpatialAttention",
    body=lambda _: spatial_attention_function(),
    openvino=_explicit,
    tensorrt=_explicit,
)
