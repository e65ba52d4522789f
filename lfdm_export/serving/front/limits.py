"""What the front reads, holds and waits for at most."""

from __future__ import annotations

from dataclasses import dataclass

from lfdm_export.protocol.requests import Limits, most_encoded_bytes


@dataclass(frozen=True)
class FrontLimits:
    """Bounds of one front.

    Attributes:
        requests: what the models accept.
        in_flight: requests for clips or streams that are handed on at a time; more are refused at once.
        held_bytes: of all requests that are being read or in flight.
        connections: of HTTP; of gRPC, calls at a time.
        json_values: numbers, strings, lists and objects in one JSON text.
        chunks: of one HTTP body.
        header_fields: of one HTTP request.
        header_seconds: until a request's head has come; also how long a silent HTTP connection is kept.
        body_seconds: until a request's body, or a call's message, has come.
        write_seconds: until the client has taken a piece of the answer.
        idle_seconds: that a gRPC connection or stream without work is kept.
        readers: gRPC messages that are being received at a time.
    """

    requests: Limits
    in_flight: int = 96
    held_bytes: int = 256 << 20
    connections: int = 256
    json_values: int = 4_000_000
    chunks: int = 20_000
    header_fields: int = 100
    header_seconds: float = 20.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    idle_seconds: float = 600.0
    readers: int = 32

    @property
    def message_bytes(self) -> int:
        """Of one request: the picture, as base64 if need be, and room for everything else."""
        return most_encoded_bytes(self.requests) + (1 << 20)
