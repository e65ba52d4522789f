"""A throughput measurement as lines of text."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any


def line(result: Mapping[str, Any]) -> str:
    """The line of one load on one server."""
    latency = result["latency"] or dict.fromkeys(("p50", "p90", "p99"), float("nan"))
    return (
        f"{result['requests']} requests, {100 * result['good_share']:.0f}% in time: {result['good_per_second']:.2f}/s; "
        f"{result['clips_per_second']:.2f} clips/s; "
        f"p50 {latency['p50']:.2f} p90 {latency['p90']:.2f} p99 {latency['p99']:.2f} s"
    )


def _cells(result: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every cell's name and its results by contestant."""
    for cell in result["closed"]:
        yield f"closed loop, {cell['concurrency']} clients", cell["results"]
    for cell in result["open"]:
        limit = "no deadline" if cell["deadline"] is None else f"deadline {cell['deadline']:.2f} s"
        yield f"open loop, load {cell['load']:g} ({cell['rate']:.2f}/s), {limit}", cell["results"]
    yield f"streams, {result['streams']['rate']:.2f}/s", result["streams"]["results"]


def violations(result: Mapping[str, Any]) -> Iterator[str]:
    """Wrong answers, failed requests, and requests without a clip despite no deadline."""
    limited = {id(cell["results"]) for cell in result["open"] if cell["deadline"] is not None}
    for name, results in _cells(result):
        allowed = {"ok", "late", "refused"} if id(results) in limited else {"ok"}
        for contestant, one in results.items():
            for outcome, count in one["outcomes"].items():
                if outcome not in allowed:
                    yield f"{name}, {contestant}: {count} {outcome}: {'; '.join(one['errors'])}"
    if set(result["overhead"]["replies"]["outcomes"]) != {"ok"}:
        yield f"overhead: {result['overhead']['replies']['outcomes']}"


def report(result: Mapping[str, Any]) -> Iterator[str]:
    """The whole report, line by line."""
    for stage, costs in result["step_costs"].items():
        each = ", ".join(f"{batch}: {1000 * seconds / int(batch):.1f}" for batch, seconds in costs.items())
        yield f"{stage}, ms per sample by batch: {each}"
    overhead = result["overhead"]
    served, local = (statistics.median(overhead[f"{where}_seconds"]) for where in ("served", "local"))
    yield (
        f"overhead of a clip of {overhead['steps']} steps: {100 * overhead['share']:+.1f}% "
        f"({served:.3f} s against {local:.3f} s in process)"
    )
    for name, join in result["join"].items():
        yield (
            f"join, {name}: {statistics.median(join['waits']):.3f} s, at most {max(join['waits']):.3f} s; "
            f"a step {join['step_median']:.3f} s, at most {join['step_longest']:.3f} s"
        )
    for name, results in _cells(result):
        yield name
        for contestant, one in results.items():
            first = one["first_frame"]
            yield (
                f"  {contestant:10s} {line(one)}, {one['samples_a_step']:.1f} samples per step"
                + (f", first frame p50 {first['p50']:.2f} p99 {first['p99']:.2f} s" if first else "")
            )
    yield from _verdicts(result)
    yield f"{result['load_seconds']:.0f} s of load"
    yield from (f"VIOLATION {one}" for one in result["violations"])


def _verdicts(result: Mapping[str, Any]) -> Iterator[str]:
    """The first contestant compared with those that batch whole clips."""
    ours = result["settings"]["contestants"][0]
    for other in result["settings"]["contestants"]:
        if not other.startswith("dynamic"):
            continue
        for cell in result["open"]:
            mine, theirs = cell["results"][ours], cell["results"][other]
            if cell["deadline"] is not None:
                ratio = mine["good_per_second"] / max(1e-9, theirs["good_per_second"])
                yield f"{ours} against {other}, load {cell['load']:g}: {ratio:.2f}x the goodput"
            elif mine["latency"] and theirs["latency"]:
                ratio = mine["latency"]["p99"] / theirs["latency"]["p99"]
                yield f"{ours} against {other}, load {cell['load']:g}: {ratio:.2f}x the p99 latency"
