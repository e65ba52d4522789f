"""The page as a web application, beside the video API or alone: who may come in, and what a browser may load."""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lfdm_export.errors import InputError
from lfdm_export.web.app import WebOptions
from lfdm_export.web.page.makers import Maker
from lfdm_export.web.page.markup import CLIPS
from lfdm_export.web.page.shelf import Shelf
from lfdm_export.web.page.studio import Studio

_API = ("/v1", "/health", "/openapi.json")
#: Names under which a browser of this machine finds it.
_HERE = ("localhost", "127.0.0.1", "[::1]")
# Bytes around an uploaded file in its request.
_AROUND = 1 << 16
#: Nothing from elsewhere. Gradio's own scripts and styles stand in the page.
_POLICY = "; ".join(
    (
        "default-src 'self'", "script-src 'self' 'unsafe-inline' 'unsafe-eval'", "style-src 'self' 'unsafe-inline'",
        "img-src 'self' data: blob:", "media-src 'self' data: blob:", "font-src 'self' data:",
        "connect-src 'self' data: blob:", "worker-src 'self' blob:", "object-src 'none'", "base-uri 'self'",
        "form-action 'self'", "frame-ancestors 'self'",
    )
)  # fmt: skip


def make_site(maker: Maker, options: WebOptions, *, api: FastAPI | None, here: bool) -> FastAPI:
    """The page, and the API under its own paths.

    What visitors upload and what is made for them lies in a folder of its own until the server ends.

    Args:
        maker: makes the clips.
        options: limits and the token, which a browser asks for as a password, of any name.
        api: the video API, if there is one.
        here: answer only to names of this machine, so that no page from elsewhere gets in by a name of its own.
    """
    folder = tempfile.TemporaryDirectory(prefix="lfdm-web-")
    root = Path(folder.name)
    for name in (CLIPS, "uploads", "examples"):
        (root / name).mkdir()
    os.environ["GRADIO_TEMP_DIR"] = str(root / "uploads")  # read when it is imported
    import gradio

    _fetch_nothing()
    from lfdm_export.web.page.layout import NAMES, STYLE, build, theme

    studio = Studio(maker, Shelf(root / CLIPS), root / "uploads", options.image_pixels)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as ending:  # from the last to the first
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
    page.has_launched = True  # else Gradio takes any file of this machine for an uploaded one
    site.add_middleware(_Gate, api=api, options=options, here=here)
    return site


def _fetch_nothing() -> None:
    """Have Gradio fetch nothing: it would download whatever a request names by its address."""
    from gradio import processing_utils

    async def refuse(_: str) -> None:
        raise InputError("a file is an address, which this page does not fetch; choose the file itself")

    assert callable(processing_utils.async_ssrf_protected_get), "all of Gradio's downloads go through it"
    processing_utils.async_ssrf_protected_get = refuse


class _Gate:
    """Sends requests for the API on as they are; others are looked at."""

    def __init__(self, app: ASGIApp, api: ASGIApp | None, options: WebOptions, here: bool) -> None:
        self._app, self._api, self._token, self._here = app, api, options.token, here
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
        """Why a request is not served, if it is not."""
        host = headers.get("Host", "")
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() else host
        if self._here and name not in _HERE:
            return PlainTextResponse(f"this page answers to {', '.join(_HERE)} only", 421)
        if scope["method"] not in ("GET", "HEAD") and headers.get("Sec-Fetch-Site") in ("cross-site", "same-site"):
            return PlainTextResponse("pages from elsewhere may not use this one", 403)
        length = headers.get("Content-Length", "0")
        if "Transfer-Encoding" in headers or not length.isdecimal() or int(length) > self._most:
            return PlainTextResponse(f"a request has at most {self._most:,} bytes, and says how many", 413)
        if "/file=http" in scope["path"] or "/proxy=" in scope["path"]:
            return PlainTextResponse("this page fetches nothing from elsewhere", 403)
        if self._token is not None and not _knows(headers.get("Authorization", ""), self._token):
            return PlainTextResponse(
                "the token is missing or wrong; give it as the password",
                401,
                {"WWW-Authenticate": 'Basic realm="lfdm-web", charset="UTF-8"'},
            )
        return None


def _knows(given: str, token: str) -> bool:
    """Whether a header carries the token: as a bearer's, or as the password that a browser asked for."""
    kind, _, value = given.partition(" ")
    if kind.lower() == "basic":
        try:
            value = base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return False
    return kind.lower() in ("basic", "bearer") and hmac.compare_digest(value.encode(), token.encode())
