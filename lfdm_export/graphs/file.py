"""The interface and external files of a stored graph, read from its bytes before any engine loads it.

A graph is untrusted. Its weights may be in external files: in every tensor of every graph, function and attribute in
it, no matter which of them an engine reads. This module finds them all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lfdm_export.errors import EngineError
from lfdm_export.stages import StageSpec, TensorSpec

#: Maximum size of a graph. Large weights are stored beside it; without them, the published model's largest has 0.25 MB.
LARGEST_GRAPH = 64 << 20
_MOST_MESSAGES = 1_000_000
_DEEPEST = 32
#: A stage's dtypes in a graph, as ONNX Runtime names them.
TYPES: Mapping[str, str] = {"float32": "tensor(float)", "int64": "tensor(int64)"}
#: Of `onnx.TensorProto.DataType`.
_TYPE_NAMES = {1: TYPES["float32"], 7: TYPES["int64"], 10: "tensor(float16)", 11: "tensor(double)"}
_EXTERNAL = 1

#: Fields that hold messages, by kind of message. Source: onnx.proto of ONNX 1.18 to 1.23.
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 11: "input", 12: "output", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}


@dataclass(frozen=True)
class ExternalData:
    """The location of a tensor's data, as stored in the graph."""

    location: str
    offset: str = "0"
    length: str = ""


@dataclass(frozen=True)
class Value:
    """An input or output of a graph or engine; sizes are names where dynamic, "" or -1 where unspecified."""

    name: str
    type: str
    shape: tuple[int | str, ...]


@dataclass
class GraphFile:
    """The content of a graph file.

    Attributes:
        inputs, outputs: of the graph itself.
        external: locations of all tensors with external data.
        operators: names of all operators in it, those in functions included.
    """

    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    external: list[ExternalData] = field(default_factory=list)
    operators: set[str] = field(default_factory=set)


def read_graph(path: Path) -> GraphFile:
    """Read a graph's file.

    Raises:
        EngineError: the file cannot be read, or is not an ONNX graph of a stage's size.
    """
    if not path.is_file():
        raise EngineError(f"there is no graph at {path}; export again")
    try:
        with path.open("rb") as file:
            data = file.read(LARGEST_GRAPH + 1)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > LARGEST_GRAPH:
        raise EngineError(f"{path} is larger than {LARGEST_GRAPH} bytes, more than any stage's graph; export again")
    try:
        return walk(data)
    except (ValueError, IndexError, UnicodeDecodeError) as error:
        raise EngineError(f"cannot load {path}: it is not an ONNX graph ({error}); export again") from error


def check_interface(path: Path, spec: StageSpec) -> GraphFile:
    """Compare a graph's inputs and outputs with those of the expected stage.

    Raises:
        EngineError: the file is another stage, or no graph.
    """
    graph = read_graph(path)
    if not graph.inputs and not graph.outputs:
        raise EngineError(f"cannot load {path}: it holds no graph; export again")
    compare_interface(path, spec, graph.inputs, graph.outputs)
    return graph


def compare_interface(path: Path, spec: StageSpec, inputs: Sequence[Value], outputs: Sequence[Value]) -> None:
    """Compare what a file takes and gives, in order, with the stage that it is meant to be.

    Raises:
        EngineError: it is another stage.
    """
    for kind, tensors, values in (("inputs", spec.inputs, inputs), ("outputs", spec.outputs, outputs)):
        names, expected = [value.name for value in values], [tensor.name for tensor in tensors]
        if names != expected:
            raise EngineError(
                f"{path} is not the stage {spec.name!r}: its {kind} are {', '.join(names)}, "
                f"expected {', '.join(expected)}"
            )
        for tensor, value in zip(tensors, values, strict=True):
            _check_value(path, spec, tensor, value)


def check_graph(path: Path, spec: StageSpec) -> GraphFile:
    """Run `check_interface`, and check that the graph reads only complete files beside it.

    Raises:
        EngineError: the file is another stage or no graph, or reads other files.
    """
    graph = check_interface(path, spec)
    sizes = {}
    for name in {data.location for data in graph.external}:
        beside = path.parent / name
        if Path(name).name == name and "\\" not in name and beside.is_file():
            sizes[name] = beside.stat().st_size
    check_external(graph, path, sizes)
    return graph


def check_external(graph: GraphFile, path: Path, sizes: Mapping[str, int]) -> None:
    """Check that every external file of a graph is known.

    Args:
        graph: from `read_graph`.
        path: its file, for messages.
        sizes: bytes of each file that it may read, by the name in the graph.

    Raises:
        EngineError: a tensor's data is in another file, or beyond the end of its file; or the graph contains an
            engine.
    """
    if "EPContext" in graph.operators:
        raise EngineError(f"{path} holds an engine of another program (EPContext) that would be loaded; export again")
    for data in graph.external:
        if data.location not in sizes:
            raise EngineError(
                f"cannot load {path}: its weights are in {data.location[:80]!r}, which is not a file beside it that "
                "the manifest lists; export again"
            )
        offset, length = (_number(text) for text in (data.offset, data.length or "0"))
        if offset is None or length is None or offset + length > sizes[data.location]:
            raise EngineError(
                f"cannot load {path}: {data.location} is too short for what it reads of it (offset "
                f"{data.offset[:24]}, length {data.length[:24]}); export again"
            )


def _number(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def _check_value(path: Path, spec: StageSpec, tensor: TensorSpec, found: Value) -> None:
    where = f"{path} is not the stage {spec.name!r}: {tensor.name}"
    if found.type != TYPES[tensor.dtype]:
        raise EngineError(f"{where} is a {found.type}, expected {TYPES[tensor.dtype]}")
    # A dynamic axis must be dynamic in the graph; a fixed one may be unspecified (as for many outputs).
    if len(found.shape) != len(tensor.shape) or not all(
        isinstance(size, str) or size in (-1, axis) for size, axis in zip(found.shape, tensor.shape, strict=True)
    ):
        raise EngineError(f"{where} has shape {found.shape}, expected {tensor.shape}")


def walk(model: bytes) -> GraphFile:
    """The content of a serialized model.

    Raises:
        ValueError, IndexError: the bytes are not a model.
    """
    # Without recursion: untrusted graphs can be nested deeply.
    found = GraphFile()
    waiting: list[tuple[str, memoryview, int]] = [("model", memoryview(model), 0)]
    seen = 0
    while waiting:
        kind, message, depth = waiting.pop()
        seen += 1
        if seen > _MOST_MESSAGES or depth > _DEEPEST:
            raise ValueError(f"more than {_MOST_MESSAGES} messages, or nested deeper than {_DEEPEST}")
        inner = _MESSAGES.get(kind, {})
        tensor: list[tuple[int, memoryview | int]] = []
        for number, value in _fields(message):
            if number in inner:
                child = inner[number]
                if not isinstance(value, memoryview):
                    raise ValueError("a message is a number")
                if child in ("input", "output"):
                    if depth == 1:  # of the model's own graph
                        (found.inputs if child == "input" else found.outputs).append(_value(value))
                else:
                    waiting.append((child, value, depth + 1))
            elif kind == "tensor" and number in (13, 14):
                tensor.append((number, value))
            elif kind == "node" and number == 4 and isinstance(value, memoryview):
                found.operators.add(_text(value))
        external = _external(tensor)
        if external is not None:
            found.external.append(external)
    return found


def _external(fields: list[tuple[int, memoryview | int]]) -> ExternalData | None:
    entries = {}
    for number, value in fields:
        if number == 13 and isinstance(value, memoryview):
            entry = {key: _text(text) for key, text in _fields(value) if isinstance(text, memoryview)}
            entries[entry.get(1, "")] = entry.get(2, "")
    if not entries and not any(number == 14 and value == _EXTERNAL for number, value in fields):
        return None
    return ExternalData(entries.get("location", ""), entries.get("offset", "0"), entries.get("length", ""))


def _value(message: memoryview) -> Value:
    """Parse a tensor's ValueInfoProto."""
    fields = dict(_fields(message))
    tensor = dict(_fields(_message(dict(_fields(_message(fields.get(2)))).get(1))))
    shape = []
    for number, dimension in _fields(_message(tensor.get(2))):
        if number == 1:
            size = dict(_fields(_message(dimension)))
            fixed, named = size.get(1), size.get(2)
            shape.append(fixed if isinstance(fixed, int) else _text(named) if isinstance(named, memoryview) else "")
    kind = tensor.get(1)
    element = kind if isinstance(kind, int) else 0
    type_name = _TYPE_NAMES.get(element, f"tensor of ONNX's type {element}")
    return Value(_text(_message(fields.get(1))), type_name, tuple(shape))


def _message(value: memoryview | int | None) -> memoryview:
    return value if isinstance(value, memoryview) else memoryview(b"")


def _text(value: memoryview) -> str:
    return bytes(value).decode("utf-8")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """The fields of a message in protobuf's wire format: number, and bytes or integer.

    Raises:
        ValueError: the data ends within a field, or a field has an obsolete type.
        IndexError: the data ends within a number.
    """
    position, end = 0, len(data)
    while position < end:
        tag, position = _varint(data, position)
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire == 2:
            size, position = _varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"a field of wire type {wire}")
        if position + size > end:
            raise ValueError("it is cut off")
        if wire == 2:
            yield number, data[position : position + size]
        position += size


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
