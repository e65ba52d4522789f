"""The routes of ``/v1/videos``: create, poll, download, list, cancel, delete."""

from __future__ import annotations

import hmac
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from lfdm_export import __version__
from lfdm_export.errors import InputError
from lfdm_export.files.names import visible
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.web.description import answers, describe
from lfdm_export.web.store import Store, Video
from lfdm_export.web.turns import Turns
from lfdm_export.web.video_request import OPTIONS, VideoRequest, model_of, photo_of_json, read_photo, read_video_request
from lfdm_export.web.worker import Worker

logger = logging.getLogger(__name__)

#: Formats of a sent clip; the first is the default.
_TYPES = {"video/mp4": "mp4", "image/gif": "gif"}
_MOST_LISTED = 100
#: Values in the JSON of a request, and characters of a sentence: it may quote the request.
_MOST_VALUES, _LONGEST_SENTENCE = 1000, 1000


@dataclass(frozen=True)
class WebOptions:
    """The limits of the server, and its token.

    Attributes:
        token: the token that requests must send (``Authorization: Bearer …``); None if none is required.
        queue: most requests that may be queued or running.
        body_bytes: most bytes of a request.
        image_pixels: most pixels of a photograph, checked before it is decoded.
    """

    token: str | None = None
    queue: int = 32
    body_bytes: int = 20 << 20
    image_pixels: int = 40_000_000


class _ApiError(Exception):
    """An error response."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


def make_app(
    pipeline: Pipeline, store: Store, options: WebOptions | None = None, turns: Turns | None = None
) -> FastAPI:
    """Create the application. Its worker runs as long as the server.

    Args:
        pipeline: makes the videos.
        store: keeps the videos; closed when the server ends.
        options: the limits and the token.
        turns: the queue of all users of the pipeline; None if there are no others.
    """
    videos = _Videos(pipeline, store, options or WebOptions(), turns)
    # Without FastAPI's pages of documentation, which load scripts from other hosts. /openapi.json has the description.
    app = FastAPI(title="lfdm-export", version=__version__, lifespan=videos.life, docs_url=None, redoc_url=None)
    for kind in (_ApiError, InputError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _answer_error)
    app.middleware("http")(videos.guard)
    guarded = () if videos.options.token is None else (401,)
    one, add = "/v1/videos/{name}", app.add_api_route
    add("/health", videos.health, responses=answers("facts"))
    add("/v1/models", videos.models, responses=answers("facts", *guarded))
    add("/v1/videos", videos.create, methods=["POST"], responses=answers("video", 400, *guarded, 413, 429))
    add("/v1/videos", videos.listing, responses=answers("page", 400, *guarded))
    add(one, videos.retrieve, responses=answers("video", *guarded, 404))
    add(one, videos.delete, methods=["DELETE"], responses=answers("deleted", *guarded, 404))
    clip = answers("clip", *guarded, 404, 406, 409)
    add(f"{one}/content", videos.content, response_class=FileResponse, responses=clip)
    add(f"{one}/cancel", videos.cancel, methods=["POST"], responses=answers("video", *guarded, 404, 409))
    describe(app, with_token=bool(guarded))
    return app


class _Videos:
    """The handlers of the routes."""

    def __init__(self, pipeline: Pipeline, store: Store, options: WebOptions, turns: Turns | None) -> None:
        self._pipeline, self._store, self.options, self._turns = pipeline, store, options, turns
        self._bundle = pipeline.bundle
        self._worker: Worker | None = None

    @asynccontextmanager
    async def life(self, _: FastAPI) -> AsyncIterator[None]:
        """Start the worker with the server, and stop it at the end."""
        worker = self._worker = Worker(self._store, self._pipeline, self._turns)
        yield
        await run_in_threadpool(worker.stop)
        self._store.close()

    async def guard(self, request: Request, follow: Callable[[Request], Awaitable[Response]]) -> Response:
        """Refuse requests to the API without the token."""
        token, given = self.options.token, request.headers.get("Authorization", "").encode()
        known = token is None or hmac.compare_digest(given, f"Bearer {token}".encode())
        if request.url.path.startswith("/v1/") and not known:
            return error_answer(401, "the token is missing or wrong; send it as Authorization: Bearer TOKEN")
        return await follow(request)

    def health(self) -> dict[str, str]:
        """Report that the server is up."""
        return {"status": "ok"}

    def models(self) -> dict[str, object]:
        """List the model and its labels."""
        facts = {"id": self._bundle.name, "object": "model", "created": 0, "owned_by": "lfdm-export"}
        return {"object": "list", "data": [{**facts, "labels": self._bundle.labels}]}

    async def create(self, request: Request) -> dict[str, object]:
        """Queue a video from prompt (a label or a text) and input_reference (the photograph), as a form or JSON."""
        fields, data = await _read_request(request, self.options.body_bytes)

        def check() -> Video | None:
            wanted = read_video_request(fields, self._pipeline)
            photo = read_photo(data, fields.get("crop"), self._bundle, most_pixels=self.options.image_pixels)
            return self._store.add({**wanted.to_json(), **model_of(self._bundle)}, photo, self.options.queue)

        video = await run_in_threadpool(check)
        if video is None:
            message = f"{self.options.queue} videos are queued already; try again later"
            raise _ApiError(429, message, {"Retry-After": "10"})
        assert self._worker is not None
        self._worker.wake()
        return _plain(video)

    def listing(self, limit: int = 20, after: str | None = None, order: str = "desc") -> dict[str, object]:
        """List the videos, the newest first unless order is asc."""
        if order not in ("asc", "desc") or not 1 <= limit <= _MOST_LISTED:
            raise InputError(f"expected order asc or desc, and a limit of 1 to {_MOST_LISTED}")
        videos, more = self._store.page(limit=limit, after=after, newest_first=order == "desc")
        first, last = (videos[0].id, videos[-1].id) if videos else (None, None)
        found = [_plain(video) for video in videos]
        return {"object": "list", "data": found, "has_more": more, "first_id": first, "last_id": last}

    def retrieve(self, name: str) -> dict[str, object]:
        """Report the status of a video."""
        return _plain(self._known(name))

    def content(self, name: str, request: Request) -> FileResponse:
        """Send a completed video as MP4, or as GIF if Accept says image/gif."""
        video = self._known(name)
        if video.status != "completed":
            because = "" if video.error is None else f": {video.error}"
            raise _ApiError(409, f"the video is {video.status}, not completed{because}")
        kind = _accepted(request.headers.get("Accept", "*/*"))
        path = self._store.clip(video.id, _TYPES[kind])
        if not path.is_file():
            raise _ApiError(404, "the file of the video was removed; request the video again")
        return FileResponse(path, media_type=kind, filename=path.name)

    def cancel(self, name: str) -> dict[str, object]:
        """Cancel a video that is queued or running."""
        video = self._known(name)
        if not self._give_up(video):
            raise _ApiError(409, f"the video is already {self._known(name).status}")
        return _plain(self._known(name))

    def delete(self, name: str) -> dict[str, object]:
        """Remove a video and its files. If it is queued or running, it is cancelled first."""
        video = self._known(name)
        self._give_up(video)
        self._store.remove(video.id)
        return {"id": video.id, "object": "video.deleted", "deleted": True}

    def _give_up(self, video: Video) -> bool:
        running = video.status == "in_progress"
        ended = self._store.end(video.id, "cancelled")
        assert self._worker is not None
        if ended and running:
            self._worker.give_up(video.id)
        return ended

    def _known(self, name: str) -> Video:
        video = self._store.get(name)
        if video is None:
            raise _ApiError(404, f"there is no video {name[:80]!r}")
        return video


async def _read_request(request: Request, most: int) -> tuple[dict[str, Any], bytes]:
    """Read the fields and the photograph from a form or a JSON object of limited size.

    Raises:
        InputError: the request is neither a form nor a JSON object, or has no photograph.
        _ApiError: it is too large.
    """
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise _ApiError(413, f"the request has more than {most:,} bytes; send a smaller picture")
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    async def again() -> dict[str, object]:
        return {"type": "http.request", "body": bytes(body), "more_body": False}

    request = Request(request.scope, again)
    if kind == "multipart/form-data":
        async with request.form(max_files=1, max_fields=40) as form:
            fields: dict[str, Any] = {name: value for name, value in form.items() if isinstance(value, str)}
            upload = form.get("input_reference")
            if not isinstance(upload, UploadFile):
                raise InputError("input_reference is missing: send the photograph as a file")
            return fields, await upload.read()
    if sum(map(body.count, (b",", b"[", b"{"))) > _MOST_VALUES:  # they would take a hundred times the body's memory
        raise InputError(f"the request has more than {_MOST_VALUES:,} values in JSON; send the fields of a video")
    try:
        plain = await request.json()
    except (ValueError, RecursionError) as error:
        raise InputError("the request is neither a form (multipart/form-data) nor JSON") from error
    if not isinstance(plain, dict):
        raise InputError(f"the request is a JSON {type(plain).__name__}, expected an object")
    return plain, photo_of_json(plain.get("input_reference"))


def _plain(video: Video) -> dict[str, object]:
    """A video as JSON, with the fields of OpenAI's interface."""
    wanted = VideoRequest.of(video.request)
    options = wanted.to_json()
    frames, size = (int(str(video.request[name])) for name in ("frames", "size"))
    return {
        "id": video.id,
        "object": "video",
        "model": video.request["model"],
        "status": video.status,
        "progress": video.progress,
        "created_at": video.created_at,
        "completed_at": video.completed_at,
        "expires_at": None,
        "remixed_from_video_id": None,
        "prompt": wanted.prompt,
        "seconds": f"{frames / wanted.fps:g}",
        "size": f"{size}x{size}",
        "error": None if video.error is None else {"code": "failed", "message": video.error},
        "extra": {name: options[name] for name in OPTIONS},
    }


def _accepted(header: str) -> str:
    """The first type in an Accept header that the server can send.

    Raises:
        _ApiError: there is no such type.
    """
    for part in header.split(","):
        kind = part.partition(";")[0].strip().lower()
        if kind in _TYPES:
            return kind
        if kind in ("*/*", "video/*", "application/octet-stream", "application/binary", ""):
            return "video/mp4"
    raise _ApiError(406, f"the video is available as {' and '.join(_TYPES)}, but Accept has neither")


def _answer_error(_: Request, error: Exception) -> JSONResponse:
    if isinstance(error, _ApiError):
        return error_answer(error.status, str(error), error.headers)
    if isinstance(error, HTTPException):
        return error_answer(error.status_code, str(error.detail), error.headers)
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        return error_answer(400, f"{first['loc'][-1]}: {first['msg']}")
    return error_answer(400, str(error))


def error_answer(status: int, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in the form of the API."""
    kind = "server_error" if status >= 500 else "rate_limit_exceeded" if status == 429 else "invalid_request_error"
    sentence = visible(message if len(message) <= _LONGEST_SENTENCE else message[:_LONGEST_SENTENCE] + "…")
    plain = {"error": {"message": sentence, "type": kind, "param": None, "code": None}}
    return JSONResponse(plain, status, {"X-Content-Type-Options": "nosniff", **(headers or {})})
