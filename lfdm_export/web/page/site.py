"""The page as a web application, with or without the video API: access, and what a browser may load."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NoReturn

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfdm_export.errors import InputError
from lfdm_export.web.app import WebOptions
from lfdm_export.web.guard import Guard
from lfdm_export.web.page.makers import Maker
from lfdm_export.web.page.markup import CLIPS
from lfdm_export.web.page.shelf import Shelf
from lfdm_export.web.page.studio import Studio

_API = ("/v1", "/health", "/openapi.json")
# Most bytes of a request beside the uploaded file.
_AROUND = 1 << 16
#: Nothing from other hosts. Gradio has scripts and styles inside the page.
_POLICY = "; ".join(
    (
        "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval'", "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:", "media-src 'self' data: blob:", "font-src 'self' data:",
        "connect-src 'self' data: blob:", "worker-src 'self' blob:", "object-src 'none'", "base-uri 'self'",
        "form-action 'self'", "frame-ancestors 'self'",
    )
)  # fmt: skip


def make_site(maker: Maker, options: WebOptions, *, api: FastAPI | None, here: bool) -> FastAPI:
    """Create the page, and the API below its own paths.

    Uploads and clips are kept in a temporary folder until the server ends.

    Args:
        maker: makes the clips.
        options: limits and the token, which the browser requests as a password, with any user name.
        api: the video API; None for the page alone.
        here: answer only to names of this machine, so that a foreign page cannot reach it by DNS rebinding.
    """
    folder = tempfile.TemporaryDirectory(prefix="lfdm-web-")
    root = Path(folder.name)
    for name in (CLIPS, "uploads", "examples"):
        (root / name).mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")  # read when Gradio is imported
    import gradio

    _fetch_nothing()
    from lfdm_export.web.page.layout import NAMES, STYLE, build, theme

    studio = Studio(maker, Shelf(root / CLIPS), root / "uploads", options.image_pixels)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as ending:  # ends the last one first
            ending.callback(folder.cleanup)
            if api is not None:
                await ending.enter_async_context(api.router.lifespan_context(api))
            ending.push_async_callback(run_in_threadpool, studio.close)
            yield

    site = FastAPI(lifespan=life, openapi_url=None)
    site.mount(f"/{CLIPS}", StaticFiles(directory=root / CLIPS))
    page = build(studio, root / "examples")
    gradio.mount_gradio_app(
        site, page, "/", footer_links=[], run_history=False, max_file_size=options.body_bytes, ssr_mode=False,
        pwa=False, theme=theme(), css_paths=STYLE, js=NAMES, show_error=True, enable_monitoring=False,
    )  # fmt: skip
    page.has_launched = True  # otherwise Gradio accepts any file of this machine as an upload
    site.add_middleware(_Gate, api=api, options=options)
    site.add_middleware(Guard, here=here)
    return site


def _fetch_nothing() -> None:
    """Replace Gradio's function for downloads, which would fetch any address in a request."""
    from gradio import processing_utils

    async def refuse(url: str) -> NoReturn:
        raise InputError(
            f"a file is given as an address, {url[:80]!r}, which this page does not fetch; upload the file itself"
        )

    assert callable(processing_utils.async_ssrf_protected_get), "Gradio has no function of this name for its downloads"
    processing_utils.async_ssrf_protected_get = refuse


class _Gate:
    """Passes requests for the API on unchanged, and checks all others."""

    def __init__(self, app: ASGIApp, api: ASGIApp | None, options: WebOptions) -> None:
        self._app, self._api, self._token = app, api, options.token
        self._most = options.body_bytes + _AROUND

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"]
        if self._api is not None and any(path == name or path.startswith(name + "/") for name in _API):
            return await self._api(scope, receive, send)
        refused = self._refused(scope, Headers(scope=scope))
        if refused is not None:
            return await refused(scope, receive, send)

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"], headers["X-Content-Type-Options"] = _POLICY, "nosniff"
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        return await self._app(scope, receive, guarded)

    def _refused(self, scope: Scope, headers: Headers) -> PlainTextResponse | None:
        """The answer to a request that is refused; None if it is served."""
        length = headers.get("Content-Length", "0")
        if "Transfer-Encoding" in headers or not length.isdecimal() or int(length) > self._most:
            return PlainTextResponse(f"a request has at most {self._most:,} bytes, and must state its length", 413)
        if "/file=http" in scope["path"] or "/proxy=" in scope["path"]:
            return PlainTextResponse("this page fetches nothing from other hosts", 403)
        if self._token is not None and not _knows(headers.get("Authorization", ""), self._token):
            return PlainTextResponse(
                "the token is missing or wrong; enter it as the password",
                401,
                {"WWW-Authenticate": 'Basic realm="lfdm-web", charset="UTF-8"'},
            )
        return None


def _knows(given: str, token: str) -> bool:
    """Whether an Authorization header has the token, as a bearer token or as a password."""
    kind, _, value = given.partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    return kind.lower() in ("basic", "bearer") and hmac.compare_digest(value.encode(), token.encode())
