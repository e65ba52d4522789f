"""TemporalAttention as a model-local ONNX function on opset 23's RotaryEmbedding and Attention."""

from __future__ import annotations

import onnx
import onnx.parser

from lfdm_export.ops.symbolic import DOMAIN, OPSET
from lfdm_export.ops.temporal_attention.reference import EPSILON, operator_name

_CHUNK = """
    normed_{i} = LayerNormalization <axis = -1, epsilon = {epsilon}> (x_{i}, gamma)
    q_{i} = MatMul (normed_{i}, query)
    k_{i} = MatMul (normed_{i}, key)
    v_{i} = MatMul (normed_{i}, value)
    pixels_{i} = Shape <start = 0, end = 1> (x_{i})
    positions_shape_{i} = Concat <axis = 0> (pixels_{i}, frames)
    positions_{i} = Expand (position, positions_shape_{i})
    q_turned_{i} = RotaryEmbedding <interleaved = 1, num_heads: int = @heads, rotary_embedding_dim: int = @rotary_width>
        (q_{i}, cos, sin, positions_{i})
    k_turned_{i} = RotaryEmbedding <interleaved = 1, num_heads: int = @heads, rotary_embedding_dim: int = @rotary_width>
        (k_{i}, cos, sin, positions_{i})
    attended_{i} = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads>
        (q_turned_{i}, k_turned_{i}, v_{i}, bias)
    projected_{i} = MatMul (attended_{i}, out)
    y_{i} = Add (x_{i}, projected_{i})
"""


def temporal_attention_function(chunks: int) -> onnx.FunctionProto:
    """The function that works in `chunks` equal parts of the pixels."""
    parts = range(chunks)
    xs, ys = (", ".join(f"{name}_{i}" for i in parts) for name in "xy")
    text = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{operator_name(chunks)} <heads, rotary_width> (x, gamma, query, key, value, out, cos, sin, bias, position) => (y) {{
    frames = Shape <start = 1, end = 2> (x)
    {xs} = {f"Split <axis = 0, num_outputs = {chunks}>" if chunks > 1 else "Identity"} (x)
    {"".join(_CHUNK.format(i=i, epsilon=EPSILON) for i in parts)}
    y = Concat <axis = 0> ({ys})
}}
"""
    return onnx.parser.parse_function(text)
