"""What the toolkit knows of one operator of domain `lfdm`: which body suits which target, which inputs are typed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx

from lfdm_export.errors import ExportError

_T = TypeVar("_T")


@dataclass(frozen=True)
class Node:
    """A node, as far as a body may depend on it.

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
        """Shape of the constant that the node takes as that input.

        Raises:
            ExportError: the input is no constant.
        """
        name = self.proto.input[index]
        if name not in self.constants:
            raise ExportError(
                f"the weights {name!r} of {self.proto.op_type} are no constant of the graph; export again"
            )
        return self.constants[name]


@dataclass(frozen=True)
class Nodes:
    """The nodes of a graph that share one body, which is made for what they have in common.

    Attributes:
        name: of their operator, such as "TemporalAttentionIn4".
        nodes: at least one.
        constants: shapes of the graph's constants, by name.
    """

    name: str
    nodes: Sequence[onnx.NodeProto]
    constants: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def same(self, read: Callable[[Node], _T]) -> _T:
        """What `read` finds in every node.

        Raises:
            ExportError: it differs, or `read` finds nothing.
        """
        found = [read(Node(node, self.constants)) for node in self.nodes]
        if any(value != found[0] for value in found):
            raise ExportError(
                f"nodes of {self.name} have {found} of what their body is made for, expected one; export again"
            )
        return found[0]


#: Makes the body of an operator for those nodes.
Body = Callable[[Nodes], onnx.FunctionProto]


@dataclass(frozen=True)
class Operator:
    """One operator; `lfdm_export.ops.operators` lists them all.

    Attributes:
        name: its ONNX name, or what the name begins with if it is `numbered`.
        body: what is stored in a graph: it suits ONNX Runtime on a CPU.
        openvino: the body for OpenVINO; None: the stored one.
        tensorrt: the body for GPUs, that is both TensorRTs and ONNX Runtime's GPU providers; None: the stored one.
        rounded: the body in a graph of lower precision; None: the stored one.
        numbered: a number follows the name, on which the body depends.
        has_weights: multiplies with constants, so that it works in the graph's precision whatever precedes it.
        samples: samples a picture, and so works in the graph's precision too, whatever precedes it.
        float32_inputs: positions of the inputs that stay float32 in a graph of lower precision.
        plugin: the module that registers a TensorRT plugin which can take over; "" if there is none.
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
        """Whether nodes of this operator have that name."""
        if not self.numbered:
            return op_type == self.name
        return op_type.startswith(self.name) and op_type.removeprefix(self.name).isdecimal()
