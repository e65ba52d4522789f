"""What the front costs: clips and streams through it and past it, alternately, from one server.

    python benchmarks/front.py [--bundle DIR] [--pairs 50] [--out FILE]

Without a bundle the small untrained model is exported with the messages of the published size: 40 frames of 128 x 128
pixels. Past the front, requests go to Triton's private socket. Of each pair, one is sent through the front, the other
past it, in alternating order; the cost is the median of their differences.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import grpc
import numpy as np
from tritonclient.grpc import service_pb2_grpc

from benchmarks.machine import describe
from lfdm_export import Bundle, export_bundle
from lfdm_export.client.wire import infer_request
from lfdm_export.protocol.contract import CLIP_INPUTS, CLIP_MODEL, STREAM_INPUTS, STREAM_MODEL
from lfdm_export.serving.server.files import find_server
from lfdm_export.serving.server.options import ServerOptions
from lfdm_export.serving.server.supervisor import TritonServer
from lfdm_export.serving.triton.repository import write_repository
from lfdm_export.serving.triton.settings import ServingSettings

_OPTIONS = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]
_TIMEOUT = 300.0


def main() -> int:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", help="folder or name of a bundle")
    parser.add_argument("--pairs", type=int, default=50, help="pairs of clips, and of streams (50)")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lfdm-front-") as name:
        bundle = Bundle.open(args.bundle) if args.bundle else _published_messages(Path(name) / "bundle")
        settings = ServingSettings(threads=1)
        repository = write_repository(bundle, Path(name) / "repository", settings=settings, copy_bundle=False)
        options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
        with TritonServer(find_server(), repository, options) as server:
            front = f"{server.options.host}:{server.options.grpc_port}"
            found = measure(bundle, front, server.sockets.grpc_target, args.pairs)
    for kind, one in found.items():
        print(
            f"{kind}: {one['through']:.1f} ms through the front, {one['past']:.1f} ms past it; median of the "
            f"differences {one['cost']:+.2f} ms ({one['low']:+.2f} to {one['high']:+.2f}: the middle half)"
        )
    if args.out:
        args.out.write_text(json.dumps({"machine": describe(), **found}, indent=1) + "\n", encoding="utf-8")
    return 0


def _published_messages(folder: Path) -> Bundle:
    from lfdm_models.demo import untrained_model

    return export_bundle(untrained_model(), folder, frames=40, image_size=128, drive=False, reference=False)


def measure(bundle: Bundle, front: str, direct: str, pairs: int) -> dict[str, dict[str, float]]:
    """Times of both ways in milliseconds, for a clip, and for a stream's first frames."""
    size = bundle.manifest.geometry.image_size
    tensors = {
        "image": np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8),
        "label": np.array([bundle.manifest.labels[0].encode()], np.object_),
        "seed": np.array([1], np.int64),
        "steps": np.array([1], np.int32),
    }
    clip = infer_request(CLIP_MODEL, CLIP_INPUTS, tensors, outputs=("frames",))
    stream = infer_request(STREAM_MODEL, STREAM_INPUTS, tensors)
    with grpc.insecure_channel(front, _OPTIONS) as through, grpc.insecure_channel(direct, _OPTIONS) as past:
        stubs = {
            "through": service_pb2_grpc.GRPCInferenceServiceStub(through),
            "past": service_pb2_grpc.GRPCInferenceServiceStub(past),
        }
        return {
            "clip": _compared(lambda way: [stubs[way].ModelInfer(clip, timeout=_TIMEOUT)], pairs),
            "first frames": _compared(lambda way: _first_frames(stubs[way], stream), pairs),
        }


def _first_frames(stub: Any, request: Any) -> Iterator[Any]:
    """Send a stream's request, and wait for its first frames; returns the stream, whose rest is not timed."""
    call: Iterator[Any] = stub.ModelStreamInfer(iter([request]), timeout=_TIMEOUT)
    if error := next(call).error_message:
        raise RuntimeError(error)
    return call


def _compared(send: Callable[[str], Iterable[Any]], pairs: int) -> dict[str, float]:
    """Medians of the times of both ways, and quartiles of their differences, in milliseconds."""
    times: dict[str, list[float]] = {"through": [], "past": []}
    for number in range(pairs + 2):
        for way in ("through", "past") if number % 2 else ("past", "through"):
            began = time.perf_counter()
            rest = send(way)
            seconds = time.perf_counter() - began
            if number >= 2:  # the first two pairs warm up
                times[way].append(1e3 * seconds)
            deque(rest, maxlen=0)
    differences = [one - other for one, other in zip(times["through"], times["past"], strict=True)]
    low, cost, high = statistics.quantiles(differences, n=4)
    medians = {way: statistics.median(values) for way, values in times.items()}
    return {**medians, "cost": cost, "low": low, "high": high, "pairs": pairs}


if __name__ == "__main__":
    sys.exit(main())
