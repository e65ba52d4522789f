"""A look at large pictures before they are handed on: what nobody can decode takes no memory further on.

The server's processes pass tensors on through shared memory that grows with the largest, and does not shrink.
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

#: Smaller ones fit into the memory that each process has from the start.
_LARGE = 1 << 20


async def check_picture(request: Any, limits: Limits) -> None:
    """Open the encoded picture of a checked `ModelInferRequest`, if it is large; no pixel is decoded.

    Raises:
        RefusedError: it is no picture, or one that would not be decoded.
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
