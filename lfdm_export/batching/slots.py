"""How many slots a sampler gets: from the measured seconds of a step at several batch sizes. Plain arithmetic.

More clips in a step give more clips per second only where a step does not take as much longer. Beyond that, more slots
only delay every clip. So the number of slots is the smallest measured batch size that makes nearly as many steps of
single clips per second as the best one. On a CPU that is 1: a step of the small model takes 15.8 ms of processor time
for one clip, 14.8 ms per clip for four, 16.0 for eight, 17.2 for sixteen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

#: A batch size is enough if it makes this share of the steps per second of the best one.
ENOUGH = 0.9
#: A batch size that makes less than this times the steps per second of all smaller ones is the last to be measured.
GAIN = 1.05
#: Seconds of measurement after which no further batch size is begun.
BUDGET = 4.0
#: Timed runs per batch size, after one that is not timed.
_RUNS = 3

#: Seconds of a step by batch size.
Curve = Mapping[int, float]


def choose_slots(curve: Curve) -> int:
    """The smallest batch size that is enough; see `ENOUGH`.

    Args:
        curve: seconds of a step by batch size, at least one size, all positive.
    """
    best = max(size / seconds for size, seconds in curve.items())
    return min(size for size, seconds in curve.items() if size / seconds >= ENOUGH * best)


def measure_curve(
    prepare: Callable[[int], Callable[[], object] | None],
    sizes: Sequence[int],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Measure steps until a larger batch gains too little, or the time is up: the fastest of a few runs per batch size.

    Where one batch size gains nothing, the next ones do not either; but an engine may take seconds to prepare each.

    Args:
        prepare: prepares a batch size, which does not count as measurement; returns a function that runs one step and
            waits for it, or None if there is no memory for that size.
        sizes: batch sizes, ascending; the first is always measured.
        clock: in seconds.

    Returns:
        Seconds of a step for the sizes that were measured; empty if there is no memory for the first.
    """
    curve: dict[int, float] = {}
    spent = 0.0
    for size in sizes:
        if spent >= BUDGET or (step := prepare(size)) is None:
            break
        step()
        best = float("inf")
        for _ in range(_RUNS):
            began = clock()
            step()
            seconds = clock() - began
            best, spent = min(best, seconds), spent + seconds
        before = max((one / took for one, took in curve.items()), default=0.0)
        curve[size] = best
        if size / best < GAIN * before:
            break
    return curve
