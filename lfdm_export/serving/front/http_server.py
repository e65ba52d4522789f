"""An HTTP server with a maximum number of connections, which closes silent ones."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

from aiohttp import web

from lfdm_export.serving.front.limits import FrontLimits

Answer = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]
#: Name of the server in its answers; the library would give its own and Python's versions.
SERVER = "lfdm-serve"
_NO_LOG = logging.getLogger(f"{__name__}.access")
_NO_LOG.disabled = True
#: Seconds between two checks for silent connections.
_LOOK = 1.0
#: Seconds in which a body may come before its connection makes room for others.
_PATIENCE = 1.0


class HttpServer:
    """The server of one port. Use it only on its event loop."""

    def __init__(self, answer: Answer, limits: FrontLimits) -> None:
        """Prepare; `listen` opens the port.

        Args:
            answer: answers each request; an exception from it ends the connection.
            limits: limits of the front.
        """
        self._answer, self._limits = answer, limits
        self._server = web.Server(self._busy, handler_cancellation=True)
        self._silent_since: dict[web.RequestHandler, float] = {}
        self._answered_since: dict[web.RequestHandler, tuple[float, web.BaseRequest]] = {}
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
        if self._full() and not self._make_room():
            return _Busy()
        loop = asyncio.get_running_loop()
        protocol = _Connection(
            self._server,
            loop=loop,
            auto_decompress=False,
            keepalive_timeout=self._limits.header_seconds,
            access_log=_NO_LOG,
            max_line_size=8190,
            max_field_size=8190,
            max_headers=self._limits.header_fields,
        )
        self._silent_since[protocol] = loop.time()
        return protocol

    def _full(self) -> bool:
        connections, most = self._server.connections, self._limits.connections
        # Closed ones are still listed until their tasks have ended.
        return len(connections) >= most and sum(one.transport is not None for one in connections) >= most

    def _make_room(self) -> bool:
        """Close the connection whose client has been silent longest; returns whether there was one."""
        oldest = min(self._waiting(), key=lambda found: found[0], default=None)
        if oldest is not None:
            self._silent_since.pop(oldest[1], None)
            oldest[1].force_close()
        return oldest is not None

    def _waiting(self) -> Iterator[tuple[float, web.RequestHandler]]:
        """Open connections that wait for their client, and since when."""
        for protocol, since in self._silent_since.items():
            if protocol.transport is not None:
                yield since, protocol
        latest = asyncio.get_running_loop().time() - _PATIENCE
        for protocol, (since, request) in self._answered_since.items():
            if since < latest and not request.content.is_eof() and protocol.transport is not None:
                yield since, protocol

    async def _busy(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer a request; its connection does not count as silent meanwhile."""
        loop, protocol = asyncio.get_running_loop(), request.protocol
        self._silent_since.pop(protocol, None)
        self._answered_since[protocol] = loop.time(), request
        try:
            answer = await self._answer(request)
            if not answer.prepared:
                answer.headers["Server"] = SERVER
            return answer
        finally:
            del self._answered_since[protocol]
            self._silent_since[protocol] = loop.time()

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


class _Connection(web.RequestHandler):
    """A connection on which a request that is not HTTP gets one sentence, and leaves no lines in the log."""

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        """The answer to a request that the parser refuses, and the end of its connection."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        why = re.split(r":\s|\n", message or "")[0][:100]
        body = {"error": f"the request is not valid HTTP ({why}); correct it"}
        answer = web.json_response(body, status=status, headers={"Server": SERVER})
        answer.force_close()
        return answer


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
