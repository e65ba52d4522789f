"""Reading and writing gRPC messages with limits on time and size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc.aio
from google.protobuf.message import DecodeError

from lfdm_export.serving.front.inflate import inflated_message
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.refusal import RefusedError, invalid
from lfdm_export.serving.front.time_limit import limited
from lfdm_export.serving.front.waiting import Waiting


class MessageDoor:
    """Reads and writes the messages of all calls."""

    def __init__(self, limits: FrontLimits) -> None:
        """Apply the limits of the front."""
        self._limits = limits
        self._waiting = Waiting(limits.connections, 2 * limits.held_bytes)

    async def read(self, context: Any, most: int) -> bytes:
        """Read the first message of a call.

        Raises:
            RefusedError: no message comes in time, or it is too large, or other calls need the place.
        """
        seconds = self._limits.body_seconds
        late = f"no whole request came within {seconds:g} s; send it again, faster"
        found = await self._waiting.message(context, seconds, late)
        if found is grpc.aio.EOF:
            raise invalid("the call has no request; send one")
        return inflated_message(found, most)

    async def next(self, context: Any, working: Callable[[], object]) -> Any:
        """The next message of a stream as it comes, or gRPC's mark for the end; see `Waiting.message`.

        Raises:
            RefusedError: the stream was silent for too long without requests in flight, or other calls need the place.
        """
        late = "the stream was silent for too long; open a new one"
        return await self._waiting.message(context, self._limits.idle_seconds, late, working)

    async def write(self, context: Any, answer: bytes) -> None:
        """Send a message.

        Raises:
            RefusedError: the client does not read it in time, or is gone.
        """
        try:
            with limited(self._limits.write_seconds, "the answer was not taken in time; read it faster"):
                await context.write(answer)
        except grpc.aio.InternalError:
            raise RefusedError("CANCELLED", "the client is gone") from None


def parsed(kind: Any, message: bytes) -> Any:
    """Parse a raw message.

    Raises:
        RefusedError: it is not of that kind.
    """
    try:
        return kind.FromString(message)
    except DecodeError:
        raise invalid("the request is not a message of Triton's protocol; send a ModelInferRequest") from None
