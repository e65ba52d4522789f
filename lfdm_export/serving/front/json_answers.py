"""Triton's gRPC messages as the JSON of its HTTP API."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lfdm_export.client.wire import byte_elements
from lfdm_export.serving.front.checks import plain_parameter
from lfdm_export.serving.front.json_requests import HttpRequest
from lfdm_export.serving.front.refusal import RefusedError

_NUMPY: Mapping[str, str] = {
    "BOOL": "?", "UINT8": "u1", "INT32": "<i4", "INT64": "<i8", "FP32": "<f4",
}  # fmt: skip
#: Numbers converted to text at a time; other threads run in between.
_PIECE = 1 << 14


def infer_answer(response: Any, request: HttpRequest) -> tuple[list[bytes], int | None]:
    """The body of the answer to an inference request.

    Args:
        response: Triton's `ModelInferResponse`.
        request: the request, which says which outputs are binary.

    Returns:
        The body in pieces, and the number of bytes of its JSON if binary contents follow it.

    Raises:
        RefusedError: the model's output cannot be written as JSON.
    """
    head: dict[str, Any] = {} if not response.id else {"id": response.id}
    head |= {"model_name": response.model_name, "model_version": response.model_version}
    parameters = {name: plain_parameter(value) for name, value in response.parameters.items()}
    if parameters:
        head["parameters"] = parameters
    text: list[bytes] = [json.dumps(head, separators=(",", ":"))[:-1].encode(), b',"outputs":[']
    binary: list[bytes] = []
    for index, (output, content) in enumerate(zip(response.outputs, response.raw_output_contents, strict=True)):
        entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": list(output.shape)}
        if request.binary.get(output.name, request.all_binary):
            entry["parameters"] = {"binary_data_size": len(content)}
            binary.append(content)
        described = json.dumps(entry, separators=(",", ":")).encode()
        text.append((b"," if index else b"") + described)
        if "parameters" not in entry:
            text[-1] = text[-1][:-1] + b',"data":['
            text += _values(output.name, output.datatype, content)
            text.append(b"]}")
    text.append(b"]}")
    return [*text, *binary], sum(map(len, text)) if binary else None


def _values(name: str, datatype: str, content: bytes) -> Iterator[bytes]:
    """Elements as JSON, separated by commas."""
    if datatype == "BYTES":
        elements = byte_elements(content)
        try:
            yield ",".join(json.dumps(element.decode()) for element in (() if elements is None else elements)).encode()
        except UnicodeDecodeError:
            raise RefusedError(
                "INVALID_ARGUMENT", f"the output {name} is not text in UTF-8; request it as binary data"
            ) from None
        return
    array = np.frombuffer(content, _NUMPY[datatype])
    for start in range(0, array.size, _PIECE):
        piece = json.dumps(array[start : start + _PIECE].tolist(), separators=(",", ":"))[1:-1]
        yield ("," if start else "").encode() + piece.encode()


def plain(message: Any) -> dict[str, Any]:
    """A message as a plain object, as Triton's HTTP API shows it: every field, numbers as numbers, enums by name."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            entry = field.message_type.fields_by_name["value"]
            found[field.name] = {str(key): _plain_value(entry, one) for key, one in value.items()}
        elif _repeated(field):
            found[field.name] = [_plain_value(field, one) for one in value]
        elif not field.has_presence or message.HasField(field.name):
            found[field.name] = _plain_value(field, value)
    return found


def _repeated(field: Any) -> bool:
    """Whether a field is a list; the attribute depends on protobuf's version."""
    return bool(field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)


def _plain_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return plain(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
