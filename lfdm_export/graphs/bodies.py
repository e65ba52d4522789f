"""Operators of domain `lfdm` get the bodies that suit a backend; their nodes stay as they are.

A stored graph's bodies suit ONNX Runtime. TensorRT has fused kernels for attention, group norm and small
convolutions that it knows by their usual operators, and no opset 23 Attention in float32; OpenVINO reads neither local
functions nor opsets beyond 20.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeVar, cast, get_args

import onnx
import onnx.inliner

from lfdm_export.errors import ExportError
from lfdm_export.graphs.openvino_bodies import (
    openvino_group_norm_silu,
    openvino_temporal_attention,
    openvino_warp_functions,
)
from lfdm_export.graphs.openvino_quantized import unsigned_after_concat
from lfdm_export.ops.group_norm_silu.onnx_function import whole_group_norm_silu_functions
from lfdm_export.ops.small_conv.onnx_function import plain_small_conv_function
from lfdm_export.ops.spatial_attention.onnx_function import explicit_spatial_attention_function
from lfdm_export.ops.symbolic import DOMAIN
from lfdm_export.ops.temporal_attention.onnx_function import explicit_temporal_attention_function
from lfdm_export.ops.temporal_attention.reference import TEMPORAL_PREFIX
from lfdm_export.ops.thresholded_step.onnx_function import thresholded_step_function

BodyTarget = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"]
#: The last opset of which OpenVINO knows every operator that a stage uses.
OPENVINO_OPSET = 20
# Which input of an attention node holds the weights of its queries.
_QUERY = 2

_T = TypeVar("_T")


def with_bodies(model: onnx.ModelProto, target: str) -> onnx.ModelProto:
    """A stage's graph as a backend should read it.

    Args:
        model: a stage's graph as it is stored, of any precision; external weights need not be loaded. It is left
            as it is.
        target: "onnxruntime": the stored bodies. "tensorrt", "tensorrt-rtx": attention written out around
            opset 23's RotaryEmbedding, GroupNormalization, Conv, a search of few rounds for the quantile.
            "openvino": attention and rotation written out, Conv; everything inlined, opset 20; what is quantized
            after a Concat is stored as uint8.

    Returns:
        Another model with the same nodes (inlined for "openvino"), inputs, outputs and weights.

    Raises:
        ExportError: the target is unknown, or nodes that share a body would need different ones.
    """
    if target not in get_args(BodyTarget):
        raise ExportError(f"unknown target {target!r}; expected one of {', '.join(get_args(BodyTarget))}")
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    if target == "onnxruntime":
        return changed
    for function in changed.functions:
        if function.domain == DOMAIN:
            body = _body(changed.graph, function, cast(BodyTarget, target))
            if body is not None:
                function.CopyFrom(body)
    return _for_openvino(changed) if target == "openvino" else changed


def _body(graph: onnx.GraphProto, function: onnx.FunctionProto, target: BodyTarget) -> onnx.FunctionProto | None:
    """The body of an operator for a target; None where the stored one serves."""
    name = function.name
    nodes = [node for node in graph.node if node.domain == DOMAIN and node.op_type == name]
    if target == "openvino" and name not in ("SmallConv", "SpatialAttention"):
        return _openvino_body(graph, name, nodes)
    if name == "SmallConv":
        return plain_small_conv_function()
    if name == "ThresholdedStep":
        weight = _same(name, [_attribute(node, "weight") for node in nodes])
        return thresholded_step_function(weight, pivots_at_once=True)
    if name in ("GroupNormSilu", "ModulatedGroupNormSilu"):
        groups = _same(name, [_attribute(node, "per_group")[1] for node in nodes])
        return next(body for body in whole_group_norm_silu_functions(groups) if body.name == name)
    if name == "SpatialAttention":
        heads, width = _same(name, [_heads(graph, node) for node in nodes])
        return explicit_spatial_attention_function(heads, width)
    if name.startswith(TEMPORAL_PREFIX):
        heads, width = _same(name, [_heads(graph, node) for node in nodes])
        rotated = _same(name, [_attribute(node, "rotary_width") for node in nodes])
        chunks = int(name.removeprefix(TEMPORAL_PREFIX))
        return explicit_temporal_attention_function(chunks, heads, width, rotated, rotary_operator=True)
    return None


def _openvino_body(graph: onnx.GraphProto, name: str, nodes: Sequence[onnx.NodeProto]) -> onnx.FunctionProto | None:
    """`_body` for OpenVINO; see `openvino_bodies`."""
    if name in ("GroupNormSilu", "ModulatedGroupNormSilu"):
        frames, groups = _same(name, [_attribute(node, "grouped")[1:3] for node in nodes])
        return openvino_group_norm_silu(name, frames, groups)
    if name in ("Warp", "WarpBlend"):
        return next(body for body in openvino_warp_functions() if body.name == name)
    if name.startswith(TEMPORAL_PREFIX):
        heads, width = _same(name, [_heads(graph, node) for node in nodes])
        rotated = _same(name, [_attribute(node, "rotary_width") for node in nodes])
        return openvino_temporal_attention(name, heads, width, rotated)
    return None


def _heads(graph: onnx.GraphProto, node: onnx.NodeProto) -> tuple[int, int]:
    """Number of heads of an attention node and their width, which the weights of its queries tell."""
    heads = _attribute(node, "heads")
    for tensor in graph.initializer:
        if tensor.name == node.input[_QUERY]:
            return heads, tensor.dims[1] // heads
    raise ExportError(
        f"the weights {node.input[_QUERY]!r} of {node.op_type} are no constant of the graph; export again"
    )


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    for attribute in node.attribute:
        if attribute.name == name:
            return onnx.helper.get_attribute_value(attribute)
    raise ExportError(f"a node of {node.op_type} has no attribute {name!r}; export again")


def _same(operator: str, found: Sequence[_T]) -> _T:
    """What all nodes that share a body have in common."""
    if not found or any(value != found[0] for value in found):
        raise ExportError(
            f"nodes of {operator} have {found} of what their body is made for, expected one; export again"
        )
    return found[0]


def _for_openvino(model: onnx.ModelProto) -> onnx.ModelProto:
    inlined = onnx.inliner.inline_local_functions(model)
    del inlined.opset_import[:]
    inlined.opset_import.append(onnx.helper.make_opsetid("", OPENVINO_OPSET))
    unsigned_after_concat(inlined.graph)
    return inlined
