"""Reading the body of an HTTP request within limits."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from aiohttp import HttpVersion11, web
from aiohttp.http_exceptions import HttpProcessingError

from lfdm_export.serving.front.inflate import Inflater
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.refusal import RefusedError, invalid, too_large


async def read_body(request: web.BaseRequest, limits: FrontLimits, hold: Callable[[int], None]) -> bytes:
    """Read and decompress the whole body.

    Args:
        request: the request, with its head received.
        limits: limits of the front.
        hold: called with the number of bytes kept in memory.

    Raises:
        RefusedError: the body is too large, too slow, in too many pieces, or damaged.
    """
    announced = request.content_length
    if announced is not None and announced > limits.message_bytes:
        raise too_large(f"the body has {announced:,} bytes, expected at most {limits.message_bytes:,}; send less")
    _ask_for_body(request)
    try:
        return await asyncio.wait_for(_read(request, limits, hold), limits.body_seconds)
    except asyncio.TimeoutError:
        raise RefusedError(
            "DEADLINE_EXCEEDED",
            f"the body did not come within {limits.body_seconds:.0f} s; send it faster",
            http_status=408,
            closes=True,
        ) from None
    except (HttpProcessingError, web.RequestPayloadError):
        raise RefusedError("INVALID_ARGUMENT", "the body is damaged; send it again", closes=True) from None
    except RefusedError as refused:
        refused.closes = True  # the rest of the body is not read
        raise


def _ask_for_body(request: web.BaseRequest) -> None:
    """Answer ``Expect: 100-continue``: its client sends no body before.

    Raises:
        RefusedError: the client expects something else.
    """
    expected = request.headers.get("Expect", "").strip().lower()
    if expected not in ("", "100-continue"):
        raise RefusedError(
            "INVALID_ARGUMENT",
            f"the header Expect is {expected[:32]!r}, expected 100-continue; leave it out",
            http_status=417,
            closes=True,
        )
    if expected and request.version >= HttpVersion11 and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _read(request: web.BaseRequest, limits: FrontLimits, hold: Callable[[int], None]) -> bytes:
    inflater = Inflater(request.headers.get("Content-Encoding", ""), limits.message_bytes)
    pieces: list[bytes] = []
    came = chunks = 0
    async for data, ends_chunk in request.content.iter_chunks():
        came, chunks = came + len(data), chunks + ends_chunk
        if came > limits.message_bytes:
            raise too_large(f"the body has more than {limits.message_bytes:,} bytes; send a smaller picture")
        if chunks > limits.chunks:
            raise too_large(f"the body has more than {limits.chunks:,} chunks; send larger ones")
        for piece in inflater.feed(data):
            hold(len(piece))
            pieces.append(piece)
    inflater.finish()
    if not pieces:
        raise invalid("the request has no body; send JSON with inputs")
    return b"".join(pieces)
