"""The HTTP endpoint: Triton's paths, answered over gRPC by the server behind the front."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import zlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from lfdm_export.client.settings import import_protocol
from lfdm_export.serving.front.http_body import read_body
from lfdm_export.serving.front.http_server import SERVER
from lfdm_export.serving.front.json_answers import infer_answer, plain
from lfdm_export.serving.front.json_requests import read_request
from lfdm_export.serving.front.refusal import RefusedError, forget
from lfdm_export.serving.front.service import Service

logger = logging.getLogger(__name__)

_MODEL = re.compile(
    r"/v2/models/(?P<name>[^/]+)(?:/versions/(?P<version>[^/]+))?(?:/(?P<what>config|ready|stats|infer))?"
)
#: Paths that only `lfdm-serve` itself may use.
_RESTRICTED = re.compile(r"/v2/(repository|systemsharedmemory|cudasharedmemory|trace|logging)(/|$)|.*/trace/")
#: Paths of health probes, which send no token.
_PROBES = re.compile(r"/v2/health/(live|ready)|/v2/models/[^/]+(/versions/[^/]+)?/ready")
_HEAD_LENGTH = "Inference-Header-Content-Length"
_JSON = "application/json"
#: Bytes of an answer written to the connection at a time.
_PIECE = 256 << 10


class HttpDoor:
    """Answers requests."""

    def __init__(self, service: Service) -> None:
        """Use `lfdm_export.serving.front.http_server.start_http`."""
        self._service = service
        # JSON is parsed or written for one body at a time: both take memory and block the interpreter.
        self._converting = asyncio.Semaphore(1)

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer or refuse a request."""
        try:
            path = unquote(request.path, errors="replace")
            if not (request.method == "GET" and _PROBES.fullmatch(path)):
                self._service.access.check(request.headers.get("Authorization"))
            return await self._route(request, path)
        except RefusedError as refused:
            forget(refused)
            return _refusal(refused)
        except ConnectionError as lost:  # the client is gone
            forget(lost)
            return _refusal(RefusedError("CANCELLED", "the connection was lost", closes=True))
        except asyncio.CancelledError as cancelled:
            forget(cancelled)
            raise
        except Exception as error:
            logger.exception("a request of %s failed", ascii(request.path[:200]))
            forget(error)
            return _refusal(RefusedError("INTERNAL", "a fault of the server: see its log"))

    async def _route(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        if _RESTRICTED.match(path):
            raise RefusedError(
                "PERMISSION_DENIED",
                "this path is restricted: models, shared memory, traces and logs of this server are lfdm-serve's alone",
                closes=request.body_exists,
            )
        match = _MODEL.fullmatch(path)
        if match is not None and match["what"] == "infer":
            _require(request, "POST")
            return await self._infer(request, match["name"], match["version"] or "")
        paths: dict[str, Callable[[], Awaitable[web.StreamResponse]]] = {
            "/v2": self._metadata,
            "/v2/health/live": self._live,
            "/v2/health/ready": self._ready,
            "/v2/models/stats": partial(self._stats, "", ""),
        }
        found = paths.get(path.rstrip("/"))
        if found is None and match is not None:
            about: dict[str | None, Callable[[str, str], Awaitable[web.StreamResponse]]] = {
                "config": self._config,
                "ready": self._model_ready,
                "stats": self._stats,
                None: self._model,
            }
            found = partial(about[match["what"]], match["name"], match["version"] or "")
        if found is None:
            raise RefusedError("NOT_FOUND", "Not Found", closes=request.body_exists)
        _require(request, "GET")
        return await found()

    # --- Status and metadata ----------------------------------------------------------------------

    async def _live(self) -> web.StreamResponse:
        return web.Response()  # the front is live; a server behind it that has ended is restarted

    async def _ready(self) -> web.StreamResponse:
        messages, _ = import_protocol()
        return await self._is_ready("ServerReady", messages.ServerReadyRequest())

    async def _model_ready(self, name: str, version: str) -> web.StreamResponse:
        messages, _ = import_protocol()
        return await self._is_ready("ModelReady", messages.ModelReadyRequest(name=name, version=version))

    async def _is_ready(self, method: str, question: Any) -> web.StreamResponse:
        ready = False
        if self._service.open:
            try:
                ready = (await self._service.triton.ask(method, question)).ready
            except RefusedError as refused:
                if refused.code != "UNAVAILABLE":
                    raise
        return web.Response(status=200 if ready else 400)

    async def _metadata(self) -> web.StreamResponse:
        messages, _ = import_protocol()
        return _shown(await self._service.triton.ask("ServerMetadata", messages.ServerMetadataRequest()))

    async def _model(self, name: str, version: str) -> web.StreamResponse:
        messages, _ = import_protocol()
        question = messages.ModelMetadataRequest(name=name, version=version)
        return _shown(await self._service.triton.ask("ModelMetadata", question))

    async def _config(self, name: str, version: str) -> web.StreamResponse:
        messages, _ = import_protocol()
        question = messages.ModelConfigRequest(name=name, version=version)
        return _shown((await self._service.triton.ask("ModelConfig", question)).config)

    async def _stats(self, name: str, version: str) -> web.StreamResponse:
        messages, _ = import_protocol()
        question = messages.ModelStatisticsRequest(name=name, version=version)
        return _shown(await self._service.triton.ask("ModelStatistics", question))

    # --- Inference --------------------------------------------------------------------------------

    async def _infer(self, request: web.BaseRequest, name: str, version: str) -> web.StreamResponse:
        service, (messages, _) = self._service, import_protocol()
        head_length = _head_length(request)
        with service.flights.holding() as hold:
            body = await read_body(request, service.limits, hold)
            async with self._converting:
                parsed = await asyncio.to_thread(
                    read_request, service.models, name, version, body, head_length, service.limits
                )
            del body
            await service.check(parsed.message)
            message = parsed.message.SerializeToString()
            request_id = parsed.message.id
            parsed.message.Clear()  # another copy of the picture
            answer = await service.infer(name, request_id, message, None)
            del message
        async with self._converting:
            response = messages.ModelInferResponse.FromString(answer)
            pieces, length = await asyncio.to_thread(infer_answer, response, parsed)
        return await self._send(request, pieces, length)

    async def _send(self, request: web.BaseRequest, pieces: list[bytes], head_length: int | None) -> web.StreamResponse:
        headers = {"Content-Type": _JSON if head_length is None else "application/octet-stream", "Server": SERVER}
        if head_length is not None:
            headers[_HEAD_LENGTH] = str(head_length)
        coding = _accepted_coding(request)
        if coding is not None:
            pieces = [await asyncio.to_thread(_compressed, pieces, coding)]
            headers["Content-Encoding"] = coding
        response = web.StreamResponse(headers=headers)
        response.content_length = sum(map(len, pieces))
        try:
            await response.prepare(request)
            for piece in _cut(pieces):
                await asyncio.wait_for(response.write(piece), self._service.limits.write_seconds)
            await response.write_eof()
        except asyncio.TimeoutError:
            if request.transport is not None:
                request.transport.abort()  # half of the answer is sent: no error can follow
        return response


def _cut(pieces: list[bytes]) -> Iterable[bytes]:
    """Pieces small enough for a slow client to read in time; small ones are joined."""
    small = bytearray()
    for piece in pieces:
        if len(piece) < _PIECE:
            small += piece
            if len(small) < _PIECE:
                continue
            piece = bytes(small)
            small.clear()
        elif small:
            yield bytes(small)
            small.clear()
        for start in range(0, len(piece), _PIECE):
            yield piece[start : start + _PIECE]
    if small:
        yield bytes(small)


def _require(request: web.BaseRequest, method: str) -> None:
    if request.method != method and (request.method, method) != ("HEAD", "GET"):
        raise RefusedError("INVALID_ARGUMENT", "Method Not Allowed", http_status=405, closes=request.body_exists)


def _head_length(request: web.BaseRequest) -> int | None:
    given = request.headers.get(_HEAD_LENGTH)
    if given is None:
        return None
    if not re.fullmatch(r"\d{1,12}", given, re.ASCII):
        raise RefusedError(
            "INVALID_ARGUMENT",
            f"{_HEAD_LENGTH} is {given[:32]!r}, expected a number of bytes",
            closes=request.body_exists,
        )
    return int(given)


def _accepted_coding(request: web.BaseRequest) -> str | None:
    """The content coding that the client accepts for the answer; None for none."""
    accepted = [one.partition(";") for one in request.headers.get("Accept-Encoding", "").lower().split(",")]
    names = {name.strip() for name, _, quality in accepted if quality.replace(" ", "") not in ("q=0", "q=0.0")}
    return next((coding for coding in ("gzip", "deflate") if coding in names), None)


def _compressed(pieces: list[bytes], coding: str) -> bytes:
    stream = zlib.compressobj(1, wbits=(16 if coding == "gzip" else 0) + zlib.MAX_WBITS)
    return b"".join([*map(stream.compress, pieces), stream.flush()])


def _shown(message: Any) -> web.Response:
    return web.Response(text=json.dumps(plain(message)), content_type=_JSON)


def _refusal(refused: RefusedError) -> web.Response:
    """An error in Triton's form."""
    response = web.Response(status=refused.http_status, text=json.dumps({"error": str(refused)}), content_type=_JSON)
    if refused.code == "UNAUTHENTICATED":
        response.headers["WWW-Authenticate"] = "Bearer"
    if refused.closes:
        response.force_close()
    return response
