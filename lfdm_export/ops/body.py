"""Bodies of operators, from ONNX text."""

from __future__ import annotations

import onnx
import onnx.parser

from lfdm_export.ops.domain import DOMAIN, OPSET


def parse_body(signature: str, body: str) -> onnx.FunctionProto:
    """The model-local function of an operator.

    Args:
        signature: name, attributes, inputs and outputs: "Warp (source, motion) => (warped)".
        body: its nodes, as ONNX text.
    """
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>\n{signature} {{\n{body}\n}}\n'
    )
