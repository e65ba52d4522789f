"""The operators GroupNormSilu and ModulatedGroupNormSilu."""

import onnx

from lfdm_export.ops.group_norm_silu.onnx_function import group_norm_silu_function, whole_group_norm_silu_function
from lfdm_export.ops.group_norm_silu.openvino_function import openvino_group_norm_silu
from lfdm_export.ops.operator import Nodes, Operator

_GAMMA, _BETA = 1, 2


def _whole(nodes: Nodes) -> onnx.FunctionProto:
    return whole_group_norm_silu_function(nodes.name, nodes.same(lambda node: int(node.attribute("per_group")[1])))


def _openvino(nodes: Nodes) -> onnx.FunctionProto:
    frames, groups = nodes.same(lambda node: tuple(node.attribute("grouped")[1:3]))
    return openvino_group_norm_silu(nodes.name, frames, groups)


GROUP_NORMS = tuple(
    Operator(
        name,
        body=lambda nodes: group_norm_silu_function(nodes.name),
        openvino=_openvino,
        tensorrt=_whole,
        float32_inputs=(_GAMMA, _BETA),
    )
    for name in ("GroupNormSilu", "ModulatedGroupNormSilu")
)
