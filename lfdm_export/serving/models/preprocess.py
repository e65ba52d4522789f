"""`lfdm_preprocess`: any picture -> the pixels that the model takes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from lfdm_export.errors import InputError
from lfdm_export.preprocess import UNREADABLE, UInt8Array, pil_to_rgb, prepare_image
from lfdm_export.serving.contract import Array
from lfdm_export.serving.models.stub import Loaded, answer_each, load
from lfdm_export.serving.requests import Limits, parse_image

#: What Pillow may try: the formats of photographs, none that starts a program or refers to another file.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def decode_picture(data: bytes, limits: Limits) -> UInt8Array:
    """An encoded picture as (H, W, 3) uint8, whose size is looked at before it is decoded.

    Raises:
        InputError: it is no picture, damaged, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > limits.image_pixels:
                raise InputError(
                    f"image_bytes is a picture of {width}x{height} pixels, expected at most {limits.image_pixels:,}; "
                    "scale it down first"
                )
            return pil_to_rgb(opened, "image_bytes")
    except InputError:
        raise
    except UNREADABLE as error:
        raise InputError(f"image_bytes is no picture that can be read; expected one of {', '.join(FORMATS)}") from error


def prepared_pixels(tensors: Mapping[str, Array], loaded: Loaded) -> UInt8Array:
    """The picture of a request as the model takes it, (size, size, 3) uint8.

    Raises:
        InputError: it cannot be used.
    """
    given = parse_image(tensors, loaded.settings.limits)
    encoded, pixels = given.image_bytes, given.image
    if encoded is not None:
        pixels = decode_picture(encoded, loaded.settings.limits)
    assert pixels is not None  # else there was none
    manifest = loaded.pipeline.bundle.manifest
    return prepare_image(pixels, manifest.geometry.image_size, manifest.preprocessing)


class PreprocessModel:
    """The model that Triton sees."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle, of which only the manifest is needed."""
        self._loaded = load(args)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer each request with `pixels`."""
        return answer_each(
            requests, self._loaded.interface, lambda tensors: {"pixels": prepared_pixels(tensors, self._loaded)}
        )
