"""TemporalAttention as a model-local ONNX function: with opset 23's operators in chunks, or written out.

The bodies accept any floating type of `x` and its weights; tables and bias are cast to it.
"""

from __future__ import annotations

import onnx

from lfdm_export.ops.body import parse_body
from lfdm_export.ops.domain import EPSILON
from lfdm_export.ops.spatial_attention.onnx_function import explicit_attention, head_shapes
from lfdm_export.ops.temporal_attention import operator_name

#: Everything after the operator's name.
INTERFACE = "<heads, rotary_width> (x, gamma, query, key, value, out, cos, sin, bias, position) => (y)"
_ROTARY = "RotaryEmbedding <interleaved = 1, num_heads: int = @heads, rotary_embedding_dim: int = @rotary_width>"

_CHUNK = """
    normed_{i} = LayerNormalization <axis = -1, epsilon = {epsilon}> (x_{i}, gamma)
    q_{i} = MatMul (normed_{i}, query)
    k_{i} = MatMul (normed_{i}, key)
    v_{i} = MatMul (normed_{i}, value)
    pixels_{i} = Shape <start = 0, end = 1> (x_{i})
    positions_shape_{i} = Concat <axis = 0> (pixels_{i}, frames)
    positions_{i} = Expand (position, positions_shape_{i})
    q_turned_{i} = {rotary} (q_{i}, cos_like, sin_like, positions_{i})
    k_turned_{i} = {rotary} (k_{i}, cos_like, sin_like, positions_{i})
    attended_{i} = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads>
        (q_turned_{i}, k_turned_{i}, v_{i}, bias_like)
    projected_{i} = MatMul (attended_{i}, out)
    y_{i} = Add (x_{i}, projected_{i})
"""

_EXPLICIT = """
    normed = LayerNormalization <axis = -1, epsilon = {epsilon}> (x, gamma)
    q = MatMul (normed, query)
    k = MatMul (normed, key)
    v = MatMul (normed, value)
    {heads}
    {rotation}
    {attention}
    projected = MatMul (attended, out)
    y = Add (x, projected)
"""

_TURN_BY_OPERATOR = f"""
    cos_like = CastLike (cos, x)
    sin_like = CastLike (sin, x)
    positions_shape = Shape <start = 0, end = 2> (x)
    positions = Expand (position, positions_shape)
    q_turned = {_ROTARY} (q, cos_like, sin_like, positions)
    k_turned = {_ROTARY} (k, cos_like, sin_like, positions)
    q_heads = Reshape (q_turned, split_heads)
    k_heads = Reshape (k_turned, split_heads)
"""

# Each value of a table applies to both members of its pair: (1, T, 1, R).
_PAIRED_TABLE = """
    {t}_like = CastLike ({t}, x)
    {t}_column = Unsqueeze ({t}_like, last)
    {t}_twice = Concat <axis = -1> ({t}_column, {t}_column)
    {t}_pairs = Reshape ({t}_twice, table_shape)
"""

_TURN = """
    {t}_split = Reshape ({t}, split_heads)
    {take}
    {t}_pairs = Reshape ({t}_turning, pair_shape)
    {t}_even, {t}_odd = Split <axis = -1, num_outputs = 2> ({t}_pairs)
    {t}_minus = Neg ({t}_odd)
    {t}_swapped_pairs = Concat <axis = -1> ({t}_minus, {t}_even)
    {t}_swapped = Reshape ({t}_swapped_pairs, turning_shape)
    {t}_along = Mul ({t}_turning, cos_pairs)
    {t}_across = Mul ({t}_swapped, sin_pairs)
    {t}_turned = Add ({t}_along, {t}_across)
    {give}
"""


def temporal_attention_function(chunks: int) -> onnx.FunctionProto:
    """The function that processes the pixels in `chunks` equal parts, so that one part fits in a core's cache."""
    parts = range(chunks)
    xs, ys = (", ".join(f"{name}_{i}" for i in parts) for name in "xy")
    return parse_body(
        f"{operator_name(chunks)} {INTERFACE}",
        f"""
    frames = Shape <start = 1, end = 2> (x)
    cos_like = CastLike (cos, x)
    sin_like = CastLike (sin, x)
    bias_like = CastLike (bias, x)
    {xs} = {f"Split <axis = 0, num_outputs = {chunks}>" if chunks > 1 else "Identity"} (x)
    {"".join(_CHUNK.format(i=i, epsilon=EPSILON, rotary=_ROTARY) for i in parts)}
    y = Concat <axis = 0> ({ys})
""",
    )


def explicit_temporal_attention_function(
    chunks: int, heads: int, head_width: int, rotary_width: int, *, rotary_operator: bool
) -> onnx.FunctionProto:
    """The function with attention written out, all pixels together.

    Args:
        chunks: number in the operator's name; the body has only one chunk.
        heads: H.
        head_width: D.
        rotary_width: R, rotated channels per head.
        rotary_operator: use opset 23's RotaryEmbedding; False writes out the rotation too.
    """
    body = _EXPLICIT.format(
        epsilon=EPSILON,
        heads=head_shapes(heads, head_width),
        rotation=_TURN_BY_OPERATOR if rotary_operator else _turn_by_hand(heads, head_width, rotary_width),
        attention=explicit_attention(head_width, bias="bias"),
    )
    return parse_body(f"{operator_name(chunks)} {INTERFACE}", body)


def _turn_by_hand(heads: int, head_width: int, rotary_width: int) -> str:
    """ONNX text for `q_heads` and `k_heads` (N, T, H, D): x·cos + swapped(x)·sin on interleaved pairs."""
    text = f"""
    last = Constant <value_ints = [-1]> ()
    table_shape = Constant <value_ints = [1, -1, 1, {rotary_width}]> ()
    pair_shape = Constant <value_ints = [0, 0, {heads}, {rotary_width // 2}, 2]> ()
    turning_shape = Constant <value_ints = [0, 0, {heads}, {rotary_width}]> ()
    parts = Constant <value_ints = [{rotary_width}, {head_width - rotary_width}]> ()
"""
    text += "".join(_PAIRED_TABLE.format(t=table) for table in ("cos", "sin"))
    for t in "qk":
        if rotary_width == head_width:
            take, give = f"{t}_turning = Identity ({t}_split)", f"{t}_heads = Identity ({t}_turned)"
        else:
            take = f"{t}_turning, {t}_rest = Split <axis = -1> ({t}_split, parts)"
            give = f"{t}_heads = Concat <axis = -1> ({t}_turned, {t}_rest)"
        text += _TURN.format(t=t, take=take, give=give)
    return text
