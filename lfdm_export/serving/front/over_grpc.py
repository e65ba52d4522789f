"""The gRPC endpoint: raw messages are checked and forwarded, raw answers returned."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import grpc
import grpc.aio

from lfdm_export.client.settings import import_protocol
from lfdm_export.serving.front.grpc_messages import MessageDoor, parsed
from lfdm_export.serving.front.grpc_stream import StreamCall
from lfdm_export.serving.front.refusal import RefusedError, forget
from lfdm_export.serving.front.service import INFER, Service
from lfdm_export.serving.front.triton import HEALTH, SERVICE, answered

logger = logging.getLogger(__name__)

_Answer = Callable[[str, Any], Awaitable[bytes | None]]
#: Methods that only report; forwarded unchanged.
_REPORTING = frozenset(
    (
        *(
            f"/{SERVICE}/{name}"
            for name in ("ServerLive", "ServerMetadata", "ModelMetadata", "ModelConfig", "ModelStatistics")
        ),
        f"/{HEALTH}/Check",
    )
)
_LIVE, _READY, _MODEL_READY = (f"/{SERVICE}/{name}" for name in ("ServerLive", "ServerReady", "ModelReady"))
#: Serialized ServerReadyResponse and ModelReadyResponse with their default, "not ready".
_NOT_READY = b""
#: Maximum bytes of a request to a reporting method.
_QUESTION = 4096


class GrpcDoor(grpc.GenericRpcHandler):
    """Serves every method of Triton's service that clients may use."""

    def __init__(self, service: Service) -> None:
        """Use `start_grpc`."""
        self._service = service
        self._messages = MessageDoor(service.limits)

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call. Each is registered as a stream: the front itself limits how long messages take."""
        method = handler_call_details.method
        metadata = {key: value for key, value in handler_call_details.invocation_metadata if key == "authorization"}
        answer: _Answer
        if method == INFER:
            answer = self._infer
        elif method == f"/{SERVICE}/ModelStreamInfer":
            answer = self._stream
        elif method in (_READY, _MODEL_READY):
            answer = self._ready
        elif method in _REPORTING:
            answer = self._report
        else:
            answer = self._refuse
        return grpc.stream_stream_rpc_method_handler(
            partial(self._guarded, answer, method, metadata.get("authorization"))
        )

    async def _guarded(self, answer: _Answer, method: str, token: Any, _: Any, context: Any) -> None:
        """Answer or refuse a call."""
        try:
            if not method.startswith(f"/{HEALTH}/"):
                self._service.access.check(token)
            found = await answer(method, context)
            if found is not None:
                await self._messages.write(context, found)
            return
        except RefusedError as refused:
            code, sentence = getattr(grpc.StatusCode, refused.code, grpc.StatusCode.UNKNOWN), str(refused)
            forget(refused)
        except asyncio.CancelledError as cancelled:
            forget(cancelled)
            raise
        except Exception as error:
            logger.exception("a call of %s failed", method)
            code, sentence = grpc.StatusCode.INTERNAL, "a fault of the server: see its log"
            forget(error)
        try:
            await context.abort(code, sentence)
        except grpc.aio.InternalError:  # gRPC sends no status while the client leaves an answer unread
            raise asyncio.CancelledError from None  # ends the call without a traceback in the log

    async def _report(self, method: str, context: Any) -> bytes:
        question = await self._messages.read(context, _QUESTION)
        if method == _LIVE:  # the front is live; a server behind it that has ended is restarted
            messages, _ = import_protocol()
            live: bytes = messages.ServerLiveResponse(live=True).SerializeToString()
            return live
        return await answered(self._service.triton.unary(method, question, _left(context)))

    async def _ready(self, method: str, context: Any) -> bytes:
        question = await self._messages.read(context, _QUESTION)
        answer = _NOT_READY
        if self._service.open:
            try:
                answer = await answered(self._service.triton.unary(method, question, _left(context)))
            except RefusedError as refused:
                if refused.code != "UNAVAILABLE":
                    raise
        return answer

    async def _infer(self, _method: str, context: Any) -> bytes:
        service, (messages, _) = self._service, import_protocol()
        with service.flights.holding() as hold:
            message = await self._messages.read(context, service.limits.message_bytes)
            hold(len(message))
            async with service.checking(len(message)):
                request = parsed(messages.ModelInferRequest, message)
                await service.check(request)
                model, request_id = request.model_name, request.id
                del request  # another copy of the picture
            return await service.infer(model, request_id, message, _left(context))

    async def _stream(self, _method: str, context: Any) -> None:
        await StreamCall(self._service, self._messages, context).run()

    async def _refuse(self, method: str, _context: Any) -> None:
        if method.startswith((f"/{SERVICE}/", f"/{HEALTH}/")):
            raise RefusedError(
                "PERMISSION_DENIED",
                f"{method.rpartition('/')[2][:64]} is restricted: models, shared memory, traces and logs are "
                "lfdm-serve's alone",
            )
        raise RefusedError("UNIMPLEMENTED", "this server has no such method; it speaks Triton's protocol")


def _left(context: Any) -> float | None:
    """Seconds until the client's deadline; None without one."""
    seconds: float | None = context.time_remaining()
    return seconds


async def start_grpc(service: Service, address: str) -> Any:
    """Start to listen.

    Args:
        service: answers the calls.
        address: HOST:PORT.

    Returns:
        gRPC's server.

    Raises:
        RuntimeError: the port is in use.
        InputError: a file for TLS cannot be read.
    """
    limits = service.limits
    server = grpc.aio.server(
        handlers=[GrpcDoor(service)],
        maximum_concurrent_rpcs=limits.calls,
        options=(
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", limits.message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_concurrent_streams", limits.connections),
            ("grpc.max_allowed_incoming_connections", limits.grpc_connections),
            ("grpc.max_metadata_size", 16 << 10),
            ("grpc.absolute_max_metadata_size", 16 << 10),
            ("grpc.server_handshake_timeout_ms", int(1000 * limits.header_seconds)),
            ("grpc.max_connection_idle_ms", int(1000 * limits.idle_seconds)),
            # gRPC decompresses without a limit, so messages arrive compressed (see `inflated_message`).
            ("grpc.per_message_decompression", 0),
        ),
    )
    credentials = service.access.grpc_credentials()
    if credentials is None:
        server.add_insecure_port(address)
    else:
        server.add_secure_port(address, credentials)
    await server.start()
    return server
