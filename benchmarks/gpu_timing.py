"""How things are timed on a GPU, and on a CPU where a trial run stands in for one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

#: What is timed runs at least this often, and about this long.
_FEWEST, _SECONDS = 7, 0.4
#: On a CPU a trial run needs no good numbers.
_TRIAL = 1


class OutOfTimeError(Exception):
    """A part was given up because the whole run must end."""


@dataclass(frozen=True)
class Budget:
    """When the whole run must have ended.

    Attributes:
        end: `time.monotonic` seconds.
    """

    end: float

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()

    def need(self, seconds: float, what: str) -> None:
        """Go on only if that much time is left.

        Raises:
            OutOfTimeError: it is not.
        """
        if self.left < seconds:
            raise OutOfTimeError(f"{what} takes about {seconds:.0f} s, {max(self.left, 0):.0f} s were left")


@dataclass(frozen=True)
class Timing:
    """Seconds of one run: the median, what a tenth of the runs stayed below and above, and how many there were."""

    median: float
    low: float
    high: float
    runs: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """Of the single runs' seconds."""
        ordered = sorted(samples)
        tenth = len(ordered) // 10
        return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))

    def divided(self, parts: int) -> Timing:
        """Of one of `parts` equal ones."""
        return Timing(self.median / parts, self.low / parts, self.high / parts, self.runs)

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure(run: Callable[[], Any], device: torch.device, *, seconds: float = _SECONDS) -> Timing:
    """Time a function, after it has run three times.

    On a GPU events on the stream time it, so that the host's own time counts only where the GPU waits for it.
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
    """Time a function by the wall clock, its work on the GPU included, after it has run twice."""
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
    """Wait for all work of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def captured(run: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The function as a CUDA graph, which does the same work on the same tensors; on a CPU the function itself.

    Tensors that it returns are those of the capture: every replay writes them anew.
    """
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # loads kernels, chooses algorithms
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
