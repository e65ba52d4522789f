"""The front's two endpoints in this process, with a fake server that makes clips by simple arithmetic."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Coroutine
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc

from lfdm_export.client.wire import infer_request
from lfdm_export.protocol.contract import CLIP_INPUTS, CLIP_MODEL, CLIP_OUTPUTS, STREAM_INPUTS, STREAM_MODEL, WireTensor
from lfdm_export.protocol.requests import Limits
from lfdm_export.serving.front.access import Access
from lfdm_export.serving.front.checks import models_of
from lfdm_export.serving.front.http_server import HttpServer
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.over_grpc import start_grpc
from lfdm_export.serving.front.over_http import HttpDoor
from lfdm_export.serving.front.service import Service
from lfdm_export.serving.server.ports import check_ports
from tests.fake_triton import FACTS, FakeTriton, Serving
from tests.running_server import DEADLINE, DIRECT

PIXELS = np.arange(16 * 16 * 3, dtype=np.uint8).reshape(16, 16, 3)


def metadata(name: str, inputs: tuple[WireTensor, ...]) -> Any:
    """Triton's metadata of a model."""
    found = messages.ModelMetadataResponse(name=name)
    for spec in inputs:
        shape = [FACTS.text_width if axis == "text_width" else axis for axis in spec.shape]
        found.inputs.add(
            name=spec.name, datatype=spec.datatype, shape=[-1 if isinstance(axis, str) else axis for axis in shape]
        )
    for spec in CLIP_OUTPUTS:
        found.outputs.add(name=spec.name, datatype=spec.datatype)
    return found


MODELS = models_of([metadata(CLIP_MODEL, CLIP_INPUTS), metadata(STREAM_MODEL, STREAM_INPUTS)], Limits())


def clip_request(request_id: str = "", **values: Any) -> Any:
    """A request that the fake server answers."""
    label = np.array([b"Anger"], np.object_)
    tensors = {"image": PIXELS, "label": label, **values}
    return infer_request(CLIP_MODEL, CLIP_INPUTS, tensors, outputs=("frames",), request_id=request_id)


def json_request() -> bytes:
    """The same in JSON."""
    inputs = [
        {"name": "image", "datatype": "UINT8", "shape": [16, 16, 3], "data": PIXELS.ravel().tolist()},
        {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["Anger"]},
    ]
    return json.dumps({"inputs": inputs, "outputs": [{"name": "frames"}]}).encode()


class Doors:
    """The endpoints, open inside the context."""

    def __init__(
        self,
        fake: FakeTriton,
        limits: FrontLimits | None = None,
        token: bytes | None = None,
        access: Access | None = None,
    ) -> None:
        self.limits = limits or FrontLimits(Limits())
        self._access = access or Access(token)
        ports = check_ports("127.0.0.1", {"http": 0, "grpc": 0})
        self.http, self.grpc = ports["http"], f"127.0.0.1:{ports['grpc']}"
        self._triton = Serving(fake)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Doors:
        self._thread.start()
        self.do(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self.do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._triton.stop()

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run work on the endpoints' event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(DEADLINE)

    def stub(self) -> Any:
        """A new gRPC client."""
        options = [*DIRECT, ("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        return service_pb2_grpc.GRPCInferenceServiceStub(self.channel(options))

    def channel(self, options: Any = DIRECT) -> Any:
        """A new connection."""
        return grpc.insecure_channel(self.grpc, options)

    def connect(self) -> socket.socket:
        """A connection to the HTTP endpoint."""
        return socket.create_connection(("127.0.0.1", self.http), timeout=DEADLINE)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
        """Status and answer over HTTP, parsed if it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.http, timeout=DEADLINE)
        try:
            connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            answer = connection.getresponse()
            content = answer.read()
            return answer.status, json.loads(content) if content[:1] == b"{" else content
        finally:
            connection.close()

    def infer(self, body: bytes, **headers: str) -> tuple[int, Any]:
        """A request for a clip."""
        return self.ask("POST", f"/v2/models/{CLIP_MODEL}/infer", body, **headers)

    async def _open(self) -> None:
        self.service = Service(self._access, self.limits, MODELS)
        self.http_server = HttpServer(HttpDoor(self.service).answer, self.limits)
        await self.http_server.listen("127.0.0.1", self.http, self._access.ssl_context())
        self._grpc = await start_grpc(self.service, self.grpc)
        await self.service.attach(self._triton.address)

    async def _close(self) -> None:
        await self.service.detach()
        await self.http_server.close()
        await self._grpc.stop(0)
