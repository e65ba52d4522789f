"""Load for a server: requests with known answers, sent at given times or one after the other."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import DeadlineError, LfdmExportError, ServerUnavailableError

if TYPE_CHECKING:
    from lfdm_export.client import Client
    from lfdm_export.generate.pipeline import Pipeline

UInt8 = NDArray[np.uint8]
#: "late": refused or given up at its deadline; "refused": the queue was full; "wrong": another clip was returned.
Outcome = Literal["ok", "late", "refused", "failed", "wrong"]
#: Levels (of 255) by which a served frame may differ from the local one.
_LEVELS = 1
#: Threads that wait for answers.
_WAITING = 256


@dataclass(frozen=True, eq=False)
class Order:
    """A request and its expected answer.

    Attributes:
        image: (H, W, 3) uint8.
        label: one of the bundle's labels.
        sampler, steps, guidance_scale, seed: arguments of `Pipeline.generate`.
        frames: (1, T, H, W, 3) uint8, its result.
        seconds: time that it took in this process.
    """

    image: UInt8
    label: str
    sampler: str
    steps: int
    guidance_scale: float
    seed: int
    frames: UInt8
    seconds: float

    def settings(self) -> dict[str, Any]:
        """The arguments of `generate`, except the image."""
        names = ("label", "sampler", "steps", "guidance_scale", "seed")
        return {name: getattr(self, name) for name in names}

    def fits(self, frames: UInt8) -> bool:
        """Whether `frames` are the order's frames."""
        return frames.shape == self.frames.shape and bool(
            np.abs(frames.astype(np.int16) - self.frames).max() <= _LEVELS
        )


@dataclass(frozen=True)
class Reply:
    """The result of one request.

    Attributes:
        sent: planned time of sending, in seconds since the load began.
        latency: seconds from `sent` to any answer.
        outcome: outcome of the request.
        steps: requested steps.
        queued: seconds that it waited for a slot; None without a clip.
        first_frame: for a stream, seconds to the first frames.
        message: error message.
    """

    sent: float
    latency: float
    outcome: Outcome
    steps: int
    queued: float | None = None
    first_frame: float | None = None
    message: str = ""


def make_orders(pipeline: Pipeline, count: int, steps: tuple[int, int], guided_share: float, seed: int) -> list[Order]:
    """Orders with their clips, in random order; their numbers of steps are spread evenly over a range.

    Args:
        pipeline: pipeline that makes the clips.
        count: number of orders.
        steps: fewest and most steps.
        guided_share: share of orders with guidance, which doubles the cost of a step.
        seed: seed of all random draws.
    """
    random = np.random.default_rng(seed)
    size = pipeline.bundle.manifest.geometry.image_size
    spread = random.permutation(np.linspace(*steps, count).round().astype(int))
    guided = random.permutation(np.arange(count) < round(guided_share * count))
    orders = []
    for index in range(count):
        image = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
        label = pipeline.bundle.labels[index % len(pipeline.bundle.labels)]
        order = Order(
            image,
            label,
            ("ddim", "dpm++2m", "unipc")[index % 3],
            int(spread[index]),
            2.0 if guided[index] else 1.0,
            int(random.integers(2**31)),
            np.empty(0, np.uint8),
            0.0,
        )
        began = time.perf_counter()
        frames = pipeline.generate(image, **order.settings()).frames
        orders.append(replace(order, frames=frames, seconds=time.perf_counter() - began))
    return orders


def poisson(rate: float, seconds: float, orders: int, seed: int) -> list[tuple[float, int]]:
    """Arrivals of a Poisson process: times in seconds and numbers of orders; the same for the same seed.

    Args:
        rate: arrivals per second.
        seconds: duration.
        orders: number of orders to draw from.
        seed: seed of times and orders.
    """
    random = np.random.default_rng(seed)
    gaps = random.exponential(1 / rate, max(1, int(rate * seconds * 3) + 50))
    times = np.cumsum(gaps)
    times = times[times < seconds]
    return [
        (float(time), int(order)) for time, order in zip(times, random.integers(orders, size=len(times)), strict=True)
    ]


def open_loop(
    client: Client,
    orders: Sequence[Order],
    arrivals: Sequence[tuple[float, int]],
    *,
    deadline: float | None,
    stream: bool = False,
) -> list[Reply]:
    """Send requests at their times, whether others are answered or not; returns when all are answered.

    Latency counts from the planned time of sending, so that a delayed sender hides nothing.
    """
    with ThreadPoolExecutor(_WAITING) as pool:
        began, futures = time.perf_counter(), []
        for sent, index in arrivals:
            time.sleep(max(0.0, began + sent - time.perf_counter()))
            futures.append(pool.submit(ask, client, orders[index], began, sent, deadline, stream))
        return [future.result() for future in futures]


def closed_loop(client: Client, orders: Sequence[Order], concurrency: int, seconds: float, seed: int) -> list[Reply]:
    """Run `concurrency` clients, each of which sends its next request when it has its answer."""
    began, replies, lock = time.perf_counter(), list[Reply](), threading.Lock()

    def work(number: int) -> None:
        random = np.random.default_rng([seed, number])
        while (sent := time.perf_counter() - began) < seconds:
            reply = ask(client, orders[int(random.integers(len(orders)))], began, sent, None, False)
            with lock:
                replies.append(reply)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(concurrency)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return replies


def ask(client: Client, order: Order, began: float, sent: float, deadline: float | None, stream: bool) -> Reply:
    """Send one request now.

    Args:
        client: the client.
        order: the request.
        began: when the load began, on `time.perf_counter`.
        sent: planned time of sending, in seconds since `began`.
        deadline: seconds from `sent`; None for none.
        stream: whether to request a stream.
    """

    def elapsed() -> float:
        return time.perf_counter() - began - sent

    left = None if deadline is None else deadline - elapsed()
    if left is not None and left <= 0:
        return Reply(sent, elapsed(), "late", order.steps, message="the sender was held up")
    first_frame = None
    try:
        if stream:
            with client.stream(order.image, **order.settings(), deadline=left) as events:
                for event in events:
                    if first_frame is None and type(event).__name__ == "Frames":
                        first_frame = elapsed()
                clip = events.clip()
        else:
            clip = client.generate(order.image, **order.settings(), deadline=left)
    except DeadlineError as error:
        return Reply(sent, elapsed(), "late", order.steps, message=str(error))
    except ServerUnavailableError as error:
        return Reply(sent, elapsed(), "refused", order.steps, message=str(error))
    except LfdmExportError as error:
        return Reply(sent, elapsed(), "failed", order.steps, message=str(error))
    latency = elapsed()
    if not order.fits(clip.frames):
        return Reply(sent, latency, "wrong", order.steps)
    outcome: Outcome = "late" if deadline is not None and latency > deadline else "ok"
    queued = clip.timings[0]["queue_seconds"] if clip.timings else None
    return Reply(sent, latency, outcome, order.steps, queued, first_frame)


def summary(replies: Sequence[Reply], seconds: float) -> dict[str, Any]:
    """Figures of one load.

    Args:
        replies: its replies.
        seconds: time during which requests were sent.

    Returns:
        Numbers of requests by outcome; clips per second; and for clips that came (in time), quantiles in seconds of the
        latency, of the wait for a slot, and of the time to the first frames.
    """
    good = [reply for reply in replies if reply.outcome == "ok"]
    counts = Counter(reply.outcome for reply in replies)
    span = max(seconds, max((reply.sent + reply.latency for reply in good), default=seconds))
    return {
        "requests": len(replies),
        "outcomes": dict(counts),
        "offered_per_second": len(replies) / seconds,
        # Rates of all clips are per time until the last answer, rates of clips with a deadline per time of sending.
        "clips_per_second": len(good) / span,
        "good_per_second": len(good) / seconds,
        "good_share": len(good) / max(1, len(replies)),
        "latency": quantiles([reply.latency for reply in good]),
        "queued": quantiles([reply.queued for reply in good if reply.queued is not None]),
        "first_frame": quantiles([reply.first_frame for reply in good if reply.first_frame is not None]),
        "latencies": [round(reply.latency, 4) for reply in good],
        "errors": sorted({reply.message for reply in replies if reply.outcome in ("failed", "wrong")})[:5],
    }


def quantiles(values: Sequence[float]) -> dict[str, float] | None:
    """Median, 90th and 99th percentile, mean and largest; None without values."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"p50": p50, "p90": p90, "p99": p99, "mean": statistics.fmean(values), "max": max(values)}
