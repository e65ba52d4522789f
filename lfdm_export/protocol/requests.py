"""Checks and reads the tensors of a request, as far as this needs no bundle. NumPy only."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.protocol.contract import (
    CONDITION_INPUTS,
    IMAGE_INPUTS,
    MAX_PRIORITY,
    MAX_SEED,
    PRIORITY_PARAMETER,
    Array,
    WireTensor,
)
from lfdm_export.sampling.options import WHOLE, SamplingOptions


@dataclass(frozen=True)
class Limits:
    """Limits on requests to a server.

    Attributes:
        image_bytes: bytes of an encoded picture.
        image_pixels: pixels of a picture, checked before it is decoded.
        steps: sampling steps.
        guidance_scale: largest guidance scale; the smallest is 0.
        text_bytes: bytes of a label or a text.
    """

    image_bytes: int = 20 << 20
    image_pixels: int = 40_000_000
    steps: int = 1000
    guidance_scale: float = 20.0
    text_bytes: int = 4096

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: a limit would reject every request.
        """
        for name in ("image_bytes", "image_pixels", "steps", "guidance_scale", "text_bytes"):
            if not getattr(self, name) >= 1:
                raise InputError(f"the limit {name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True, eq=False)
class GenerationRequest:
    """The content of a request. None uses the default of the bundle, or draws the seed.

    Attributes:
        image_bytes: an encoded picture, after base64 decoding; None if `image` is set.
        image: (H, W, 3) uint8.
        label, text, text_embedding: exactly one is set; the embedding is (text_width,) float32, finite.
        seed: 0 … 2^63 - 1.
        options: sampling options.
        preview_every, progress_every: in steps; 0 for none.
        preview_warped: previews show the warped image.
        only_frames: positions of the frames to decode; None for all.
    """

    image_bytes: bytes | None = None
    image: NDArray[np.uint8] | None = None
    label: str | None = None
    text: str | None = None
    text_embedding: NDArray[np.float32] | None = None
    seed: int | None = None
    options: SamplingOptions = SamplingOptions()
    preview_every: int = 0
    progress_every: int = 0
    preview_warped: bool = False
    only_frames: tuple[int, ...] | None = None


def check_request(tensors: Mapping[str, Array], known: Sequence[WireTensor]) -> None:
    """Compare tensors with the inputs of a model: names, types, shapes.

    Raises:
        InputError: a tensor is unknown, missing, or has another type or shape.
    """
    specs = {spec.name: spec for spec in known}
    for name, array in tensors.items():
        if name not in specs:
            raise InputError(f"found the unknown input {name!r}, expected some of {', '.join(specs)}")
        check_tensor(specs[name], array)
    for spec in known:
        if not spec.optional and spec.name not in tensors:
            raise InputError(f"the input {spec.name!r} is missing; give it ({spec.about})")


def check_tensor(spec: WireTensor, array: Array) -> None:
    """Compare one tensor with its specification.

    Raises:
        InputError: its type or shape differs.
    """
    expected = f"{spec.datatype} of shape ({', '.join(map(str, spec.shape))})"
    fits = len(array.shape) == len(spec.shape) and all(
        found == wanted if isinstance(wanted, int) else found >= 1
        for found, wanted in zip(array.shape, spec.shape, strict=True)
    )
    if array.dtype != spec.dtype or not fits:
        raise InputError(f"{spec.name} is {array.dtype} of shape {array.shape}, expected {expected}")


def parse_image(tensors: Mapping[str, Array], limits: Limits) -> GenerationRequest:
    """Read `image_bytes` or `image` from a request.

    Raises:
        InputError: none or both are set, or the image is too large.
    """
    _exactly_one(tensors, IMAGE_INPUTS)
    if "image_bytes" in tensors:
        return GenerationRequest(image_bytes=image_file(_bytes(tensors, "image_bytes"), limits))
    image = tensors["image"]
    height, width = image.shape[:2]
    if height * width > limits.image_pixels:
        raise InputError(
            f"image has {width}x{height} pixels, expected at most {limits.image_pixels:,}; scale it down first"
        )
    return GenerationRequest(image=image)


def parse_condition(tensors: Mapping[str, Array], limits: Limits) -> GenerationRequest:
    """Read `label`, `text` or `text_embedding` from a request.

    Raises:
        InputError: not exactly one is set, or it is not UTF-8 text, too long, or has values that are not finite.
    """
    _exactly_one(tensors, CONDITION_INPUTS)
    if "label" in tensors:
        return GenerationRequest(label=_text(tensors, "label", limits.text_bytes))
    if "text" in tensors:
        return GenerationRequest(text=_text(tensors, "text", limits.text_bytes))
    embedding = tensors["text_embedding"]
    if not np.isfinite(embedding).all():
        raise InputError("text_embedding holds values that are not finite; make it again")
    return GenerationRequest(text_embedding=embedding)


def parse_sampling(tensors: Mapping[str, Array], limits: Limits) -> GenerationRequest:
    """Read the tensors that have a default from a request.

    Raises:
        InputError: a value is out of range.
    """
    options = SamplingOptions(
        sampler=_text(tensors, "sampler", limits.text_bytes) if "sampler" in tensors else None,
        steps=_integer(tensors, "steps", 1, limits.steps),
        eta=float(tensors["eta"][0]) if "eta" in tensors else None,
        guidance_scale=_number(tensors, "guidance_scale", limits.guidance_scale),
        guidance_interval=_interval(tensors, "guidance_interval"),
    )
    return GenerationRequest(
        seed=_integer(tensors, "seed", 0, MAX_SEED),
        options=options,
        preview_every=_integer(tensors, "preview_every", 0, limits.steps) or 0,
        progress_every=_integer(tensors, "progress_every", 0, limits.steps) or 0,
        preview_warped="preview_warped" in tensors and bool(tensors["preview_warped"][0]),
        only_frames=None if (frames := tensors.get("only_frames")) is None else tuple(frames.tolist()),
    )


def parse_priority(parameters: Mapping[str, object]) -> int:
    """Return the priority of a request.

    Args:
        parameters: custom parameters of the request.

    Raises:
        InputError: it is not an integer, or out of range.
    """
    value = parameters.get(PRIORITY_PARAMETER, 0)
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > MAX_PRIORITY:
        raise InputError(
            f"the parameter {PRIORITY_PARAMETER} is {value!r}, "
            f"expected an integer from -{MAX_PRIORITY} to {MAX_PRIORITY}"
        )
    return value


def image_file(data: bytes, limits: Limits) -> bytes:
    """Return the encoded picture in `image_bytes`, after base64 decoding (JSON needs base64).

    No picture format uses base64 characters only, so the two cannot be confused.

    Raises:
        InputError: it is empty or too large.
    """
    if not data:
        raise InputError("image_bytes is empty, expected an encoded picture such as a JPEG file")
    if len(data) > most_encoded_bytes(limits):
        raise _too_large(len(data), limits)
    decoded = _from_base64(data)
    if len(decoded) > limits.image_bytes:
        raise _too_large(len(decoded), limits)
    return decoded


def most_encoded_bytes(limits: Limits) -> int:
    """Most bytes of `image_bytes` as received: base64 uses 4 bytes for 3, plus line ends and a data URL header."""
    return limits.image_bytes * 4 // 3 + limits.image_bytes // 16 + 128


_DATA_URL = re.compile(rb"data:[\w.+/-]*;base64,")
_BASE64 = re.compile(rb"[A-Za-z0-9+/=\s]{1,64}")


def _from_base64(data: bytes) -> bytes:
    head = _DATA_URL.match(data)
    start = head.end() if head else 0
    if not _BASE64.fullmatch(data[start : start + 64]):  # a look at the whole content would take a tenth of a second
        return data
    text = b"".join(data[start:].split())
    try:
        return base64.b64decode(text, validate=True) or data
    except (binascii.Error, ValueError):
        return data


def _too_large(size: int, limits: Limits) -> InputError:
    return InputError(
        f"image_bytes has {size:,} bytes, expected at most {limits.image_bytes:,}; send a smaller picture"
    )


def _exactly_one(tensors: Mapping[str, Array], specs: Sequence[WireTensor]) -> None:
    names = [spec.name for spec in specs]
    found = [name for name in names if name in tensors]
    if len(found) != 1:
        raise InputError(f"found {' and '.join(found) or 'none'} of {', '.join(names)}, expected exactly one")


def _bytes(tensors: Mapping[str, Array], name: str) -> bytes:
    value = tensors[name][0]
    if not isinstance(value, bytes):
        raise InputError(f"{name} holds {type(value).__name__}, expected bytes")
    return value


def _text(tensors: Mapping[str, Array], name: str, most: int) -> str:
    value = _bytes(tensors, name)
    if not 1 <= len(value) <= most:
        raise InputError(f"{name} has {len(value)} bytes, expected 1 to {most}")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not text in UTF-8; encode it so") from None


def _integer(tensors: Mapping[str, Array], name: str, least: int, most: int) -> int | None:
    if name not in tensors:
        return None
    value = int(tensors[name][0])
    if not least <= value <= most:
        raise InputError(f"{name} is {value}, expected {least} to {most}")
    return value


def _number(tensors: Mapping[str, Array], name: str, most: float) -> float | None:
    if name not in tensors:
        return None
    value = float(tensors[name][0])
    if not 0.0 <= value <= most:  # NaN also fails
        raise InputError(f"{name} is {value}, expected 0 to {most:g}")
    return value


def _interval(tensors: Mapping[str, Array], name: str) -> tuple[float, float]:
    """The ends of an interval as the client wrote them: 0.2 is not the nearest 32-bit float."""
    if name not in tensors:
        return WHOLE
    low, high = (float(str(end)) for end in tensors[name])
    return low, high
