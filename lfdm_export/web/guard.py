"""What every request passes before the API and the page: its host, its origin, and the time and memory of its body."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfdm_export.web.app import error_answer
from lfdm_models.memory import return_free_memory

#: Names of this machine in a browser's address.
HERE = ("localhost", "127.0.0.1", "[::1]")
#: Seconds that a body may pause, and seconds that all of it may take.
PAUSE_SECONDS, BODY_SECONDS = 8.0, 120.0
#: Most bytes of all bodies that are being read or used.
MOST_BYTES = 128 << 20
#: Bytes of a body after which free memory is returned to the system: glibc's allocator would keep it.
_LARGE = 1 << 20
_SAFE = ("GET", "HEAD", "OPTIONS")
_OTHER_SITES = ("cross-site", "same-site")


class Guard:
    """An application that answers only requests that may be meant for it, and gives no client all time and memory."""

    def __init__(self, app: ASGIApp, *, here: bool) -> None:
        """Guard an application.

        Args:
            app: the application.
            here: answer only to names of this machine, so that a foreign page cannot reach it by DNS rebinding.
        """
        self._app, self._here = app, here
        self._held = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, refuse, or pass a request on."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":  # the page uses none
            await send({"type": "websocket.close", "code": 1008})
        elif (refused := self._refused(scope)) is not None:
            await error_answer(*refused)(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(self, receive, send)
        try:
            await self._app(scope, body.receive, body.send)
        except ClientDisconnect:  # no news for the log
            pass
        finally:
            self._held -= body.held
            if body.held > _LARGE:
                asyncio.get_running_loop().run_in_executor(None, return_free_memory)
        if body.refused is not None and not body.answered:
            await error_answer(*body.refused, {"Connection": "close"})(scope, receive, send)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence for a request that is not meant for this server."""
        headers = Headers(scope=scope)
        host = headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._here and name not in HERE:
            return 421, f"this server answers to {', '.join(HERE)} only; a proxy has to send one of them as Host"
        if scope["method"] not in _SAFE and _of_other_site(headers, host):
            return 403, "pages of other sites may not use this server"
        return None

    def take(self, count: int) -> bool:
        """Count bytes of a body; returns whether there is room for them."""
        self._held += count
        return self._held <= MOST_BYTES


def _of_other_site(headers: Headers, host: str) -> bool:
    """Whether a page of another site sent a request. Browsers say so; older ones only name the page's origin."""
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if site is not None or origin is None:
        return site in _OTHER_SITES
    return urlsplit(origin).netloc != host


class _Body:
    """One request: its body is watched as it comes, and no answer of the application follows once it is refused."""

    def __init__(self, guard: Guard, receive: Receive, send: Send) -> None:
        self._guard, self._receive, self._send = guard, receive, send
        self._end = asyncio.get_running_loop().time() + BODY_SECONDS
        self._complete = False
        self.held = 0
        self.answered = False
        self.refused: tuple[int, str] | None = None

    async def receive(self) -> Message:
        if self._complete:  # what follows is the end of the connection
            return await self._receive()
        left = min(PAUSE_SECONDS, self._end - asyncio.get_running_loop().time())
        try:
            message = await asyncio.wait_for(self._receive(), max(left, 0.0))
        except asyncio.TimeoutError:
            return self._refuse(408, "the body did not come in time; send it faster")
        size = len(message.get("body", b""))
        self.held += size
        self._complete = message["type"] != "http.request" or not message.get("more_body", False)
        if not self._guard.take(size):
            return self._refuse(503, "the server reads too many large requests; send it again later")
        return message

    def _refuse(self, status: int, sentence: str) -> Message:
        self.refused, self._complete = (status, sentence), True
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if self.refused is not None and not self.answered:
            return
        self.answered = True
        await self._send(message)
