"""A float32 graph -> a strongly typed graph with float16 or bfloat16 weights and activations.

A node is lowered if it multiplies with weights, or takes the output of a lowered node. The groups kept by `policy` stay
float32, and so do nodes that depend on inputs only. One cast per value connects the two types; the stage's inputs and
outputs keep the types of its `StageSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfdm_export.errors import ExportError
from lfdm_export.graphs.policy import GROUPS, KEPT, module_of, node_name
from lfdm_export.ops.domain import DOMAIN
from lfdm_export.ops.operator import Nodes
from lfdm_export.ops.operators import find_operator

LowPrecision = Literal["fp16", "bf16"]
TYPES: dict[LowPrecision, ir.DataType] = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
_NUMPY_TYPES: dict[LowPrecision, type] = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
_FLOAT32 = ir.DataType.FLOAT
_FLOATS = (_FLOAT32, *TYPES.values())

# Operators that multiply with weights. A MatMul or Gather without weights follows its inputs.
_WEIGHTED = frozenset(("Conv", "ConvTranspose", "Gemm", "MatMul", "Gather"))
#: Operators that only move values: a cast may be on either side of them.
MOVING = frozenset(("Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Expand", "Tile", "Identity", "Split"))
# Positions of inputs whose type differs from the first input's; each operator of this project defines its own.
_FLOAT32_INPUTS: dict[str, tuple[int, ...]] = {"Resize": (1, 2)}


def lower(
    model: ir.Model,
    precision: LowPrecision,
    *,
    kept: Collection[str] = KEPT,
    keep_node: Callable[[ir.Node], bool] | None = None,
) -> ir.Model:
    """Convert a stage's graph to a lower precision.

    Args:
        model: float32, as `graphs.trace` makes it; it is not changed.
        precision: precision of weights and activations.
        kept: names of the groups of `policy.GROUPS` that stay float32.
        keep_node: selects further nodes that stay float32.

    Returns:
        A new model with the same inputs and outputs.

    Raises:
        ExportError: a group is unknown, or a weight is outside the precision's range.
    """
    unknown = sorted(set(kept) - set(GROUPS))
    if unknown:
        raise ExportError(f"unknown group of nodes {unknown[0]!r}; expected some of {', '.join(GROUPS)}")
    groups = [GROUPS[name] for name in kept]
    lowered = model.clone()

    def is_kept(node: ir.Node) -> bool:
        return any(group.has(node) for group in groups) or (keep_node is not None and keep_node(node))

    _write_out_norms(lowered.graph)
    low = _low_nodes(lowered.graph, is_kept)
    _leave_moves(lowered.graph, low)
    _Lowering(lowered.graph, precision, low).run()
    for key in [key for key in lowered.functions if key[0] == DOMAIN]:
        body = find_operator(key[1]).rounded
        if body is not None:
            nodes = [ir.to_proto(node) for node in lowered.graph if (node.domain, node.op_type) == key[:2]]
            lowered.functions[key] = ir.serde.deserialize_function(body(Nodes(key[1], nodes)))
    return lowered


def _write_out_norms(graph: ir.Graph) -> None:
    """Write batch norms as a product and a sum: rounded, their statistics could overflow, and their types mix."""
    for node in [node for node in graph if node.op_type == "BatchNormalization"]:
        x, *constants = node.inputs
        scale, bias, mean, variance = (
            value.const_value.numpy().astype(np.float64)
            for value in constants
            if value is not None and value.const_value is not None
        )
        factor = scale / np.sqrt(variance + node.attributes["epsilon"].as_float())
        old = node.outputs[0]
        product = ir.Node("", "Mul", [x, _constant(graph, f"{old.name}_factor", factor)])
        total = ir.Node("", "Add", [product.outputs[0], _constant(graph, f"{old.name}_offset", bias - mean * factor)])
        for new, name in ((product, f"{old.name}_scaled"), (total, old.name)):
            new.name = node_name(module_of(node), name or "")
            new.outputs[0].name, new.outputs[0].shape, new.outputs[0].type = name, old.shape, old.type
        ir.convenience.replace_nodes_and_values(graph, node, [node], [product, total], [old], total.outputs)


def _constant(graph: ir.Graph, name: str, values: NDArray[np.float64]) -> ir.Value:
    """A float32 initializer (C, 1, 1) of values (C,)."""
    tensor = ir.Tensor(values.astype(np.float32).reshape(-1, 1, 1), name=name)
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(_FLOAT32), const_value=tensor)
    graph.initializers[name] = value
    return value


def _low_nodes(graph: ir.Graph, is_kept: Callable[[ir.Node], bool]) -> set[ir.Node]:
    """The nodes that compute in the lower precision, by the rule in this module's docstring."""
    low: set[ir.Node] = set()
    for node in graph:
        if node.op_type == "Cast" or is_kept(node):
            continue
        inputs = [value for _, value, is_typed in _float_inputs(node) if is_typed]
        own = find_operator(node.op_type) if node.domain == DOMAIN else None
        multiplies = node.op_type in _WEIGHTED if own is None else own.has_weights
        weighted = multiplies and any(value.const_value is not None for value in inputs)
        samples = own is not None and own.samples
        if weighted or samples or any(value.producer() in low for value in inputs):
            low.add(node)
    return low


def _leave_moves(graph: ir.Graph, low: set[ir.Node]) -> None:
    """Remove nodes that only move values from `low` where that saves casts.

    If several such nodes share their input and lead to float32 only, one cast before them is enough.
    """
    for node in reversed(graph):
        for value in node.outputs:
            users = [use.node for use in value.uses()]
            if len(users) > 1 and node in low and not value.is_graph_output():
                branches = [list(_moves_to_float32(user, low)) for user in users]
                if all(branches):
                    low.difference_update(mover for branch in branches for mover in branch)


def _moves_to_float32(node: ir.Node, low: set[ir.Node]) -> Iterator[ir.Node]:
    """The moving nodes from `node` up to float32 nodes; none if `node` leads elsewhere."""
    chain = []
    while node in low:
        users = [use.node for use in node.outputs[0].uses()]
        if node.op_type not in MOVING or len(node.outputs) > 1 or len(users) > 1:
            return
        chain.append(node)
        if not users:
            break
        node = users[0]
    yield from chain


def _float_inputs(node: ir.Node) -> Iterator[tuple[int, ir.Value, bool]]:
    """Floating inputs by position, and whether each has the node's own type; otherwise it is float32."""
    own = find_operator(node.op_type) if node.domain == DOMAIN else None
    fixed = _FLOAT32_INPUTS.get(node.op_type, ()) if own is None else own.float32_inputs
    for index, value in enumerate(node.inputs):
        if value is not None and value.dtype in _FLOATS:
            yield index, value, index not in fixed


class _Lowering:
    """Lowers one graph in place."""

    def __init__(self, graph: ir.Graph, precision: LowPrecision, low: set[ir.Node]) -> None:
        self.graph, self.precision, self.low = graph, precision, low
        self.casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        """Set the types of values, lower the weights, and cast between the types."""
        wanted = TYPES[self.precision]
        nodes = list(self.graph)
        for value in (value for node in nodes if node in self.low for value in node.outputs):
            if value.dtype == _FLOAT32:
                value.type = ir.TensorType(wanted)  # a clone shares its types with the original
        for node in nodes:
            own = wanted if node in self.low else _FLOAT32
            for index, value, is_typed in _float_inputs(node):
                node.replace_input_with(index, self._as(value, own if is_typed else _FLOAT32))
        for index, value in enumerate(self.graph.outputs):
            if value.dtype == wanted:
                name = value.name
                value.name = f"{name}_low"
                self.graph.outputs[index] = self._as(value, _FLOAT32)
                self.graph.outputs[index].name = name
        for name in [name for name, value in self.graph.initializers.items() if not value.uses()]:
            del self.graph.initializers[name]

    def _as(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in that type; each cast is made once."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self.casts:
            self.casts[value, dtype] = (
                self._weight(value) if value.const_value is not None else self._cast(value, dtype)
            )
        return self.casts[value, dtype]

    def _weight(self, value: ir.Value) -> ir.Value:
        """The lowered copy of a float32 initializer."""
        assert value.const_value is not None
        exact = value.const_value.numpy()
        with np.errstate(over="ignore"):  # checked below
            rounded: NDArray[Any] = exact.astype(_NUMPY_TYPES[self.precision])
        if not np.isfinite(rounded.astype(np.float32)).all():
            largest = float(np.abs(exact).max())
            raise ExportError(
                f"the weight {value.name} has values up to {largest:.3g}, which {self.precision} cannot hold; "
                "export in another precision"
            )
        name = f"{value.name}_{self.precision}"
        copy = ir.Value(name=name, shape=value.shape, type=ir.TensorType(TYPES[self.precision]))
        copy.const_value = ir.Tensor(rounded, dtype=TYPES[self.precision], name=name)
        self.graph.initializers[name] = copy
        return copy

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}_{dtype.name.lower()}"
        cast = ir.Node("", "Cast", [value], [ir.AttrInt64("to", dtype)], name=node_name("", name))
        out = cast.outputs[0]
        out.name, out.shape, out.type = name, value.shape, ir.TensorType(dtype)
        producer = value.producer()
        if producer is None:
            self.graph.insert_before(self.graph[0], cast)
        else:
            self.graph.insert_after(producer, cast)
        return out
