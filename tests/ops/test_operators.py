"""Operators of domain `lfdm`: declared once, found everywhere; what needs none of torch gets by without it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lfdm_export.errors import ExportError
from lfdm_export.graphs import trace
from lfdm_export.graphs.bodies import with_bodies
from lfdm_export.ops import operators
from lfdm_export.ops.domain import DOMAIN, OPSET, VERSION
from lfdm_export.ops.operator import Nodes, Operator


def body(operation: str) -> onnx.FunctionProto:
    return onnx.parser.parse_function(
        f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]> Double <times> (x) => (y) {{ y = {operation} (x, x) }}'
    )


def double(nodes: Nodes) -> onnx.FunctionProto:
    assert nodes.same(lambda node: node.attribute("times")) == 2
    return body("Add")


def graph_with(op_type: str, *times: int) -> onnx.ModelProto:
    nodes = "\n".join(f"y{i} = lfdm.{op_type} <times = {n}> (x)" for i, n in enumerate(times))
    outputs = ", ".join(f"float[2] y{i}" for i in range(len(times)))
    return onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {OPSET}, "{DOMAIN}" : {VERSION}]>\n'
        f"agraph (float[2] x) => ({outputs}) {{ {nodes} }}"
    )


def with_stored_bodies(model: onnx.ModelProto) -> onnx.ModelProto:
    traced = ir.from_proto(model)
    trace._add_functions(traced)
    return ir.to_proto(traced)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Operator:
    """An operator is its folder and a line of the list; here the line alone."""
    toy = Operator("Double", body=double, tensorrt=lambda _: body("Sub"))
    monkeypatch.setattr(operators, "OPERATORS", (*operators.OPERATORS, toy))
    return toy


def test_a_listed_operator_gets_its_bodies(toy: Operator):
    stored = with_stored_bodies(graph_with("Double", 2))
    x = np.array([1, 3], np.float32)
    found = {}
    for target in ("stored", "openvino", "tensorrt"):
        model = with_bodies(stored, target)
        session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        found[target] = session.run(None, {"x": x})[0].tolist()
    assert found == {"stored": [2, 6], "openvino": [2, 6], "tensorrt": [0, 0]}


def test_an_operator_that_is_not_listed_is_an_error():
    with pytest.raises(ExportError, match=r"domain 'lfdm' has no operator 'Double', only Warp, .*; list it in"):
        with_stored_bodies(graph_with("Double", 2))


def test_a_number_belongs_to_a_numbered_operator_only():
    names = {name: operators.find_operator(name).name for name in ("Warp", "TemporalAttentionIn12")}
    assert names == {"Warp": "Warp", "TemporalAttentionIn12": "TemporalAttentionIn"}
    for name in ("Warp2", "TemporalAttentionIn", "TemporalAttentionInto"):
        with pytest.raises(ExportError, match=f"no operator '{name}'"):
            operators.find_operator(name)


def test_nodes_that_share_a_body_must_agree(toy: Operator):
    with pytest.raises(ExportError, match=r"nodes of Double have the values \[2, 3\] where their body needs one value"):
        with_stored_bodies(graph_with("Double", 2, 3))


def test_what_a_body_is_made_for_must_be_there():
    nodes = Nodes("Double", graph_with("Double", 2).graph.node)
    with pytest.raises(ExportError, match="a node of Double has no attribute 'heads'"):
        nodes.same(lambda node: node.attribute("heads"))
    with pytest.raises(ExportError, match="the weights 'x' of Double are not a constant of the graph"):
        nodes.same(lambda node: node.constant(0))


def test_bodies_need_no_torch():
    """OpenVINO's extra brings onnx, not torch."""
    code = (
        "import sys; sys.modules['torch'] = None; import lfdm_export.graphs.bodies;"
        "from lfdm_export.ops.operators import OPERATORS; print(len(OPERATORS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(operators.OPERATORS)
