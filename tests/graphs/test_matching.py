"""Quick matching of patterns: the optimizer's result, without its search at every node."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import onnxscript.optimizer
import pytest
from onnxscript.rewriter.pattern import SimplePatternMatcher

from lfdm_export.graphs.matching import quick_matching

#: Halves that can be one Split: onnxscript finds those of x or of z, whichever of the pattern's outputs is its first.
HALVES = """
<ir_version: 10, opset_import: ["" : 20]>
halves (float[2, 8] x, float[2, 8] z) => (float[2, 4] y)
<int64[1] zero = {0}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] axis = {1}> {
    left = Slice (x, zero, four, axis)
    right = Slice (x, four, eight, axis)
    last = Slice (z, four, eight, axis)
    first = Slice (z, zero, four, axis)
    one = Add (left, right)
    other = Mul (first, last)
    y = Sub (one, other)
}
"""


def optimized() -> onnx.ModelProto:
    model = ir.from_proto(onnx.parser.parse_model(HALVES))
    onnxscript.optimizer.optimize_ir(model)
    return ir.to_proto(model)


def test_the_graph_is_the_same_and_only_slices_are_searched_at(monkeypatch: pytest.MonkeyPatch) -> None:
    real = SimplePatternMatcher.match
    searched: list[str] = []

    def noting(matcher: Any, model: Any, graph: Any, node: ir.Node, **options: Any) -> Any:
        if len(matcher.pattern.output_nodes) > 1:
            searched.append(node.op_type)
        return real(matcher, model, graph, node, **options)

    monkeypatch.setattr(SimplePatternMatcher, "match", noting)
    expected = optimized()
    assert "Split" in [node.op_type for node in expected.graph.node]
    assert {"Add", "Slice"} <= set(searched)
    searched.clear()
    with quick_matching():
        assert optimized() == expected
    assert set(searched) == {"Slice"}
    assert vars(SimplePatternMatcher)["match"] is noting, "it is put back"
