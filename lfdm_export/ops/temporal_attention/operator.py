"""The operator TemporalAttention."""

import onnx

from lfdm_export.ops.operator import Nodes, Operator
from lfdm_export.ops.spatial_attention.operator import heads_of
from lfdm_export.ops.temporal_attention import TEMPORAL_PREFIX
from lfdm_export.ops.temporal_attention.onnx_function import (
    explicit_temporal_attention_function,
    temporal_attention_function,
)
from lfdm_export.ops.temporal_attention.openvino_function import openvino_temporal_attention

#: Rotary tables and position bias.
_COS, _SIN, _BIAS = 6, 7, 8


def _chunks(nodes: Nodes) -> int:
    return int(nodes.name.removeprefix(TEMPORAL_PREFIX))


def _rotated(nodes: Nodes) -> int:
    return nodes.same(lambda node: int(node.attribute("rotary_width")))


def _explicit(nodes: Nodes) -> onnx.FunctionProto:
    heads, width = heads_of(nodes)
    return explicit_temporal_attention_function(_chunks(nodes), heads, width, _rotated(nodes), rotary_operator=True)


def _openvino(nodes: Nodes) -> onnx.FunctionProto:
    heads, width = heads_of(nodes)
    return openvino_temporal_attention(nodes.name, heads, width, _rotated(nodes))


TEMPORAL_ATTENTION = Operator(
    TEMPORAL_PREFIX,
    body=lambda nodes: temporal_attention_function(_chunks(nodes)),
    openvino=_openvino,
    tensorrt=_explicit,
    numbered=True,
    float32_inputs=(_COS, _SIN, _BIAS),
)
