"""An HTTP server with a maximum number of connections, which closes silent ones."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import web

from lfdm_export.serving.front.limits import FrontLimits

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
#: Seconds between two checks for silent connections.
_LOOK = 1.0


class HttpServer:
    """The server of one port. Use it only on its event loop."""

    def __init__(self, answer: Answer, limits: FrontLimits) -> None:
        """Prepare; `listen` opens the port.

        Args:
            answer: answers each request; an exception from it ends the connection.
            limits: limits of the front.
        """
        self._answer, self._limits = answer, limits
        self._server = web.Server(
            self._busy,
            handler_cancellation=True,
            auto_decompress=False,
            keepalive_timeout=limits.header_seconds,
            access_log=None,
            max_line_size=8190,
            max_field_size=8190,
            max_headers=limits.header_fields,
        )
        self._silent_since: dict[web.RequestHandler, float] = {}
        self._watch: asyncio.Task[None] | None = None
        self._listener: asyncio.Server | None = None

    async def listen(self, host: str, port: int, context: ssl.SSLContext | None) -> None:
        """Open the port and accept connections.

        Raises:
            OSError: the port is in use.
        """
        loop = asyncio.get_running_loop()
        handshake = None if context is None else self._limits.header_seconds
        self._listener = await loop.create_server(
            self._protocol, host, port, ssl=context, ssl_handshake_timeout=handshake, backlog=512, reuse_address=True
        )
        self._watch = loop.create_task(self._close_silent())

    async def close(self) -> None:
        """Accept no more connections, and close the open ones."""
        if self._listener is not None:
            self._listener.close()
        if self._watch is not None:
            self._watch.cancel()
        await self._server.shutdown(1.0)

    def _protocol(self) -> asyncio.Protocol:
        if len(self._server.connections) >= self._limits.connections:
            return _Busy()
        protocol = self._server()
        self._silent_since[protocol] = asyncio.get_running_loop().time()
        return protocol

    async def _busy(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request; its connection does not count as silent meanwhile."""
        self._silent_since.pop(request.protocol, None)
        try:
            return await self._answer(request)
        finally:
            self._silent_since[request.protocol] = asyncio.get_running_loop().time()

    async def _close_silent(self) -> None:
        """Close connections that have sent no whole request head for too long."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK)
            now = loop.time()
            for protocol, since in list(self._silent_since.items()):
                if protocol.transport is None and now > since + _LOOK:  # closed
                    del self._silent_since[protocol]
                elif now > since + self._limits.header_seconds:
                    with suppress(KeyError):
                        del self._silent_since[protocol]
                    protocol.force_close()


class _Busy(asyncio.Protocol):
    """A connection over the maximum."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Answer 503 and close."""
        assert isinstance(transport, asyncio.Transport)
        body = b'{"error":"the server has reached its maximum number of connections; try again later"}'
        head = (
            b"HTTP/1.1 503 Service Unavailable",
            b"Connection: close",
            b"Content-Type: application/json",
            b"Content-Length: %d" % len(body),
        )
        transport.write(b"\r\n".join((*head, b"", body)))
        transport.close()
