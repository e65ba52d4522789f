"""Timing on a GPU, and on a CPU in a trial run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: Minimum number of timed runs, and their approximate total seconds.
_FEWEST, _SECONDS = 7, 0.4
#: The same on a CPU, where a trial needs no accurate times.
_TRIAL = 1


class OutOfTimeError(Exception):
    """A part has no time left before the whole run must end."""


@dataclass(frozen=True)
class Budget:
    """The time limit of the whole run.

    Attributes:
        end: `time.monotonic` seconds when the run must have ended.
    """

    end: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Check that enough time is left.

        Args:
            seconds: needed time.
            what: what needs it, for the message.

        Raises:
            OutOfTimeError: less time is left.
        """
        if self.left < seconds:
            raise OutOfTimeError(f"{what} takes about {seconds:.0f} s, {max(self.left, 0):.0f} s were left")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: median, 10th and 90th percentile, and the number of runs."""

    median: float
    low: float
    high: float
    runs: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """Statistics of the runs' seconds."""
        ordered = sorted(samples)
        tenth = len(ordered) // 10
        return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))

    def divided(self, parts: int) -> Timing:
        """Timing of one of `parts` equal parts."""
        return Timing(self.median / parts, self.low / parts, self.high / parts, self.runs)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(run: Callable[[], Any], device: torch.device, *, seconds: float = _SECONDS) -> Timing:
    """Time a function after three warm-up runs.

    On a GPU it is timed by events on the stream, so that the host's time counts only if the GPU waits for it.
    """
    if device.type != "cuda":
        return Timing.of([_one(run, device) for _ in range(_TRIAL)])
    for _ in range(3):
        run()
    synchronize(device)
    samples: list[float] = []
    end = time.monotonic() + seconds
    while len(samples) < _FEWEST or (time.monotonic() < end and len(samples) < 500):
        samples.append(_one(run, device))
    return Timing.of(samples)


def measure_wall(run: Callable[[], Any], device: torch.device, *, seconds: float = _SECONDS) -> Timing:
    """Time a function and its work on the GPU by the wall clock, after two warm-up runs."""
    if device.type != "cuda":
        return Timing.of([_one(run, device) for _ in range(_TRIAL)])
    for _ in range(2):
        run()
    samples: list[float] = []
    end = time.monotonic() + seconds
    while len(samples) < _FEWEST or (time.monotonic() < end and len(samples) < 100):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        samples.append(time.perf_counter() - start)
    return Timing.of(samples)


def _one(run: Callable[[], Any], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    after.synchronize()
    return float(before.elapsed_time(after)) * 1e-3


def synchronize(device: torch.device) -> None:
    """Wait for all work on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function as a CUDA graph, which repeats its work on the same tensors; on a CPU the function itself.

    Returned tensors are those of the capture: every replay overwrites them.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # load kernels, choose algorithms
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
