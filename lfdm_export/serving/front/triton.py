"""The server behind the front: raw messages over its private gRPC socket."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from lfdm_export.client.settings import import_grpc, import_protocol
from lfdm_export.protocol.contract import RELOADED_MESSAGE
from lfdm_export.serving.front.refusal import RefusedError, unavailable

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"
#: No limits between this process and the server: the front has limited what clients send.
_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
)
#: Each part of a stream arrives in one window, which is 64 KB at first by default: 0.5 ms until the first frames. Clips
#: take 0.2 ms longer with these options.
_STREAM_OPTIONS = (("grpc.http2.lookahead_bytes", 512 << 10), ("grpc.http2.bdp_probe", 0))
#: gRPC's own messages when no server answers or the connection ends.
_LOST = re.compile(
    r"socket closed|failed to connect|connection reset|broken pipe|endpoint closing|recvmsg|unix:", re.IGNORECASE
)
LOST_SENTENCE = "the server's process has ended and is started again; send the request again"
#: Triton's messages while a model whose process died is loaded again, with status NOT_FOUND and INTERNAL.
_RELOADED = re.compile(re.escape(RELOADED_MESSAGE) + r"|is not healthy")
#: Characters of the server's sentence that are passed on: it may quote the request.
_MOST_DETAILS = 1000
_RELOADED_SENTENCE = "the process of a model has died and is started again; send the request again"


class Triton:
    """Channels to one server process. Use them on one event loop."""

    def __init__(self, target: str) -> None:
        """Prepare the channels, which connect at their first call.

        Args:
            target: gRPC address of the server's socket.
        """
        import grpc.aio

        self._channel = grpc.aio.insecure_channel(target, _OPTIONS)
        self._streams = grpc.aio.insecure_channel(target, _OPTIONS + _STREAM_OPTIONS)
        self._calls: dict[str, Any] = {}

    async def close(self) -> None:
        """End all calls."""
        await self._channel.close()
        await self._streams.close()

    def unary(self, method: str, message: bytes, seconds: float | None) -> Any:
        """Begin a call of a method by its full name; awaiting the call gives the raw answer."""
        return self._method(method, self._channel.unary_unary)(message, timeout=seconds)

    def stream(self, seconds: float | None) -> Any:
        """Begin a stream of requests and answers."""
        return self._method(f"/{SERVICE}/ModelStreamInfer", self._streams.stream_stream)(timeout=seconds)

    def _method(self, name: str, kind: Callable[[str], Any]) -> Any:
        if name not in self._calls:
            self._calls[name] = kind(name)
        return self._calls[name]

    async def ask(self, method: str, request: Any, seconds: float = 10.0) -> Any:
        """Make a small call with Triton's own messages.

        Args:
            method: name of the method, such as ModelMetadata.
            request: its message.
            seconds: timeout.

        Raises:
            RefusedError: the server's refusal, or why there is no answer.
        """
        messages, _ = import_protocol()
        call = self.unary(f"/{SERVICE}/{method}", request.SerializeToString(), seconds)
        return getattr(messages, f"{method}Response").FromString(await answered(call))


async def answered(call: Any) -> bytes:
    """The result of a call.

    Raises:
        RefusedError: the server's refusal, or why there is no answer.
    """
    try:
        answer: bytes = await call
    except import_grpc().aio.AioRpcError as error:
        raise refused(error) from None
    return answer


def refused(error: Any) -> RefusedError:
    """The refusal for a gRPC error."""
    code, details = error.code().name, error.details() or ""
    if code == "UNAVAILABLE" and _LOST.search(details):
        return unavailable(LOST_SENTENCE)
    if code in ("NOT_FOUND", "INTERNAL") and _RELOADED.search(details):
        return unavailable(_RELOADED_SENTENCE)
    return RefusedError(code, details if len(details) <= _MOST_DETAILS else details[:_MOST_DETAILS] + "…")
