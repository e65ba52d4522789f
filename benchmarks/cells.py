"""The measurements: each function puts one load on every server in turn and returns figures for JSON."""

from __future__ import annotations

import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import load
from benchmarks.served import Served
from benchmarks.throughput_report import line

if TYPE_CHECKING:
    from lfdm_export.client import Client
    from lfdm_export.generate.pipeline import Pipeline

#: Shares of the requests with guidance.
GUIDED = 0.25
#: Steps of the clip of `overhead`, and of the long clip of `join`.
LONG = 50
#: Steps of the request that joins.
SHORT = 2
#: Seed of all random draws.
SEED = 7


@dataclass(frozen=True)
class Contestant:
    """A server and its client.

    Attributes:
        name: POLICY:SLOTS.
        served: the server.
        client: sends each request once.
    """

    name: str
    served: Served
    client: Client


def say(what: str) -> None:
    """Print progress to standard error."""
    print(what, file=sys.stderr, flush=True)


def connect(served: Served) -> Client:
    """A client that sends each request once, without retries."""
    from lfdm_export.client import Client, Retry, Settings

    return Client(served.address, Settings(retry=Retry(attempts=1), timeout=120.0))


def step_costs(pipeline: Pipeline, batches: Sequence[int], rounds: int = 5) -> dict[str, dict[str, float]]:
    """Median seconds of a step by stage and batch size, which show whether batching makes samples cheaper.

    Batch sizes take turns.
    """
    random, costs = np.random.default_rng(SEED), {}
    for stage in ("step", "step_guided"):
        spec = pipeline.bundle.stages[stage]
        inputs = {
            batch: [
                random.random(tensor.concrete(batch=batch)).astype(tensor.dtype)  # timesteps become 0
                for tensor in spec.inputs
            ]
            for batch in batches
        }
        times: dict[int, list[float]] = {batch: [] for batch in batches}
        for number in range(rounds + 1):
            for batch, tensors in inputs.items():
                began = time.perf_counter()
                pipeline.stages.run(stage, *tensors)
                if number:  # the first is warm-up
                    times[batch].append(time.perf_counter() - began)
        costs[stage] = {str(batch): statistics.median(some) for batch, some in times.items()}
    return costs


def overhead(contestant: Contestant, pipeline: Pipeline, pairs: int) -> dict[str, Any]:
    """Time a single clip of many steps, alternately over gRPC and in this process."""
    (order,) = load.make_orders(pipeline, 1, (LONG, LONG), 0.0, SEED)
    served, local = [], []

    def over_grpc() -> None:
        reply = load.ask(contestant.client, order, time.perf_counter(), 0.0, None, False)
        served.append(reply)

    def here() -> None:
        began = time.perf_counter()
        pipeline.generate(order.image, **order.settings())
        local.append(time.perf_counter() - began)

    over_grpc()
    served.clear()
    for number in range(pairs):
        for make in (over_grpc, here) if number % 2 else (here, over_grpc):
            make()
    times = [reply.latency for reply in served]
    say(f"overhead: {statistics.median(times):.3f} s served, {statistics.median(local):.3f} s in process")
    return {
        "contestant": contestant.name,
        "steps": LONG,
        "served_seconds": times,
        "local_seconds": local,
        "share": statistics.median(times) / statistics.median(local) - 1,
        "replies": load.summary(served, sum(times)),
    }


def join(contestant: Contestant, pipeline: Pipeline, times: int = 8) -> dict[str, Any]:
    """Send a short stream while a long one runs: its wait for a slot, and the duration of the long one's steps."""
    (long,) = load.make_orders(pipeline, 1, (LONG, LONG), 0.0, SEED)
    (short,) = load.make_orders(pipeline, 1, (SHORT, SHORT), 0.0, SEED + 1)
    waits, steps, begun, send = list[float](), list[float](), threading.Event(), threading.Event()

    def run_long() -> None:
        last = None
        with contestant.client.stream(long.image, **long.settings(), progress_every=1) as events:
            for event in events:
                now = time.perf_counter()
                if type(event).__name__ == "Progress" and not send.is_set():
                    begun.set()
                    if last is not None:
                        steps.append(now - last)
                    last = now

    for number in range(times):
        begun.clear()
        send.clear()
        thread = threading.Thread(target=run_long)
        thread.start()
        begun.wait(60.0)
        time.sleep(0.3 + 0.017 * number)  # at varying points of a step
        send.set()
        reply = load.ask(contestant.client, short, time.perf_counter(), 0.0, None, True)
        waits.append(reply.queued if reply.queued is not None else float("inf"))
        thread.join()
    longest = max(steps)
    say(f"join {contestant.name}: {statistics.median(waits):.3f} s, at most {max(waits):.3f} s; a step {longest:.3f} s")
    return {"waits": waits, "step_median": statistics.median(steps), "step_longest": longest}


def closed(
    contestants: Sequence[Contestant], orders: Sequence[load.Order], concurrencies: Sequence[int], seconds: float
) -> list[dict[str, Any]]:
    cells = []
    for concurrency in concurrencies:
        results = {}
        for one in contestants:
            with _occupancy(one) as occupancy:
                replies = load.closed_loop(one.client, orders, concurrency, seconds, SEED)
            results[one.name] = load.summary(replies, seconds) | occupancy
            say(f"closed, {concurrency} clients, {one.name}: {line(results[one.name])}")
        cells.append({"concurrency": concurrency, "results": results})
    return cells


def opened(
    contestants: Sequence[Contestant],
    orders: Sequence[load.Order],
    rate: float,
    seconds: float,
    deadline: float | None,
    *,
    stream: bool = False,
) -> dict[str, Any]:
    arrivals = load.poisson(rate, seconds, len(orders), SEED)
    results = {}
    for one in contestants:
        with _occupancy(one, stream=stream) as occupancy:
            replies = load.open_loop(one.client, orders, arrivals, deadline=deadline, stream=stream)
            _settle(one.served, stream=stream)  # requests given up late may still run
        results[one.name] = load.summary(replies, seconds) | occupancy
        kind = "streams" if stream else "open" if deadline is None else f"deadline {deadline:.2f} s"
        say(f"{kind}, {rate:.2f}/s, {one.name}: {line(results[one.name])}")
    return {"rate": rate, "deadline": deadline, "results": results}


def _settle(served: Served, *, stream: bool) -> None:
    """Wait until nothing runs; metrics are reported twice a second."""
    end = time.monotonic() + 60.0
    model = "lfdm_stream" if stream else "lfdm_sample"
    while time.monotonic() < end:
        time.sleep(1.1)
        now = served.metrics(model)
        if not now.get("lfdm_slots_busy") and not now.get("lfdm_waiting"):
            return


@contextlib.contextmanager
def _occupancy(contestant: Contestant, *, stream: bool = False) -> Iterator[dict[str, float]]:
    """Yield a dict, filled at the end: the share of slots in use while steps ran, and samples per step."""
    model = "lfdm_stream" if stream else "lfdm_sample"
    before, found = contestant.served.metrics(model), dict[str, float]()
    yield found
    time.sleep(0.6)
    after = contestant.served.metrics(model)
    steps, offered, ticks = (
        after.get(name, 0) - before.get(name, 0)
        for name in ("lfdm_steps_total", "lfdm_slot_steps_total", "lfdm_ticks_total")
    )
    found |= {"occupancy": steps / max(1, offered), "samples_a_step": steps / max(1, ticks)}
