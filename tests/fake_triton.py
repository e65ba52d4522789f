"""An in-process gRPC server with Triton's protocol: computes clips by simple arithmetic, and fails on demand."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from lfdm_export.client.wire import decode, encode
from lfdm_export.errors import InputError
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_export.protocol.contract import (
    CANCEL_INPUT,
    CANCEL_OUTPUT,
    CLIP_INPUTS,
    CLIP_MODEL,
    CLIP_OUTPUTS,
    SAMPLE_MODEL,
    STREAM_INPUTS,
    STREAM_MODEL,
    STREAM_OUTPUTS,
    Array,
    WireTensor,
)
from lfdm_export.protocol.model_facts import FACTS_PARAMETER, ModelFacts
from lfdm_export.protocol.requests import (
    GenerationRequest,
    Limits,
    check_request,
    parse_condition,
    parse_image,
    parse_sampling,
)
from lfdm_export.sampling.options import DEFAULTS

FACTS = ModelFacts(
    labels=("Anger", "happiness"),
    has_text=True,
    text_width=6,
    frames=5,
    image_size=16,
    latent_size=4,
    residual_flow=False,
    preprocessing=Preprocessing(),
    sampler=replace(DEFAULTS, steps=4),
    precision="fp32",
    trained=False,
)
#: Response instead of a clip: a status and its message.
Refusal = tuple[str, str]


class RefusedError(Exception):
    """A request that the fake must refuse."""

    def __init__(self, code: str, details: str) -> None:
        super().__init__(f"[{code}] {details}")
        self.code, self.details = code, details


def parse_request(tensors: Mapping[str, Array], inputs: tuple[WireTensor, ...]) -> GenerationRequest:
    """Parse a whole request, which the server's models parse in parts."""
    limits = Limits()
    check_request(tensors, inputs)
    image, condition = parse_image(tensors, limits), parse_condition(tensors, limits)
    return replace(
        parse_sampling(tensors, limits),
        image_bytes=image.image_bytes,
        image=image.image,
        label=condition.label,
        text=condition.text,
        text_embedding=condition.text_embedding,
    )


def clip_of(request: GenerationRequest) -> Array:
    """Compute the fake clip, which depends on every field of the request."""
    assert request.image is not None  # encoded pictures are refused
    words = (request.label or request.text or "").encode()
    embedding = 0 if request.text_embedding is None else int(request.text_embedding.sum())
    options = request.options
    sampling = (options.steps or 0) + len(options.sampler or "") + int(10 * (options.eta or 0))
    low, high = options.guidance_interval
    sampling += int(10 * low) + int(10 * (1 - high))
    base = (request.seed or 0) + sum(words) + embedding + sampling + int(10 * (options.guidance_scale or 0))
    frames = np.arange(FACTS.frames, dtype=np.int64)[:, None, None, None] + base + request.image[None]
    return (frames % 256).astype(np.uint8)


@dataclass
class Seen:
    """One received request."""

    model: str
    request_id: str
    tensors: dict[str, Array]
    outputs: tuple[str, ...]
    parameters: dict[str, Any]
    metadata: dict[str, str]
    seconds: float


@dataclass
class FakeTriton(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Responds correctly, except as set by these attributes.

    Attributes:
        refusals: refusals of the next requests for clips, one each.
        gate: event that requests for clips wait for.
        refused_at_once: refusal of the first request, sent when another one has arrived.
        change: applied to the response of each clip.
        break_stream_after: number of responses after which a stream ends with `stream_end`.
        stream_end: a status, or None to end the stream without an error.
        token: requests without this token are refused.
        facts: sent as the model's configuration.
        seen: all requests for clips.
        cancelled: IDs of the cancellations received by the sampler.
        unknown_for: number of cancellations for which the sampler does not know the request yet.
    """

    refusals: list[Refusal] = field(default_factory=list)
    gate: threading.Event = field(default_factory=threading.Event)
    refused_at_once: Refusal | None = None
    change: Callable[[Any], None] | None = None
    break_stream_after: int | None = None
    stream_end: Refusal | None = ("UNAVAILABLE", "Socket closed")
    token: str | None = None
    facts: str = FACTS.to_json()
    ready: bool = True
    seen: list[Seen] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    unknown_for: int = 0
    cut_off: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    # --- What the server is ---

    def ServerLive(self, request: Any, context: Any) -> Any:
        self._check_token(context)
        return service_pb2.ServerLiveResponse(live=True)

    def ServerReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self.ready)

    def ModelReady(self, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=self.ready and request.name == CLIP_MODEL)

    def ServerMetadata(self, request: Any, context: Any) -> Any:
        return service_pb2.ServerMetadataResponse(name="triton", version="2.51.0")

    def ModelConfig(self, request: Any, context: Any) -> Any:
        self._check_token(context)
        if request.name != CLIP_MODEL:
            context.abort(grpc.StatusCode.NOT_FOUND, f"Request for unknown model: '{request.name}' is not found")
        response = service_pb2.ModelConfigResponse()
        response.config.name = CLIP_MODEL
        if self.facts:
            response.config.parameters[FACTS_PARAMETER].string_value = self.facts
        return response

    # --- Clips ---

    def ModelInfer(self, request: Any, context: Any) -> Any:
        self._check_token(context)
        if request.model_name == SAMPLE_MODEL:
            (name,) = request_tensors(request, (CANCEL_INPUT,))[CANCEL_INPUT.name]
            self.cancelled.append(name.decode())
            self.unknown_for -= 1
            known = self.unknown_for < 0 and any(seen.request_id == name.decode() for seen in self.seen)
            return answer(SAMPLE_MODEL, request.id, {CANCEL_OUTPUT.name: np.array([known])}, (CANCEL_OUTPUT,))
        try:
            seen, parsed = self._take(request, context, CLIP_INPUTS)
        except InputError as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"in ensemble 'lfdm', {error}")
        except RefusedError as refused:
            context.abort(grpc.StatusCode[refused.code], refused.details)
        frames = clip_of(parsed)
        small = (3, FACTS.frames, FACTS.latent_size, FACTS.latent_size)
        tensors: dict[str, Array] = {
            "frames": frames,
            "warped": 255 - frames,
            "latent": np.full(small, parsed.seed, np.float32),
            "timings": np.array([0.25, 1.5, parsed.options.steps or 4, 0.5], np.float32),
        }
        response = answer(CLIP_MODEL, request.id, {name: tensors[name] for name in seen.outputs}, CLIP_OUTPUTS)
        if self.change is not None:
            self.change(response)
        return response

    def ModelStreamInfer(self, requests: Iterator[Any], context: Any) -> Iterator[Any]:
        self._check_token(context)
        request = next(requests)
        try:
            parsed = self._take(request, context, STREAM_INPUTS)[1]
        except InputError as error:
            yield service_pb2.ModelStreamInferResponse(error_message=f"[INVALID_ARGUMENT] {error}")
            return
        except RefusedError as refused:  # as in Triton, the stream itself ends without an error
            yield service_pb2.ModelStreamInferResponse(error_message=str(refused))
            return
        for index, tensors in enumerate(stream_tensors(parsed)):
            if index == self.break_stream_after:
                if self.stream_end is not None:
                    context.abort(grpc.StatusCode[self.stream_end[0]], self.stream_end[1])
                return
            response = answer(STREAM_MODEL, request.id, tensors, STREAM_OUTPUTS)
            if self.change is not None:
                self.change(response)
            yield service_pb2.ModelStreamInferResponse(infer_response=response)

    def _take(self, request: Any, context: Any, inputs: tuple[WireTensor, ...]) -> tuple[Seen, GenerationRequest]:
        seen = Seen(
            model=request.model_name,
            request_id=request.id,
            tensors=request_tensors(request, inputs),
            outputs=tuple(output.name for output in request.outputs),
            parameters={name: value.int64_param for name, value in request.parameters.items()},
            metadata=dict(context.invocation_metadata()),
            seconds=context.time_remaining(),
        )
        self.seen.append(seen)
        first = self.seen[0] is seen
        while not self.gate.wait(0.01):
            if self.refused_at_once is not None and first and len(self.seen) > 1:
                raise RefusedError(*self.refused_at_once)
            if not context.is_active():
                self.cut_off += 1
                context.abort(grpc.StatusCode.CANCELLED, "cut off")
        if self.refusals:
            raise RefusedError(*self.refusals.pop(0))
        parsed = parse_request(seen.tensors, inputs)
        if parsed.image is None:
            raise InputError("this server takes pixels only")
        return seen, parsed

    def _check_token(self, context: Any) -> None:
        found = dict(context.invocation_metadata()).get("authorization")
        if self.token is not None and found != f"Bearer {self.token}":
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "Jwt is missing")


def stream_tensors(request: GenerationRequest) -> Iterator[dict[str, Array]]:
    """Yield the responses of a stream: progress, previews, then pairs of frames, of which the last two overlap."""
    frames, total = clip_of(request), request.options.steps or 4
    for step in range(1, total + 1):
        tensors: dict[str, Array] = {
            "kind": text("progress"),
            "step": np.array([step], np.int32),
            "steps": np.array([total], np.int32),
        }
        if request.progress_every and step % request.progress_every == 0:
            yield tensors
        if request.preview_every and step % request.preview_every == 0:
            indices = np.array([0, 2, 4], np.int32)
            shown = 255 - frames[indices] if request.preview_warped else frames[indices]
            yield tensors | {"kind": text("preview"), "frame_indices": indices, "frames": shown}
    wanted = range(FACTS.frames) if request.only_frames is None else request.only_frames
    for start in (0, 2, 3):
        indices = np.array([index for index in (start, start + 1) if index in wanted], np.int32)
        if not indices.size:
            continue
        yield tensors | {"kind": text("frames"), "frame_indices": indices, "frames": frames[indices]}
    timings = np.array([0.25, 1.5, total, 0.5], np.float32)
    used = {"used_seed": np.array([request.seed], np.int64)}
    yield tensors | {"kind": text("done"), "frame_count": np.array([5], np.int32), "timings": timings} | used


def text(value: str) -> Array:
    array = np.empty(1, np.object_)
    array[0] = value.encode()
    return array


def request_tensors(request: Any, inputs: tuple[WireTensor, ...]) -> dict[str, Array]:
    """Return a request's tensors, stored as in responses."""
    as_response = service_pb2.ModelInferResponse(id=request.id, raw_output_contents=request.raw_input_contents)
    for tensor in request.inputs:
        as_response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    return decode(as_response, inputs)


def answer(model: str, request_id: str, tensors: dict[str, Array], outputs: tuple[WireTensor, ...]) -> Any:
    response = service_pb2.ModelInferResponse(model_name=model, id=request_id)
    datatypes = {spec.name: spec.datatype for spec in outputs}
    for name, array in tensors.items():
        response.outputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        response.raw_output_contents.append(encode(array))
    return response


class Port:
    """A reserved local port without a listener: connections are refused, and no other program can use it."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number: int = self._socket.getsockname()[1]
        self.address = f"127.0.0.1:{self.number}"

    def __enter__(self) -> Port:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


class Serving:
    """A fake server on its own port, within a context."""

    def __init__(self, fake: FakeTriton, credentials: Any = None, port: int = 0) -> None:
        """Start serving, on a free port if `port` is 0, else on one reserved by a `Port`."""
        self._pool = ThreadPoolExecutor(24)
        # To share a port reserved by `Port`, both sockets must set this option.
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", int(port != 0))])
        service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(fake, self._server)
        host = "127.0.0.1" if port else "localhost"
        address = f"{host}:{port}"
        if credentials is None:
            self.port = self._server.add_insecure_port(address)
        else:
            self.port = self._server.add_secure_port(address, credentials)
        self.address = f"{host}:{self.port}"
        self._server.start()

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._server.stop(0).wait()
        self._pool.shutdown(wait=False)
