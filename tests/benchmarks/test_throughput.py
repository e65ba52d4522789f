"""The arithmetic of the throughput benchmark; the load itself needs a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.load import Order, Outcome, Reply, poisson, quantiles, summary
from benchmarks.throughput_report import report, violations


def test_arrivals_are_poisson_and_repeatable():
    arrivals = poisson(5.0, 400.0, 7, seed=1)
    assert arrivals == poisson(5.0, 400.0, 7, seed=1)
    assert arrivals != poisson(5.0, 400.0, 7, seed=2)
    times = np.array([when for when, _ in arrivals])
    assert times.min() >= 0
    assert times.max() < 400
    gaps = np.diff(times)
    assert np.all(gaps > 0)
    assert gaps.mean() == pytest.approx(0.2, rel=0.1)
    assert gaps.std() == pytest.approx(0.2, rel=0.1)  # an exponential distribution's deviation is its mean
    assert {order for _, order in arrivals} == set(range(7))


def test_quantiles():
    assert quantiles([]) is None
    found = quantiles([float(value) for value in range(101)])
    assert found == {"p50": 50, "p90": 90, "p99": 99, "mean": 50, "max": 100}


def reply(outcome: Outcome, latency: float, sent: float = 0.0, **extra: Any) -> Reply:
    return Reply(sent, latency, outcome, 5, **extra)


def test_only_clips_in_time_count():
    replies = [
        reply("ok", 1.0, queued=0.25, first_frame=0.5),
        reply("ok", 3.0, sent=9.0, queued=0.75),
        reply("late", 0.1),
        reply("refused", 0.1),
        reply("wrong", 0.1, message="another clip"),
    ]
    found = summary(replies, 10.0)
    assert found["requests"] == 5
    assert found["outcomes"] == {"ok": 2, "late": 1, "refused": 1, "wrong": 1}
    assert found["good_per_second"] == 0.2
    assert found["good_share"] == 0.4
    assert found["clips_per_second"] == 2 / 12  # until the last answer
    assert found["latency"]["mean"] == 2.0
    assert found["queued"]["mean"] == 0.5
    assert found["first_frame"]["p50"] == 0.5
    assert found["latencies"] == [1.0, 3.0]
    assert found["errors"] == ["another clip"]


def test_a_frame_may_be_off_by_one_level():
    frames = np.full((1, 2, 4, 4, 3), 100, np.uint8)
    order = Order(np.zeros((4, 4, 3), np.uint8), "a", "ddim", 5, 1.0, 0, frames, 1.0)
    assert order.fits(frames)
    assert order.fits(frames + np.uint8(1))
    assert not order.fits(frames + np.uint8(2))
    assert not order.fits(frames[:, :1])
    assert not order.fits(np.zeros_like(frames))  # no wrap-around


def cell(deadline: float | None, ours: list[Reply], theirs: list[Reply]) -> dict[str, Any]:
    results = {
        name: summary(replies, 10.0) | {"samples_a_step": 1.0, "occupancy": 1.0}
        for name, replies in (("step:1", ours), ("dynamic:8", theirs))
    }
    return {"rate": 1.0, "load": 0.5, "deadline": deadline, "results": results}


def result(*cells: dict[str, Any]) -> dict[str, Any]:
    found = {
        "settings": {"contestants": ["step:1", "dynamic:8"]},
        "step_costs": {"step": {"1": 0.03, "8": 0.2}},
        "overhead": {
            "steps": 50,
            "share": 0.02,
            "served_seconds": [1.02],
            "local_seconds": [1.0],
            "replies": summary([reply("ok", 1.02)], 1.02),
        },
        "join": {"step:1": {"waits": [0.01], "step_median": 0.03, "step_longest": 0.04}},
        "closed": [],
        "open": list(cells),
        "streams": cell(None, [reply("ok", 1.0, first_frame=0.9)], [reply("ok", 2.0, first_frame=1.9)]),
        "load_seconds": 100.0,
    }
    return found | {"violations": list(violations(found))}


def test_the_report_compares_with_whole_clip_batching():
    free = cell(None, [reply("ok", 1.0)] * 4, [reply("ok", 2.0)] * 4)
    limited = cell(2.5, [reply("ok", 1.0)] * 6, [reply("ok", 2.0)] * 3 + [reply("late", 2.5)] * 3)
    found = result(free, limited)
    lines = list(report(found))
    assert found["violations"] == []
    assert "step:1 against dynamic:8, load 0.5: 0.50x the p99 latency" in lines
    assert "step:1 against dynamic:8, load 0.5: 2.00x the goodput" in lines
    assert "step, ms per sample by batch: 1: 30.0, 8: 25.0" in lines


def test_wrong_and_missing_clips_are_violations():
    free = cell(None, [reply("late", 120.0)], [reply("ok", 1.0)])
    limited = cell(2.5, [reply("late", 2.5), reply("wrong", 1.0)], [reply("failed", 1.0, message="no memory")])
    found = result(free, limited)["violations"]
    assert len(found) == 3
    assert "step:1: 1 late" in found[0]
    assert "step:1: 1 wrong" in found[1]
    assert "dynamic:8: 1 failed: no memory" in found[2]
