"""SpatialAttention as a model-local ONNX function: with opset 23's Attention, or written out.

The bodies accept any floating type of `x` and its weights.
"""

from __future__ import annotations

import onnx

from lfdm_export.ops.body import parse_body
from lfdm_export.ops.domain import EPSILON

_SIGNATURE = "SpatialAttention <heads> (x, gamma, query, key, value, out) => (y)"
_TEXT = f"""
    normed = LayerNormalization <axis = -1, epsilon = {EPSILON}> (x, gamma)
    q = MatMul (normed, query)
    k = MatMul (normed, key)
    v = MatMul (normed, value)
    %s
    projected = MatMul (attended, out)
    y = Add (x, projected)
"""
_OPERATOR = "attended = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads> (q, k, v)"
_HEADS = """
    q_heads = Reshape (q, split_heads)
    k_heads = Reshape (k, split_heads)
"""


def spatial_attention_function() -> onnx.FunctionProto:
    """SpatialAttention(x, gamma, query, key, value, out), as in `reference`."""
    return parse_body(_SIGNATURE, _TEXT % _OPERATOR)


def explicit_spatial_attention_function(heads: int, head_width: int) -> onnx.FunctionProto:
    """The same function with attention written out, for H heads of D channels."""
    return parse_body(_SIGNATURE, _TEXT % (head_shapes(heads, head_width) + _HEADS + explicit_attention(head_width)))


def head_shapes(heads: int, head_width: int) -> str:
    """ONNX text of the shapes that split the heads of (N, P, H·D) and join them again."""
    return f"""
    split_heads = Constant <value_ints = [0, 0, {heads}, {head_width}]> ()
    join_heads = Constant <value_ints = [0, 0, {heads * head_width}]> ()
"""


def explicit_attention(head_width: int, *, bias: str = "") -> str:
    """ONNX text of softmax attention: `attended` (N, P, H·D) from `q_heads`, `k_heads` (N, P, H, D), `v` (N, P, H·D).

    The query is scaled before the first product; softmax and the second product follow. TensorRT and OpenVINO recognize
    this pattern and fuse it.

    Args:
        head_width: D.
        bias: name of a tensor (1, H, P, P) to add to the logits; "" for none.
    """
    biased = f"bias_like = CastLike ({bias}, product)\n    logits = Add (product, bias_like)"
    return f"""
    scale_value = Constant <value_float = {head_width**-0.5!r}> ()
    scale = CastLike (scale_value, v)
    v_heads = Reshape (v, split_heads)
    q_first = Transpose <perm = [0, 2, 1, 3]> (q_heads)
    k_last = Transpose <perm = [0, 2, 3, 1]> (k_heads)
    v_first = Transpose <perm = [0, 2, 1, 3]> (v_heads)
    q_scaled = Mul (q_first, scale)
    product = MatMul (q_scaled, k_last)
    {biased if bias else "logits = Identity (product)"}
    weights = Softmax <axis = -1> (logits)
    attended_heads = MatMul (weights, v_first)
    attended_last = Transpose <perm = [0, 2, 1, 3]> (attended_heads)
    attended = Reshape (attended_last, join_heads)
"""
