"""SpatialAttention as a model-local ONNX function on opset 23's Attention."""

from __future__ import annotations

import onnx
import onnx.parser

from lfdm_export.ops.spatial_attention.reference import EPSILON
from lfdm_export.ops.symbolic import DOMAIN, OPSET


def spatial_attention_function() -> onnx.FunctionProto:
    """SpatialAttention(x, gamma, query, key, value, out), as in `reference`."""
    text = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
SpatialAttention <heads> (x, gamma, query, key, value, out) => (y) {{
    normed = LayerNormalization <axis = -1, epsilon = {EPSILON}> (x, gamma)
    q = MatMul (normed, query)
    k = MatMul (normed, key)
    v = MatMul (normed, value)
    attended = Attention <q_num_heads: int = @heads, kv_num_heads: int = @heads> (q, k, v)
    projected = MatMul (attended, out)
    y = Add (x, projected)
}}
"""
    return onnx.parser.parse_function(text)
