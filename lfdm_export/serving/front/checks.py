"""Checks of a request before it is forwarded: model, tensors, sizes, parameters."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lfdm_export.errors import InputError
from lfdm_export.protocol.contract import (
    CANCEL_INPUT,
    CANCEL_OUTPUT,
    CLIP_MODEL,
    PRIORITY_PARAMETER,
    SAMPLE_MODEL,
    STREAM_MODEL,
)
from lfdm_export.protocol.requests import Limits, most_encoded_bytes, parse_priority
from lfdm_export.serving.front.refusal import RefusedError, invalid

#: Bytes per element, by Triton's name of the type; BYTES elements carry their own length.
ITEM_BYTES: Mapping[str, int] = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "FP32": 4, "FP64": 8, "BF16": 2,
}  # fmt: skip
#: Maximum characters of a request's id.
MOST_ID = 256
# Maps of the published size take at most 4 MB.
_MOST_MAP_BYTES = 64 << 20
#: Maximum parameters of a request or a tensor, and maximum characters of a string parameter.
_MOST_PARAMETERS, _MOST_STRING = 32, 1024
#: Maximum of Triton's own parameter "timeout" in microseconds: a year.
_MOST_TIMEOUT = 366 * 24 * 3600 * 10**6
_FIELDS: Mapping[str, str] = {
    "BOOL": "bool_contents", "UINT8": "uint_contents", "INT32": "int_contents", "INT64": "int64_contents",
    "FP32": "fp32_contents", "BYTES": "bytes_contents",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """An input as a model declares it.

    Attributes:
        name: name of the input.
        datatype: Triton's name of its type.
        shape: sizes of its axes; -1 for an open axis.
        most_bytes: maximum bytes of its content, without the length prefixes of BYTES.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    most_bytes: int

    def elements(self, datatype: str, shape: Sequence[int]) -> int:
        """Check a tensor's type and shape, and count its elements.

        Raises:
            RefusedError: the type or shape is not the declared one, or the tensor would be too large.
        """
        if datatype != self.datatype:
            raise invalid(f"the input {self.name} has the type {datatype[:32]!r}, expected {self.datatype}")
        fits = len(shape) == len(self.shape) and all(
            have == want if want >= 0 else have >= 1 for have, want in zip(shape, self.shape, strict=True)
        )
        if not fits:
            raise invalid(f"the input {self.name} has the shape {_shape(shape)}, expected {_shape(self.shape)}")
        count = math.prod(shape)
        if count * ITEM_BYTES.get(datatype, 1) > self.most_bytes:
            raise self.too_large(count * ITEM_BYTES.get(datatype, 1))
        return count

    def too_large(self, size: int) -> RefusedError:
        """The refusal of a tensor of `size` bytes."""
        hint = "; send a smaller picture, or a JPEG or PNG file as image_bytes" if self.name == "image" else ""
        return invalid(f"{self.name} has {size:,} bytes, expected at most {self.most_bytes:,}{hint}")


@dataclass(frozen=True)
class Model:
    """A model that clients may use.

    Attributes:
        inputs: its inputs by name.
        outputs: names of its outputs.
    """

    inputs: Mapping[str, Tensor]
    outputs: frozenset[str]

    def input(self, name: str) -> Tensor:
        """The input of a name.

        Raises:
            RefusedError: the model has no such input.
        """
        if name not in self.inputs:
            raise invalid(f"found the unknown input {name[:64]!r}, expected some of {', '.join(self.inputs)}")
        return self.inputs[name]

    def check_names(self, inputs: Sequence[str], outputs: Sequence[str]) -> None:
        """Check the names of a request's tensors.

        Raises:
            RefusedError: a name is unknown or given twice, or there are no inputs.
        """
        if not inputs:
            raise invalid(f"the request has no inputs, expected some of {', '.join(self.inputs)}")
        for name in inputs:
            self.input(name)
        for name in outputs:
            if name not in self.outputs:
                known = ", ".join(sorted(self.outputs))
                raise invalid(f"found the unknown output {name[:64]!r}, expected some of {known}")
        for what, names in (("input", inputs), ("output", outputs)):
            if len({*names}) < len(names):
                raise invalid(f"an {what} is given twice; give each once")


def models_of(metadata: Iterable[Any], limits: Limits) -> dict[str, Model]:
    """The models that clients may use, as the server describes them, and the sampler's cancel request.

    Args:
        metadata: Triton's `ModelMetadataResponse` messages of the models that accept requests from clients.
        limits: limits of a request.
    """
    found = {
        one.name: Model(
            {entry.name: _tensor(entry, limits) for entry in one.inputs}, frozenset(entry.name for entry in one.outputs)
        )
        for one in metadata
    }
    cancel = Tensor(CANCEL_INPUT.name, CANCEL_INPUT.datatype, (1,), MOST_ID)
    return found | {SAMPLE_MODEL: Model({cancel.name: cancel}, frozenset((CANCEL_OUTPUT.name,)))}


def _tensor(entry: Any, limits: Limits) -> Tensor:
    shape = tuple(entry.shape)
    if entry.name == "image_bytes":
        most = most_encoded_bytes(limits)
    elif entry.name == "image":
        most = min(3 * limits.image_pixels, limits.image_bytes)
    elif entry.datatype == "BYTES":
        most = limits.text_bytes
    else:
        # A few numbers. An open embedding width is bounded far above that of any text encoder. Maps have only open
        # axes: the model itself checks their sizes.
        open_bytes = ITEM_BYTES[entry.datatype] * math.prod(size if size >= 0 else 1 << 16 for size in shape)
        most = min(open_bytes, _MOST_MAP_BYTES)
    return Tensor(entry.name, entry.datatype, shape, most)


def find_model(models: Mapping[str, Model], name: str, version: str) -> Model:
    """The model that a request names.

    Raises:
        RefusedError: clients may not use the model, or it has no such version.
    """
    if name not in models:
        if name.startswith(CLIP_MODEL):
            raise RefusedError(
                "PERMISSION_DENIED",
                f"the model {name[:64]!r} is a part of {CLIP_MODEL!r} or unknown, and takes no requests from outside; "
                f"send them to {CLIP_MODEL!r} or {STREAM_MODEL!r}",
            )
        raise RefusedError(
            "NOT_FOUND",
            f"Request for unknown model: {name[:64]!r} is not found; known are {CLIP_MODEL}, {STREAM_MODEL}",
        )
    if version not in ("", "1"):
        raise RefusedError("NOT_FOUND", f"{name} has no version {version[:16]!r}, expected 1, or none")
    return models[name]


def check_request(models: Mapping[str, Model], request: Any) -> None:
    """Check a whole `ModelInferRequest`.

    Raises:
        RefusedError: any part of it is invalid.
    """
    model = find_model(models, request.model_name, request.model_version)
    if len(request.id) > MOST_ID:
        raise invalid(f"the request's id has {len(request.id)} characters, expected at most {MOST_ID}")
    check_parameters({name: plain_parameter(value) for name, value in bounded(request.parameters).items()})
    model.check_names([tensor.name for tensor in request.inputs], [tensor.name for tensor in request.outputs])
    for tensor in (*request.inputs, *request.outputs):
        check_tensor_parameters(tensor.name, bounded(tensor.parameters))
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise invalid(f"found {len(raw)} raw contents for {len(request.inputs)} inputs, expected one each")
    for index, tensor in enumerate(request.inputs):
        declared = model.input(tensor.name)
        count = declared.elements(tensor.datatype, tensor.shape)
        if not raw:
            _check_typed(declared, count, tensor.contents)
        elif tensor.HasField("contents"):
            raise invalid(f"the input {tensor.name} has contents besides raw contents; send one of them")
        else:
            check_raw(declared, count, raw[index])


def check_raw(declared: Tensor, count: int, content: bytes) -> None:
    """Compare the raw content of an input with its shape.

    Raises:
        RefusedError: the content does not fit the shape, or is too large.
    """
    if declared.datatype != "BYTES":
        expected = count * ITEM_BYTES[declared.datatype]
        if len(content) != expected:
            raise invalid(f"the input {declared.name} has {len(content):,} bytes, expected {expected:,} for its shape")
        return
    start = found = 0
    while start < len(content) and found <= count:
        if start + 4 > len(content):
            break
        start += 4 + struct.unpack_from("<I", content, start)[0]
        found += 1
    if found != count or start != len(content):
        raise invalid(
            f"the input {declared.name} does not hold {count} string{'s' * (count != 1)}, each behind its length in 4 "
            "bytes; send as many as its shape says"
        )
    _check_size(declared, len(content) - 4 * count)


def _check_typed(declared: Tensor, count: int, contents: Any) -> None:
    """`check_raw` for content in protobuf's typed fields."""
    right = _FIELDS.get(declared.datatype)
    for field, values in contents.ListFields():
        if field.name != right:
            raise invalid(f"the input {declared.name} has {field.name}, expected {right} for {declared.datatype}")
        if len(values) != count:
            raise invalid(f"the input {declared.name} has {len(values)} values, expected {count} for its shape")
        if right == "bytes_contents":
            _check_size(declared, sum(map(len, values)))
    if count and not contents.ListFields():
        raise invalid(f"the input {declared.name} has no content; send {count} values")


def _check_size(declared: Tensor, size: int) -> None:
    if size > declared.most_bytes:
        raise declared.too_large(size)


def bounded(parameters: Mapping[str, Any]) -> Mapping[str, Any]:
    """Check the number of parameters, and return them.

    Raises:
        RefusedError: there are too many.
    """
    if len(parameters) > _MOST_PARAMETERS:
        raise invalid(f"found {len(parameters)} parameters, expected at most {_MOST_PARAMETERS}")
    return parameters


def plain_parameter(value: Any) -> object:
    """Triton's `InferParameter` as a plain value; None if it is empty."""
    kind = value.WhichOneof("parameter_choice")
    found: object = None if kind is None else getattr(value, kind)
    return found


def check_parameters(parameters: Mapping[str, object]) -> None:
    """Check the parameters of a request.

    Raises:
        RefusedError: one is out of range, or belongs to a feature that this server does not offer.
    """
    for name, value in bounded(parameters).items():
        if len(name) > _MOST_STRING or (isinstance(value, str | bytes) and len(value) > _MOST_STRING):
            raise invalid(f"the parameter {name[:64]!r} is longer than {_MOST_STRING} characters; shorten it")
        if name.startswith(("sequence_", "shared_memory_")):
            raise invalid(f"the parameter {name[:64]!r} is not served here; leave it out")
    timeout = parameters.get("timeout", 0)
    if isinstance(timeout, bool) or not isinstance(timeout, int) or not 0 <= timeout <= _MOST_TIMEOUT:
        raise invalid(f"the parameter timeout is {timeout!r}, expected microseconds from 0 to {_MOST_TIMEOUT}")
    try:
        parse_priority({PRIORITY_PARAMETER: parameters.get(PRIORITY_PARAMETER, 0)})
    except InputError as error:
        raise invalid(str(error)) from None


def check_tensor_parameters(name: str, parameters: Mapping[str, Any]) -> None:
    """Check the parameters of a tensor.

    Raises:
        RefusedError: they request shared memory or classification.
    """
    for key in parameters:
        if key.startswith("shared_memory"):
            raise invalid(f"{name[:64]!r} is in shared memory, which this server does not accept; send the content")
        if key == "classification":
            raise invalid(f"{name[:64]!r} cannot be classified; leave the parameter out")


def _shape(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape[:8]))}{',…' if len(shape) > 8 else ''}]"
