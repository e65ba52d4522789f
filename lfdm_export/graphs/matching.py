"""Patterns of onnxscript's optimizer, matched where they can begin."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import pattern

# Only one thread may replace a method and put it back.
_LOCK = threading.Lock()


@contextlib.contextmanager
def quick_matching() -> Iterator[None]:
    """Skip nodes at which a pattern of several outputs cannot begin; the optimized graph is the same.

    For such a pattern, onnxscript (0.7) lists all nodes of the graph at every node before it compares any operator:
    this took two fifths of an export of the small model.
    """
    matcher: Any = pattern.SimplePatternMatcher
    with _LOCK:
        real = matcher.match

        def match(self: Any, model: ir.Model, graph: ir.Graph | ir.Function, node: ir.Node, **options: Any) -> Any:
            nodes: Any = getattr(self.pattern, "output_nodes", ())
            if len(nodes) > 1 and nodes[0].op_identifier() not in (None, node.op_identifier()):
                return pattern.MatchResult().fail("another operator")
            return real(self, model, graph, node, **options)

        matcher.match = match
        try:
            yield
        finally:
            matcher.match = real
