"""The description of one operator of domain `lfdm`: its body per target, and its typed inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx

from lfdm_export.errors import ExportError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Node:
    """The parts of a node that a body may depend on.

    Attributes:
        proto: the node.
        constants: shapes of the graph's constants, by name.
    """

    proto: onnx.NodeProto
    constants: Mapping[str, tuple[int, ...]]

    def attribute(self, name: str) -> Any:
        """The value of an attribute.

        Raises:
            ExportError: the node lacks it.
        """
        for attribute in self.proto.attribute:
            if attribute.name == name:
                return onnx.helper.get_attribute_value(attribute)
        raise ExportError(f"a node of {self.proto.op_type} has no attribute {name!r}; export again")

    def constant(self, index: int) -> tuple[int, ...]:
        """Shape of the constant at that input of the node.

        Raises:
            ExportError: the input is not a constant.
        """
        name = self.proto.input[index]
        if name not in self.constants:
            raise ExportError(
                f"the weights {name!r} of {self.proto.op_type} are not a constant of the graph; export again"
            )
        return self.constants[name]


@dataclass(frozen=True)
class Nodes:
    """The nodes of a graph that share one body; the body depends on what they have in common.

    Attributes:
        name: operator of the nodes, such as "TemporalAttentionIn4".
        nodes: at least one.
        constants: shapes of the graph's constants, by name.
    """

    name: str
    nodes: Sequence[onnx.NodeProto]
    constants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def same(self, read: Callable[[Node], _T]) -> _T:
        """The result of `read`, if it is the same for every node.

        Raises:
            ExportError: the results differ, or `read` fails.
        """
        found = [read(Node(node, self.constants)) for node in self.nodes]
        if any(value != found[0] for value in found):
            raise ExportError(
                f"nodes of {self.name} have the values {found} where their body needs one value; export again"
            )
        return found[0]


#: Makes the body of an operator for the given nodes.
Body = Callable[[Nodes], onnx.FunctionProto]


@dataclass(frozen=True)
class Operator:
    """One operator; `lfdm_export.ops.operators` lists them all.

    Attributes:
        name: its ONNX name; the beginning of the name if it is `numbered`.
        body: the body stored in a graph; made for ONNX Runtime on a CPU.
        openvino: the body for OpenVINO; None for the stored one.
        tensorrt: the body for GPUs (both TensorRTs and ONNX Runtime's GPU providers); None for the stored one.
        rounded: the body in a graph of lower precision; None for the stored one.
        numbered: the name ends with a number, on which the body depends.
        has_weights: multiplies with constants, so it always computes in the graph's precision.
        samples: samples a picture, so it always computes in the graph's precision too.
        float32_inputs: positions of the inputs that stay float32 in a graph of lower precision.
        plugin: module that registers the operator's TensorRT plugin; "" without one.
    """

    name: str
    body: Body
    openvino: Body | None = None
    tensorrt: Body | None = None
    rounded: Body | None = None
    numbered: bool = False
    has_weights: bool = False
    samples: bool = False
    float32_inputs: tuple[int, ...] = ()
    plugin: str = ""

    def is_called(self, op_type: str) -> bool:
        """Whether nodes with this name belong to the operator."""
        if not self.numbered:
            return op_type == self.name
        return op_type.startswith(self.name) and op_type.removeprefix(self.name).isdecimal()
