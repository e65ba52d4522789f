"""Limits of what the front reads, holds and waits for."""

from __future__ import annotations

from dataclasses import dataclass

from lfdm_export.protocol.requests import Limits, most_encoded_bytes


@dataclass(frozen=True)
class FrontLimits:
    """Limits of one front.

    Attributes:
        requests: what the models accept.
        in_flight: requests for clips or streams forwarded at a time; more are refused at once.
        held_bytes: bytes of all requests that are being read or in flight.
        connections: HTTP connections; for gRPC, calls that wait for their client. Beyond that, the longest wait ends.
        grpc_connections, calls: gRPC connections, and concurrent calls on all of them; more are refused.
        json_values: numbers, strings, lists and objects in one JSON text.
        json_lists, json_fractions, json_strings, json_objects: lists; numbers with a point or an exponent; strings and
            names; objects: they take more memory, and longer to parse.
        chunks: chunks of one HTTP body.
        header_fields: header fields of one HTTP request.
        header_seconds: timeout for a request's head; a silent HTTP connection is closed after the same time.
        body_seconds: timeout for a request's body or a call's message.
        write_seconds: timeout for the client to read a piece of an answer over HTTP, or one answer of a stream.
        idle_seconds: how long a gRPC connection or stream without work is kept.
    """

    requests: Limits
    in_flight: int = 96
    held_bytes: int = 256 << 20
    connections: int = 256
    grpc_connections: int = 1024
    calls: int = 2048
    json_values: int = 4_000_000
    json_lists: int = 1_500_000
    json_fractions: int = 1_000_000
    json_strings: int = 20_000
    json_objects: int = 2_000
    chunks: int = 20_000
    header_fields: int = 100
    header_seconds: float = 20.0
    body_seconds: float = 30.0
    write_seconds: float = 60.0
    idle_seconds: float = 600.0

    @property
    def message_bytes(self) -> int:
        """Maximum bytes of one request: the picture, possibly as base64, and everything else."""
        return most_encoded_bytes(self.requests) + (1 << 20)
