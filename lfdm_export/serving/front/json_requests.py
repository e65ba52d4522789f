"""Triton's JSON requests, parsed strictly into its gRPC messages.

Source: KServe's Open Inference Protocol, version 2, and Triton's binary tensor data extension.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfdm_export.client.settings import import_protocol
from lfdm_export.client.wire import encode
from lfdm_export.serving.front.checks import (
    Model,
    Tensor,
    check_parameters,
    check_raw,
    check_tensor_parameters,
    find_model,
)
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.refusal import invalid

_NUMPY: Mapping[str, type[np.generic]] = {
    "BOOL": np.bool_, "UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64, "FP32": np.float32,
}  # fmt: skip


@dataclass(frozen=True)
class HttpRequest:
    """A checked inference request.

    Attributes:
        message: Triton's `ModelInferRequest`.
        binary: by output name, whether the output follows the JSON as bytes.
        all_binary: the same for outputs that the request does not name.
    """

    message: Any
    binary: Mapping[str, bool]
    all_binary: bool


def read_request(
    models: Mapping[str, Model], name: str, version: str, body: bytes, head_length: int | None, limits: FrontLimits
) -> HttpRequest:
    """Parse the body of an inference request.

    Args:
        models: models that clients may use.
        name: the model's name, from the path.
        version: the model's version; "" for any.
        body: JSON, then the binary contents.
        head_length: bytes of the JSON; None if the whole body is JSON.
        limits: limits of the front.

    Raises:
        RefusedError: the request is invalid.
    """
    model = find_model(models, name, version)
    if head_length is not None and not 0 <= head_length <= len(body):
        raise invalid(f"the header gives {head_length} bytes of JSON, of a body of {len(body)}; correct the header")
    head = _json_object(body if head_length is None else body[:head_length], limits)
    binary = memoryview(body)[len(body) if head_length is None else head_length :]
    messages, _ = import_protocol()
    message = messages.ModelInferRequest(model_name=name, model_version=version, id=_string(head, "id", ""))
    parameters = _object(head, "parameters")
    for key, value in parameters.items():
        _set_parameter(message, key, value)
    check_parameters(parameters)
    all_binary = _flag(parameters, "binary_data_output")
    inputs, outputs = _objects(head, "inputs", model.inputs), _objects(head, "outputs", model.outputs)
    names = [_string(entry, "name") for entry in inputs], [_string(entry, "name") for entry in outputs]
    model.check_names(*names)
    wanted = {}
    for output, entry in zip(names[1], outputs, strict=True):
        of_output = _object(entry, "parameters")
        check_tensor_parameters(output, of_output)
        wanted[output] = _flag(of_output, "binary_data") if "binary_data" in of_output else all_binary
        message.outputs.add(name=output)
    for entry in inputs:
        declared = model.input(entry["name"])
        shape = _integers(entry, "shape")
        count = declared.elements(_string(entry, "datatype"), shape)
        content, binary = _content(declared, count, entry, binary)
        message.inputs.add(name=declared.name, datatype=declared.datatype, shape=shape)
        message.raw_input_contents.append(content)
    if binary:
        raise invalid(f"{len(binary):,} bytes follow the contents of the inputs; name their sizes in binary_data_size")
    return HttpRequest(message, wanted, all_binary)


def _content(declared: Tensor, count: int, entry: Mapping[str, Any], binary: memoryview) -> tuple[bytes, memoryview]:
    """Content of an input as raw bytes, and the rest of the binary contents."""
    parameters = _object(entry, "parameters")
    check_tensor_parameters(declared.name, parameters)
    if "binary_data_size" not in parameters:
        values = _flat(declared, entry.get("data"), count)
        return _encoded(declared, values), binary
    size = parameters["binary_data_size"]
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= len(binary):
        raise invalid(
            f"binary_data_size of {declared.name} is {size!r:.32}, of {len(binary):,} bytes that are there; correct it"
        )
    if "data" in entry:
        raise invalid(f"{declared.name} has data besides binary data; send one of them")
    content = bytes(binary[:size])
    check_raw(declared, count, content)
    return content, binary[size:]


def _flat(declared: Tensor, data: Any, count: int) -> list[Any]:
    """The values of nested lists, in order."""
    if not isinstance(data, list):
        raise invalid(f"the input {declared.name} has no list of data; send one, or binary data")
    values: list[Any] = []
    waiting = [iter(data)]
    while waiting:
        for value in waiting[-1]:
            if isinstance(value, list):
                if len(waiting) > len(declared.shape):
                    raise invalid(f"the data of {declared.name} is nested deeper than its shape; send one flat list")
                waiting.append(iter(value))
                break
            values.append(value)
        else:
            waiting.pop()
        if len(values) > count:
            break
    if len(values) != count:
        found = f"more than {count}" if len(values) > count else str(len(values))
        raise invalid(f"the input {declared.name} has {found} values, expected {count} for its shape")
    return values


def _encoded(declared: Tensor, values: Sequence[Any]) -> bytes:
    """Values as raw content."""
    if declared.datatype == "BYTES":
        texts = np.empty(len(values), np.object_)
        for index, value in enumerate(values):
            if not isinstance(value, str):
                raise invalid(f"the input {declared.name} has a value that is not a string, expected strings")
            _require_unicode(value, declared.name)
            texts[index] = value.encode()
        content = encode(texts)
        check_raw(declared, len(values), content)
        return content
    dtype = np.dtype(_NUMPY[declared.datatype])
    kinds = {"b": (bool, int), "f": (int, float)}.get(dtype.kind, (int,))
    if not all(type(value) in kinds for value in values):
        raise invalid(f"the input {declared.name} has a value that is not of type {declared.datatype}; correct it")
    if dtype.kind in "iub":
        least, most = (0, 1) if dtype.kind == "b" else (int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))
        if values and not least <= min(values) <= max(values) <= most:
            raise invalid(
                f"the input {declared.name} has a value beyond {declared.datatype}, expected {least} to {most}"
            )
    try:
        with np.errstate(over="ignore"):
            return np.array(values, dtype).astype(dtype.newbyteorder("<")).tobytes()
    except OverflowError:
        raise invalid(f"the input {declared.name} has a value beyond {declared.datatype}; correct it") from None


def _json_object(text: bytes, limits: FrontLimits) -> dict[str, Any]:
    """Parse a JSON object of bounded size and depth."""
    _check_counts(text, limits)
    try:
        found = json.loads(text)
    except RecursionError:
        raise invalid("the JSON is nested too deep; send flat lists") from None
    except (ValueError, MemoryError) as error:
        raise invalid(f"the body is not JSON ({str(error)[:80]}); correct it, or give the JSON's length") from None
    if not isinstance(found, dict):
        raise invalid("the body is not a JSON object, expected one with inputs")
    return found


def _check_counts(text: bytes, limits: FrontLimits) -> None:
    """Refuse a text that takes too much memory or time to parse, by what occurs in it."""
    commas, lists, objects, quotes = map(text.count, (b",", b"[", b"{", b'"'))
    # One of 32 characters of base64 is a letter of exponents, too.
    fractions = len(text) - len(text.translate(None, b".eE")) - len(text) // 28
    for found, most, what in (
        (commas + lists + objects, limits.json_values, "values"),
        (lists, limits.json_lists, "lists"),
        (objects, limits.json_objects, "objects"),
        (quotes // 2, limits.json_strings, "strings"),
        (fractions, limits.json_fractions, "numbers with a point or an exponent"),
    ):
        if found > most:
            raise invalid(f"the JSON has more than {most:,} {what}; send binary data, or a file as image_bytes")


def _string(entry: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = entry.get(key, default)
    if not isinstance(value, str) or len(value) > 256:
        raise invalid(f"{key} is {_shown(value)}, expected a string of at most 256 characters")
    _require_unicode(value, key)
    return value


def _object(entry: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = entry.get(key, {})
    if not isinstance(value, dict) or len(value) > 32:
        raise invalid(f"{key} is {_shown(value)}, expected an object of at most 32 entries")
    return value


def _objects(entry: Mapping[str, Any], key: str, known: Any) -> list[dict[str, Any]]:
    value = entry.get(key, [])
    if not isinstance(value, list) or len(value) > len(known) or not all(isinstance(one, dict) for one in value):
        raise invalid(f"{key} is {_shown(value)}, expected a list of at most {len(known)} objects")
    return value


def _integers(entry: Mapping[str, Any], key: str) -> list[int]:
    value = entry.get(key)
    if not isinstance(value, list) or len(value) > 8 or not all(type(one) is int for one in value):
        raise invalid(f"{key} is {_shown(value)}, expected a list of a few whole numbers")
    if any(abs(one) >= 1 << 63 for one in value):
        raise invalid(f"{key} has a number beyond 64 bits; correct it")
    return value


def _flag(parameters: Mapping[str, Any], key: str) -> bool:
    value = parameters.get(key, False)
    if not isinstance(value, bool):
        raise invalid(f"{key} is {_shown(value)}, expected true or false")
    return value


def _set_parameter(message: Any, key: str, value: Any) -> None:
    _require_unicode(key, key)
    target = message.parameters[key]
    if isinstance(value, bool):
        target.bool_param = value
    elif isinstance(value, int) and abs(value) < 1 << 63:
        target.int64_param = value
    elif isinstance(value, float):
        target.double_param = value
    elif isinstance(value, str):
        _require_unicode(value, "a parameter")
        target.string_param = value
    else:
        raise invalid(f"the parameter {key[:64]!r} is {_shown(value)}, expected a number, a string, true or false")


def _require_unicode(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(f"{what[:64]!a} is not text in Unicode; correct its escapes") from None


def _shown(value: Any) -> str:
    """A value for an error message; of a container only kind and length: it may be large or deep."""
    if isinstance(value, list | dict):
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    return f"{value!r:.64}" if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
