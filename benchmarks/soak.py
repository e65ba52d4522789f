"""A long mixed load with faults: no answer may be lost or belong to another request, and memory must stay flat.

Part of `benchmarks/throughput.py --soak MINUTES`. Concurrent clients each perform random actions: clips, streams with
previews, priorities, deadlines that cannot be met, cancellations, abandoned streams, broken connections, several
kinds of invalid requests, and the hostile ones of `benchmarks/hostile.py`. Each action must end as expected: with the
right clip, or the right error.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.cells import GUIDED, SEED, connect, say
from benchmarks.hostile_requests import KINDS, SHARES, Doors
from benchmarks.ledger import Ledger
from benchmarks.load import Order, make_orders
from benchmarks.served import MemoryWatch, Served, print_logs, serve
from lfdm_export.errors import DeadlineError, InputError, LfdmExportError, ServerError
from lfdm_export.protocol.contract import RequestCancelledError

if TYPE_CHECKING:
    from lfdm_export.client import Client
    from lfdm_export.generate.pipeline import Pipeline

#: Share of the time after which memory counts, and the largest growth that counts as flat.
WARM_UP, FLAT = 0.3, 0.05
#: Seconds between samples of memory.
_EVERY = 2.0
#: Number of clients.
_CLIENTS = 6
#: Options of the server.
_SLOTS, _QUEUE = 4, 64


def run_soak(bundle: Path, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Load a server for the requested minutes.

    Returns:
        Finished actions, violations, memory, and lines that describe them.
    """
    from lfdm_export.generate.pipeline import Pipeline

    seconds, pipeline = 60.0 * arguments.soak, Pipeline.open(bundle, threads=arguments.threads)
    say(f"making {arguments.orders} clips to compare with")
    orders = make_orders(pipeline, arguments.orders, tuple(arguments.steps), GUIDED, SEED)
    options = [f"--slots={_SLOTS}", f"--queue={_QUEUE}", f"--threads={arguments.threads}"]
    ledger = Ledger()
    with serve(bundle, folder / "soak.log", options) as served:
        memory, end = MemoryWatch(served, _EVERY), time.monotonic() + seconds
        threads = [
            threading.Thread(target=_work, args=(served, orders, pipeline, ledger, end, number), daemon=True)
            for number in range(_CLIENTS)
        ]
        for thread in threads:
            thread.start()
        while time.monotonic() < end:
            time.sleep(min(30.0, max(0.1, end - time.monotonic())))
            say(f"{seconds - end + time.monotonic():.0f} s: {dict(ledger.ends)}, {len(ledger.wrong)} violations")
        for thread in threads:
            thread.join(180.0)
            if thread.is_alive():
                ledger.violation("a client never got its answer")
        memory.stop()
        _check_after(served, orders, ledger)
    result = _result(ledger, memory, seconds)
    if result["violations"]:
        print_logs(folder)
    return result


def _work(served: Served, orders: Sequence[Order], pipeline: Pipeline, ledger: Ledger, end: float, number: int) -> None:
    """One client."""
    draws, doors = np.random.default_rng([SEED, number]), Doors.at(served.http_address, served.address)
    actions: tuple[tuple[Callable[[_Client], None], float], ...] = (
        (_clip, 0.36), (_stream, 0.14), (_cancelled, 0.10), (_left, 0.08), (_broken_off, 0.04), (_too_late, 0.06),
        (_wrong_request, 0.10), (_hostile, 0.12),
    )  # fmt: skip
    kinds, shares = zip(*actions, strict=True)
    with connect(served) as client:
        me = _Client(served, client, orders, pipeline, ledger, draws, number, doors)
        while time.monotonic() < end:
            action = kinds[draws.choice(len(kinds), p=shares)]
            try:
                action(me)
            except Exception as error:  # noqa: BLE001 (any error is reported)
                ledger.violation(f"{action.__name__[1:]}: {type(error).__name__}: {error}")


@dataclass
class _Client:
    """The environment of an action."""

    served: Served
    client: Client
    orders: Sequence[Order]
    pipeline: Pipeline
    ledger: Ledger
    draws: np.random.Generator
    number: int
    doors: Doors
    requests: int = 0

    def order(self) -> Order:
        """A random order."""
        return self.orders[int(self.draws.integers(len(self.orders)))]

    def request_id(self) -> str:
        """A unique id."""
        self.requests += 1
        return f"soak-{self.number}-{self.requests}"

    def check(self, order: Order, frames: Any, kind: str) -> None:
        """Record whether the answer is the order's clip."""
        if order.fits(frames):
            self.ledger.end(kind)
        else:
            others = [index for index, other in enumerate(self.orders) if other.fits(frames)]
            self.ledger.violation(f"{kind}: the clip is not the requested one, but that of order {others}")


def _clip(me: _Client) -> None:
    order, priority = me.order(), int(me.draws.integers(-2, 3))
    me.check(order, me.client.generate(order.image, **order.settings(), priority=priority).frames, "clip")


def _stream(me: _Client) -> None:
    order, every = me.order(), int(me.draws.integers(1, 5))
    with me.client.stream(order.image, **order.settings(), preview_every=every, progress_every=1) as stream:
        for _event in stream:
            pass
        me.check(order, stream.clip().frames, "stream")


def _cancelled(me: _Client) -> None:
    """Cancel from another thread at a random time: the request ends as cancelled, or is already done."""
    order, identity = me.order(), me.request_id()
    canceller = threading.Timer(float(me.draws.uniform(0, 3)), me.client.cancel, (identity,))
    canceller.start()
    try:
        me.check(order, me.client.generate(order.image, **order.settings(), request_id=identity).frames, "clip")
    except RequestCancelledError:
        me.ledger.end("cancelled")
    finally:
        canceller.cancel()
        canceller.join()


def _left(me: _Client) -> None:
    """Abandon a stream at a random event."""
    order, events = me.order(), int(me.draws.integers(1, 6))
    with me.client.stream(order.image, **order.settings(), preview_every=1, progress_every=1) as stream:
        for _count, _event in zip(range(events), stream, strict=False):
            pass
    me.ledger.end("left")


def _broken_off(me: _Client) -> None:
    """Close a connection during a clip: the request ends as cancelled, or is already done."""
    order = me.order()
    with connect(me.served) as client:
        closer = threading.Timer(float(me.draws.uniform(0.05, 2)), client.close)
        client.facts()
        closer.start()
        try:
            me.check(order, client.generate(order.image, **order.settings()).frames, "clip")
        except (RequestCancelledError, InputError):  # InputError: closed before the request was sent
            me.ledger.end("broken off")
        finally:
            closer.cancel()
            closer.join()


def _too_late(me: _Client) -> None:
    order = me.order()
    try:
        me.check(order, me.client.generate(order.image, **order.settings(), deadline=0.05).frames, "clip")
    except DeadlineError:
        me.ledger.end("too late")


def _wrong_request(me: _Client) -> None:
    """Send one of several kinds of invalid requests: client or server must refuse it."""
    order = me.order()
    settings = order.settings()
    noise = np.full(me.pipeline.bundle.manifest.geometry.text_width, np.nan, np.float32)
    attempts: dict[str, Callable[[], object]] = {
        "unknown label": lambda: me.client.generate(order.image, **settings | {"label": "no such label"}),
        "no steps": lambda: me.client.generate(order.image, **settings | {"steps": 0}),
        "too many steps": lambda: me.client.generate(order.image, **settings | {"steps": 5000}),
        "embedding": lambda: me.client.generate(order.image, **settings | {"label": None}, text_embedding=noise),
        "guidance": lambda: me.client.generate(order.image, **settings | {"guidance_scale": 1e6}),
        "no picture": lambda: _infer(me, b"this is not a picture", order),
        "half a picture": lambda: _infer(me, _png(order)[:200], order),
    }
    kind = list(attempts)[int(me.draws.integers(len(attempts)))]
    try:
        attempts[kind]()
    except InputError:
        me.ledger.end(f"wrong: {kind}")
    else:
        me.ledger.violation(f"wrong: {kind}: it was not refused")


def _hostile(me: _Client) -> None:
    """Send what a stranger would: it must be refused, and hurt nobody else."""
    rng = random.Random(me.request_id())
    kind = rng.choices(KINDS, SHARES)[0]
    end = kind(rng, me.doors)
    if end in ("refused", "answered"):
        me.ledger.end(f"hostile: {kind.__name__}")
    else:
        me.ledger.violation(f"hostile: {kind.__name__}: {end}")


def _infer(me: _Client, image: bytes, order: Order) -> None:
    """Send a request with an encoded picture, without the client's own check.

    Raises:
        InputError: the server refuses it.
    """
    import tritonclient.grpc as triton

    from lfdm_export.protocol.contract import CLIP_MODEL

    inputs = []
    for name, value in (("image_bytes", image), ("label", order.label.encode())):
        tensor = triton.InferInput(name, [1], "BYTES")
        tensor.set_data_from_numpy(np.array([value], np.object_))
        inputs.append(tensor)
    # A local server: no proxy.
    client = triton.InferenceServerClient(me.served.address, channel_args=[("grpc.enable_http_proxy", 0)])
    try:
        client.infer(CLIP_MODEL, inputs, client_timeout=120.0)
    except triton.InferenceServerException as error:
        if "INVALID_ARGUMENT" not in str(error.status()):
            raise ServerError(f"{error.status()}: {error.message()}") from error
        raise InputError(error.message()) from error
    finally:
        client.close()


def _png(order: Order) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(order.image).save(file, "png")
    return file.getvalue()


def _check_after(served: Served, orders: Sequence[Order], ledger: Ledger) -> None:
    """Check that nothing runs or waits, and that the server still works."""
    time.sleep(3.0)
    for model in ("lfdm_sample", "lfdm_stream"):
        metrics = served.metrics(model)
        left = {name: metrics.get(name, 0.0) for name in ("lfdm_slots_busy", "lfdm_waiting")}
        if any(left.values()):
            ledger.violation(f"{model} is not idle at the end: {left}")
    try:
        with connect(served) as client:
            if not orders[0].fits(client.generate(orders[0].image, **orders[0].settings()).frames):
                ledger.violation("the last clip is not the requested one")
    except LfdmExportError as error:
        ledger.violation(f"the last clip: {error}")


def _result(ledger: Ledger, memory: MemoryWatch, seconds: float) -> dict[str, Any]:
    totals = [(when, sum(usage.values())) for when, usage in memory.samples if when >= WARM_UP * seconds]
    third = max(1, len(totals) // 3)
    early, late = (statistics.median(size for _, size in part) for part in (totals[:third], totals[-third:]))
    growth = late / early - 1
    violations, count = list(ledger.wrong), sum(ledger.ends.values())
    if growth > FLAT:
        violations.append(f"memory grew by {100 * growth:.1f}% after the warm-up, expected at most {100 * FLAT:.0f}%")
    return {
        "settings": {"seconds": seconds, "clients": _CLIENTS, "slots": _SLOTS, "queue": _QUEUE},
        "done": dict(ledger.ends),
        "violations": violations,
        "memory": {"early_bytes": early, "late_bytes": late, "growth": growth, "samples": memory.samples},
        "report": [
            f"{count} requests in {seconds / 60:.1f} minutes ended as they should: {dict(ledger.ends)}",
            f"memory of the server's processes: {early / 1e6:.0f} MB, later {late / 1e6:.0f} MB ({100 * growth:+.1f}%)",
            *(f"VIOLATION {line}" for line in violations),
        ],
    }
