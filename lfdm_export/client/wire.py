"""Converts tensors to and from the messages of Triton's protocol (KServe's, version 2, over gRPC)."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lfdm_export.client.settings import import_protocol
from lfdm_export.errors import ServerError
from lfdm_export.protocol.contract import PRIORITY_PARAMETER, Array, WireTensor

_MICROSECONDS = 1e6


def infer_request(
    model: str,
    inputs: Sequence[WireTensor],
    tensors: Mapping[str, Array],
    *,
    outputs: Iterable[str] = (),
    request_id: str = "",
    seconds: float | None = None,
    priority: int = 0,
) -> Any:
    """Build a `ModelInferRequest`.

    Args:
        model: name of the model on the server.
        inputs: inputs of the model.
        tensors: tensors by name, with the types and shapes of `inputs`; BYTES as object arrays of `bytes`.
        outputs: names of the requested outputs; empty requests all.
        request_id: ID for logs, traces and cancellation.
        seconds: timeout, which the request carries to the server.
        priority: higher runs first.
    """
    messages, _ = import_protocol()
    request = messages.ModelInferRequest(model_name=model, id=request_id)
    for spec in inputs:
        if spec.name in tensors:
            array = tensors[spec.name]
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
            request.raw_input_contents.append(encode(array))
    for name in outputs:
        request.outputs.add(name=name)
    if seconds is not None:
        request.parameters["timeout"].int64_param = max(1, int(seconds * _MICROSECONDS))
    if priority:
        request.parameters[PRIORITY_PARAMETER].int64_param = priority
    return request


def encode(array: Array) -> bytes:
    """Convert a tensor to raw content: little-endian, C order; each BYTES element follows its length."""
    if array.dtype == np.object_:
        from tritonclient.utils import serialize_byte_tensor

        return bytes(serialize_byte_tensor(array).item()) if array.size else b""
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()


def decode(response: Any, outputs: Sequence[WireTensor]) -> dict[str, Array]:
    """Read the tensors of a `ModelInferResponse`, checked against the model's outputs.

    Returns:
        Arrays by name that own their memory; BYTES as object arrays of `bytes`. Unknown outputs are omitted.

    Raises:
        ServerError: the type, shape or content size of a tensor is wrong.
    """
    specs = {spec.name: spec for spec in outputs}
    if len(response.outputs) != len(response.raw_output_contents):
        raise _bad(response, f"{len(response.outputs)} tensors with {len(response.raw_output_contents)} contents")
    found: dict[str, Array] = {}
    for tensor, content in zip(response.outputs, response.raw_output_contents, strict=True):
        spec = specs.get(tensor.name)
        if spec is None:
            continue
        shape = tuple(tensor.shape)
        fits = len(shape) == len(spec.shape) and all(
            have == want if isinstance(want, int) else have >= 0 for have, want in zip(shape, spec.shape, strict=True)
        )
        if tensor.datatype != spec.datatype or not fits:
            expected = f"{spec.datatype} ({', '.join(map(str, spec.shape))})"
            raise _bad(response, f"{tensor.name} as {tensor.datatype} {shape}, expected {expected}")
        count = int(np.prod(shape, dtype=np.int64))
        array = byte_elements(content) if spec.datatype == "BYTES" else _numbers(content, spec.dtype)
        if array is None or array.size != count:
            raise _bad(response, f"{tensor.name} of shape {shape} with {len(content)} bytes of content")
        found[tensor.name] = array.reshape(shape)
    return found


def _numbers(content: bytes, dtype: np.dtype[Any]) -> Array | None:
    if len(content) % dtype.itemsize:
        return None
    return np.frombuffer(content, dtype.newbyteorder("<")).astype(dtype)


def byte_elements(content: bytes) -> Array | None:
    """Return the BYTES elements; None if the content ends within an element."""
    from tritonclient.utils import deserialize_bytes_tensor

    try:
        elements: Array = deserialize_bytes_tensor(content)
    except struct.error:
        return None
    return elements


def _bad(response: Any, found: str) -> ServerError:
    return ServerError(
        f"the server's answer holds {found}; server and client are of different versions: install the same one",
        "INTERNAL",
        response.id,
    )
