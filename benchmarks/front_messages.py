"""What the front costs per message: requests and answers of the published size, from a server that answers at once.

    python benchmarks/front_messages.py [--rounds 500] [--out FILE]

A clip of the published model is 40 x 128 x 128 x 3 bytes; a stream sends it in 5 parts. Requests have ids, as those of
`lfdm_export.client` do: without one, the front removes its own from the answer, which copies it once more. Instead of
Triton a process answers with stored bytes over a socket as Triton's, so that nothing but the transport and the front
takes time. Of each round, one request is sent through the front, one past it, and one through a bare relay, in changing
order: the relay forwards bytes with gRPC for Python and does nothing else, so it costs what any front in Python costs.
The cost is the median of the differences, with a bootstrap interval of 95%; beside it stands the CPU time of the
front's process per request (of a stream, for all its messages).
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2 as messages

from benchmarks.kills import cpu_seconds
from benchmarks.machine import describe, write_json
from lfdm_export.client.wire import encode, infer_request
from lfdm_export.protocol.contract import (
    CLIP_INPUTS,
    CLIP_MODEL,
    CLIP_OUTPUTS,
    STREAM_INPUTS,
    STREAM_MODEL,
    WireTensor,
)
from lfdm_export.protocol.requests import Limits
from lfdm_export.serving.front.access import Access
from lfdm_export.serving.front.checks import models_of
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.memory import map_large_blocks, share_heap
from lfdm_export.serving.front.over_grpc import start_grpc
from lfdm_export.serving.front.service import INFER, Service
from lfdm_export.serving.front.triton import SERVICE

_STREAM = f"/{SERVICE}/ModelStreamInfer"
_FRAMES, _SIZE, _CHUNK, _TEXT_WIDTH = 40, 128, 8, 768
_WAYS = ("through", "past", "relayed")
_OPTIONS = [
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
_TIMEOUT, _WARM_UP, _DRAWS = 60.0, 20, 2000

# --- The processes --------------------------------------------------------------------------------


class _Answerer(grpc.GenericRpcHandler):
    """Answers every request with the same bytes."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        clip = rng.integers(0, 256, (_FRAMES, _SIZE, _SIZE, 3), np.uint8)
        self._clip = _answer(CLIP_MODEL, {"frames": clip}).SerializeToString()
        parts = [{"kind": _word("frames"), "frames": clip[at : at + _CHUNK]} for at in range(0, _FRAMES, _CHUNK)]
        self._parts = [
            messages.ModelStreamInferResponse(infer_response=_answer(STREAM_MODEL, part)).SerializeToString()
            for part in [*parts, {"kind": _word("done")}]
        ]

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call."""
        if handler_call_details.method == INFER:
            return grpc.unary_unary_rpc_method_handler(lambda _request, _context: self._clip)
        return grpc.stream_stream_rpc_method_handler(self._stream)

    def _stream(self, requests: Iterator[bytes], _context: Any) -> Iterator[bytes]:
        for _ in requests:
            yield from self._parts


def _answer(model: str, tensors: dict[str, Any]) -> Any:
    answer = messages.ModelInferResponse(model_name=model, model_version="1")
    for name, array in tensors.items():
        datatype = "BYTES" if array.dtype == object else "UINT8"
        answer.outputs.add(name=name, datatype=datatype, shape=array.shape)
        answer.raw_output_contents.append(encode(array))
    return answer


def _word(word: str) -> Any:
    return np.array([word.encode()], np.object_)


def _answer_all(target: str, pipe: Connection) -> None:
    server = grpc.server(ThreadPoolExecutor(4), handlers=[_Answerer()], options=_OPTIONS)
    server.add_insecure_port(target)
    server.start()
    pipe.send(None)
    pipe.recv()


def _serve_front(target: str, pipe: Connection) -> None:
    async def start(address: str) -> Any:
        models = models_of([_metadata(CLIP_MODEL, CLIP_INPUTS), _metadata(STREAM_MODEL, STREAM_INPUTS)], Limits())
        service = Service(Access(), FrontLimits(Limits()), models)
        await service.attach(target)
        return await start_grpc(service, address)

    _serve(start, f"{target}.front", pipe)


def _serve_relay(target: str, pipe: Connection) -> None:
    async def start(address: str) -> Any:
        server = grpc.aio.server(handlers=[_Relay(target)], options=_OPTIONS)
        server.add_insecure_port(address)
        await server.start()
        return server

    _serve(start, f"{target}.relay", pipe)


def _serve(start: Callable[[str], Awaitable[Any]], address: str, pipe: Connection) -> None:
    share_heap()  # as `TritonServer` does
    map_large_blocks()  # as `Front` does

    async def serve() -> None:
        server = await start(address)
        pipe.send(address)
        await asyncio.to_thread(pipe.recv)
        await server.stop(None)

    asyncio.run(serve())


class _Relay(grpc.GenericRpcHandler):
    """Forwards the bytes of one request and of its answers."""

    def __init__(self, target: str) -> None:
        channel = grpc.aio.insecure_channel(target, _OPTIONS)
        self._clip, self._stream = channel.unary_unary(INFER), channel.stream_stream(_STREAM)

    def service(self, handler_call_details: Any) -> Any:
        """The handler of a call."""
        if handler_call_details.method == INFER:
            return grpc.unary_unary_rpc_method_handler(self._answer)
        return grpc.stream_stream_rpc_method_handler(self._answers)

    async def _answer(self, request: bytes, _context: Any) -> Any:
        return await self._clip(request, timeout=_TIMEOUT)

    async def _answers(self, _requests: Any, context: Any) -> None:
        call = self._stream(timeout=_TIMEOUT)
        await call.write(await context.read())
        await call.done_writing()
        while (message := await call.read()) is not grpc.aio.EOF:
            await context.write(message)


def _metadata(name: str, inputs: Sequence[WireTensor]) -> Any:
    """Triton's metadata of a model."""
    found = messages.ModelMetadataResponse(name=name)
    for spec in inputs:
        shape = [_TEXT_WIDTH if axis == "text_width" else axis for axis in spec.shape]
        sizes = [-1 if isinstance(axis, str) else axis for axis in shape]
        found.inputs.add(name=spec.name, datatype=spec.datatype, shape=sizes)
    for spec in CLIP_OUTPUTS:
        found.outputs.add(name=spec.name, datatype=spec.datatype)
    return found


# --- The measurement ------------------------------------------------------------------------------


def measure(rounds: int) -> dict[str, Any]:
    """Costs in milliseconds of a clip, and of a stream's first frames."""
    context = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    with tempfile.TemporaryDirectory(prefix="lfdm-front-") as name, ExitStack() as stack:
        target, processes, channels = f"unix:{name}/triton", {}, {}
        for way, work in (("past", _answer_all), ("through", _serve_front), ("relayed", _serve_relay)):
            pipe, there = context.Pipe()
            process = context.Process(target=work, args=(target, there), daemon=True)
            process.start()
            processes[way] = (process, pipe)
            address = pipe.recv() or target
            channels[way] = stack.enter_context(grpc.insecure_channel(address, _OPTIONS))
        front = processes["through"][0].pid
        assert front is not None
        found = {
            kind: _compared({way: send(channel) for way, channel in channels.items()}, front, rounds)
            for kind, send in (("clip", _clips), ("first frames", _streams))
        }
        for process, pipe in reversed(processes.values()):
            pipe.send(None)
            process.join()
    return found


def _request(model: str, inputs: tuple[WireTensor, ...]) -> bytes:
    tensors = {
        "image": np.random.default_rng(0).integers(0, 256, (_SIZE, _SIZE, 3), np.uint8),
        "label": _word("anger"),
        "seed": np.array([1], np.int64),
    }
    outputs = ("frames",) if model == CLIP_MODEL else ()
    request: bytes = infer_request(
        model, inputs, tensors, outputs=outputs, request_id="as-the-client-draws"
    ).SerializeToString()
    return request


def _clips(channel: Any) -> Callable[[], object]:
    call, request = channel.unary_unary(INFER), _request(CLIP_MODEL, CLIP_INPUTS)
    return lambda: call(request, timeout=_TIMEOUT) and None


def _streams(channel: Any) -> Callable[[], object]:
    """Sends a stream's request, and waits for its first frames; returns the stream, whose rest is not timed."""
    call, request = channel.stream_stream(_STREAM), _request(STREAM_MODEL, STREAM_INPUTS)

    def send() -> Any:
        answers = call(iter([request]), timeout=_TIMEOUT)
        next(answers)
        return answers

    return send


def _compared(ways: dict[str, Callable[[], Any]], front: int, rounds: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {way: [] for way in _WAYS}
    rng, order, cpu = random.Random(0), list(_WAYS), 0.0
    for number in range(_WARM_UP + rounds):
        if number == _WARM_UP:
            cpu = cpu_seconds(front)
        rng.shuffle(order)
        for way in order:
            began = time.perf_counter()
            rest = ways[way]()
            seconds = time.perf_counter() - began
            if number >= _WARM_UP:
                times[way].append(1e3 * seconds)
            for _ in rest or ():
                pass
    cpu = 1e3 * (cpu_seconds(front) - cpu) / rounds
    return {
        **{way: statistics.median(values) for way, values in times.items()},
        **_cost(times["through"], times["past"]),
        "cost of the relay": _cost(times["relayed"], times["past"]),
        "cpu of the front": cpu,
        "rounds": rounds,
    }


def _cost(times: Sequence[float], past: Sequence[float]) -> dict[str, float]:
    differences = [one - other for one, other in zip(times, past, strict=True)]
    low, high = _interval(differences)
    return {"cost": statistics.median(differences), "low": low, "high": high}


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Bootstrap interval of 95% of a median."""
    rng = random.Random(0)
    medians = sorted(statistics.median(rng.choices(values, k=len(values))) for _ in range(_DRAWS))
    return medians[round(0.025 * _DRAWS)], medians[round(0.975 * _DRAWS) - 1]


def main() -> int:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=500, help="rounds of clips, and of streams (500)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    found = measure(args.rounds)
    for kind, one in found.items():
        relay = one["cost of the relay"]
        print(
            f"{kind}: {one['through']:.2f} ms through the front, {one['past']:.2f} ms past it; median of the "
            f"differences {one['cost']:+.2f} ms ({one['low']:+.2f} to {one['high']:+.2f}); a bare relay "
            f"{relay['cost']:+.2f} ms ({relay['low']:+.2f} to {relay['high']:+.2f}); the front takes "
            f"{one['cpu of the front']:.2f} ms of CPU"
        )
    if args.out:
        write_json(args.out, {"machine": describe(), **found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
