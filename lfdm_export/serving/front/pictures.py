"""A check of large pictures before they are forwarded, so that invalid ones take no memory in the server.

The server's processes pass tensors through shared memory that grows to the largest tensor and never shrinks.
"""

from __future__ import annotations

import asyncio
import io
from typing import Any

from lfdm_export.errors import InputError
from lfdm_export.protocol.requests import Limits, image_file
from lfdm_export.serving.front.refusal import invalid
from lfdm_models.pictures.errors import PictureError
from lfdm_models.pictures.formats import open_picture

#: Smaller pictures fit into the initial shared memory of each process.
_LARGE = 1 << 20


async def check_picture(request: Any, limits: Limits) -> None:
    """Read the header of a large encoded picture in a checked `ModelInferRequest`; no pixel is decoded.

    Raises:
        RefusedError: it is not a picture, or not one that the server decodes.
    """
    for index, tensor in enumerate(request.inputs):
        if tensor.name == "image_bytes":
            raw = request.raw_input_contents
            content = raw[index][4:] if raw else tensor.contents.bytes_contents[0]
            if len(content) > _LARGE:
                await asyncio.to_thread(_open, content, limits)


def _open(content: bytes, limits: Limits) -> None:
    try:
        picture = image_file(content, limits)
        with open_picture(io.BytesIO(picture), "image_bytes", most_pixels=limits.image_pixels).image:
            pass
    except (InputError, PictureError) as error:
        raise invalid(str(error)) from None
