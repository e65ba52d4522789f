"""Reading and writing gRPC messages with limits on time and size."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from lfdm_export.serving.front.inflate import inflated_message
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.refusal import RefusedError, invalid


class MessageDoor:
    """Reads and writes the messages of all calls, a few at a time."""

    def __init__(self, limits: FrontLimits) -> None:
        """Apply the limits of the front."""
        self._limits = limits
        self._readers = asyncio.Semaphore(limits.readers)

    async def read(self, context: Any, most: int) -> bytes:
        """Read the first message of a call.

        Raises:
            RefusedError: no message comes in time, or it is too large.
        """

        async def read() -> Any:
            async with self._readers:
                return await context.read()

        seconds = self._limits.body_seconds
        try:
            found = await asyncio.wait_for(read(), seconds)
        except asyncio.TimeoutError:
            raise RefusedError(
                "DEADLINE_EXCEEDED", f"no whole request came within {seconds:.0f} s; send it faster"
            ) from None
        if found is grpc.aio.EOF:
            raise invalid("the call has no request; send one")
        return inflated_message(found, most)

    async def write(self, context: Any, answer: bytes) -> None:
        """Send a message.

        Raises:
            RefusedError: the client does not read it in time.
        """
        try:
            await asyncio.wait_for(context.write(answer), self._limits.write_seconds)
        except asyncio.TimeoutError:
            raise RefusedError("DEADLINE_EXCEEDED", "the answer was not taken in time; read it faster") from None


def parsed(kind: Any, message: bytes) -> Any:
    """Parse a raw message.

    Raises:
        RefusedError: it is not of that kind.
    """
    try:
        return kind.FromString(message)
    except DecodeError:
        raise invalid("the request is not a message of Triton's protocol; send a ModelInferRequest") from None
