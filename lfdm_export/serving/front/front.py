"""The front of one server, on its own thread with its own event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, TypeVar

import aiohttp
from aiohttp import web

from lfdm_export.client.settings import import_protocol
from lfdm_export.protocol.contract import CLIP_MODEL, MOTION_MODELS, PREPROCESS_MODEL, STREAM_MODEL
from lfdm_export.serving.front.access import Access
from lfdm_export.serving.front.checks import models_of
from lfdm_export.serving.front.http_server import HttpServer
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.memory import give_back, map_large_blocks
from lfdm_export.serving.front.over_grpc import start_grpc
from lfdm_export.serving.front.over_http import HttpDoor
from lfdm_export.serving.front.service import Service
from lfdm_export.serving.front.triton import Triton
from lfdm_export.serving.server.options import ServerOptions
from lfdm_export.serving.server.sockets import Sockets
from lfdm_export.serving.triton.settings import ServingSettings

_T = TypeVar("_T")
#: Timeout in seconds of short operations.
_PATIENCE = 30.0
#: Requests allowed in flight beyond those that the sampler accepts: being prepared, or decoded.
_ON_THE_WAY = 16
_METRICS_TYPE = "text/plain; charset=utf-8"


class Front:
    """Listens on the public ports, and forwards checked requests. Call its methods from any thread but its own."""

    def __init__(self, options: ServerOptions, access: Access) -> None:
        """Prepare; `attach` listens.

        Args:
            options: the server's options, with ports.
            access: the token and TLS files.
        """
        self._options, self._access = options, access
        self._service: Service | None = None
        self._metrics: aiohttp.ClientSession | None = None
        self._http: list[HttpServer] = []
        self._grpc: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="lfdm-front", daemon=True)
        map_large_blocks()
        self._thread.start()

    def attach(self, sockets: Sockets) -> None:
        """Forward requests to a ready server; the first time, query its models, and listen.

        Raises:
            LfdmExportError: the server does not answer, or a file for TLS cannot be used.
            OSError, RuntimeError: a port is taken.
        """
        self._do(self._attach(sockets))

    def detach(self) -> int:
        """Stop forwarding: the server has ended. Requests in flight get an error; returns how many."""
        return self._do(self._detach()) or 0

    def lose(self, model: str) -> int:
        """The process of a model has died: requests that it may have had get an error; returns how many."""

        async def lose() -> int:
            return 0 if self._service is None else self._service.lose(model)

        return self._do(lose()) or 0

    def drain(self, seconds: float) -> bool:
        """Accept no more requests, wait for those in flight, and return whether all ended before `close`."""

        async def drain() -> bool:
            return self._service is None or await self._service.flights.drain(seconds)

        return self._do(drain(), seconds + _PATIENCE) is not False

    def close(self) -> None:
        """End all connections and the thread; requests in flight get an error."""
        if self._thread.is_alive():
            self._do(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(_PATIENCE)

    # --- On the thread ----------------------------------------------------------------------------

    def _do(self, work: Coroutine[Any, Any, _T], seconds: float = _PATIENCE) -> _T | None:
        """The result of the work; None if the front is closed first."""
        if not self._thread.is_alive():
            work.close()
            return None
        try:
            return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)
        except CancelledError:
            return None

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    async def _attach(self, sockets: Sockets) -> None:
        if self._service is None:
            service = await self._describe(sockets.grpc_target)
            await self._listen(service)
            self._service = service
            service.spawn(give_back(lambda: service.flights.ever_held))
        self._metrics = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(str(sockets.metrics)), timeout=aiohttp.ClientTimeout(total=10)
        )
        await self._service.attach(sockets.grpc_target)

    async def _describe(self, target: str) -> Service:
        """The service, with the models that the server reports."""
        messages, _ = import_protocol()
        triton = Triton(target)
        try:
            metadata = [
                await triton.ask("ModelMetadata", messages.ModelMetadataRequest(name=name))
                for name in (CLIP_MODEL, STREAM_MODEL, *MOTION_MODELS)
            ]
            config = (await triton.ask("ModelConfig", messages.ModelConfigRequest(name=PREPROCESS_MODEL))).config
        finally:
            await triton.close()
        settings = ServingSettings.from_parameters(
            {name: value.string_value for name, value in config.parameters.items()}
        )
        limits = FrontLimits(settings.limits, in_flight=settings.slots + settings.queue_limit + _ON_THE_WAY)
        return Service(self._access, limits, models_of(metadata, settings.limits))

    async def _listen(self, service: Service) -> None:
        options, context = self._options, self._access.ssl_context()
        requests, metrics = HttpServer(HttpDoor(service).answer, service.limits), HttpServer(self._page, service.limits)
        self._http = [requests, metrics]
        await requests.listen(options.host, options.http_port, context)
        await metrics.listen(options.host, options.metrics_port, None)
        host = f"[{options.host}]" if ":" in options.host else options.host
        self._grpc = await start_grpc(service, f"{host}:{options.grpc_port}")

    async def _page(self, request: web.BaseRequest) -> web.StreamResponse:
        """The metrics page."""
        if request.path != "/metrics" or request.method not in ("GET", "HEAD"):
            return web.Response(status=404)
        try:
            if self._metrics is None:
                raise ConnectionError
            async with self._metrics.get("http://triton/metrics") as answer:
                return web.Response(body=await answer.read(), headers={"Content-Type": _METRICS_TYPE})
        except (aiohttp.ClientError, OSError, asyncio.TimeoutError):
            return web.Response(status=503)

    async def _detach(self) -> int:
        metrics, self._metrics = self._metrics, None
        if metrics is not None:
            await metrics.close()
        return 0 if self._service is None else await self._service.detach()

    async def _close(self) -> None:
        await self._detach()
        for server in self._http:
            await server.close()
        if self._grpc is not None:
            await self._grpc.stop(1.0)
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
