"""The GPU suite, tried out on the CPU: every part but the compilers', with the host build of the kernels."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_parts, gpu_suite
from benchmarks.gpu_timing import Budget, OutOfTimeError, Timing
from benchmarks.gpu_verdicts import TARGETS, verdicts

TRIAL = ["--device", "cpu", "--size", "toy"]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a trial run of all parts."""
    out = tmp_path_factory.mktemp("trial") / "gpu.json"
    assert gpu_suite.main([*TRIAL, "--out", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    return found


def timings(value: Any) -> list[Mapping[str, Any]]:
    """Every timing within a record."""
    if not isinstance(value, dict):
        return []
    if value.keys() == {"median", "low", "high", "runs"}:
        return [value]
    return [timing for part in value.values() for timing in timings(part)]


def test_every_part_ran(trial: dict[str, Any]) -> None:
    assert list(trial["parts"]) == list(gpu_parts.PARTS)
    assert {name: part["status"] for name, part in trial["parts"].items()} == dict.fromkeys(gpu_parts.PARTS, "ok")
    assert trial["gpu"]["name"].startswith("none")
    assert trial["settings"] == {"device": "cpu", "size": "toy", "minutes": 8.5}
    assert {"date", "cpu", "platform", "python", "versions"} <= trial.keys()


def test_times_are_medians_with_their_spread(trial: dict[str, Any]) -> None:
    for name in ("ceilings", "warp_speed", "step_speed", "clip", "batches"):
        found = timings(trial["parts"][name]["data"])
        assert found, name
        assert all(0 < one["low"] <= one["median"] <= one["high"] and one["runs"] >= 1 for one in found)


def test_ways_make_the_same_clip(trial: dict[str, Any]) -> None:
    parity = trial["parts"]["parity"]["data"]
    assert parity["fp32"]["psnr"] > 90
    assert parity["fp16"]["psnr"] > 40
    assert parity["bf16"]["psnr"] > 30
    assert all(parity[name]["finite"] for name in ("fp32", "fp16", "bf16"))
    assert min(parity["flops"][name] for name in ("step", "decoded frame")) > 1e6


def test_kernels_were_checked(trial: dict[str, Any]) -> None:
    checks = trial["parts"]["checks"]["data"]
    assert {"noise", "thresholded step whole", "thresholded step odd"} <= checks.keys()
    assert {name.split()[-1] for name in checks if name.startswith("warp")} == {"planar", "channels_last"}


def test_a_trial_decides_nothing(trial: dict[str, Any]) -> None:
    assert trial["targets"].keys() == TARGETS.keys()
    assert {one["measured"] for one in trial["targets"].values()} == {"not measured"}


# -- what goes wrong


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare building what no part will use."""
    monkeypatch.setattr(gpu_suite, "_kernels_for", lambda _device: contextlib.nullcontext())


@pytest.mark.usefixtures("no_kernels")
def test_what_was_measured_outlives_a_part_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_suite: object) -> dict[str, Any]:
        raise ZeroDivisionError("by nothing")

    def first(_suite: object) -> dict[str, Any]:
        return {"value": 1}

    monkeypatch.setattr(gpu_suite, "PARTS", {"first": first, "broken": broken, "last": first})
    out = tmp_path / "gpu.json"
    assert gpu_suite.main([*TRIAL, "--out", str(out)]) == 1
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {"first": "ok", "broken": "failed", "last": "ok"}
    assert parts["broken"]["error"] == "ZeroDivisionError: by nothing"
    assert parts["last"]["data"] == {"value": 1}


@pytest.mark.usefixtures("no_kernels")
def test_result_is_written_after_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "gpu.json"

    def second(_suite: object) -> dict[str, Any]:
        return {"seen": list(json.loads(out.read_text(encoding="utf-8"))["parts"])}

    monkeypatch.setattr(gpu_suite, "PARTS", {"first": lambda _suite: {}, "second": second})
    assert gpu_suite.main([*TRIAL, "--out", str(out)]) == 0
    assert json.loads(out.read_text(encoding="utf-8"))["parts"]["second"]["data"] == {"seen": ["first"]}


def test_ways_that_fail_are_named_and_the_others_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise ValueError("no such way")

    options = gpu_suite._arguments(TRIAL)
    suite = gpu_parts.Suite(options, torch.device("cpu"), Budget(time.monotonic() + 60))
    ways: dict[str, Any] = {"good": lambda: None, "bad": broken}
    monkeypatch.setattr(gpu_parts, "_time_clips", lambda *_: {"clip": {}})
    with pytest.raises(RuntimeError, match="failed: bad") as caught:
        gpu_parts._time_ways(suite, ways, 1)
    assert caught.value.data == {"good": {"clip": {}}, "bad": {"failed": "ValueError: no such way"}}  # type: ignore[attr-defined]


@pytest.mark.usefixtures("no_kernels")
def test_no_time_left_is_no_failure(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu_suite.main([*TRIAL, "--minutes", "0.0001", "--only", "warp_speed", "--out", str(out)]) == 0
    parts = json.loads(out.read_text(encoding="utf-8"))["parts"]
    assert parts.keys() == {"warp_speed", "model"}
    assert all(part["status"] == "skipped" and "were left" in part["reason"] for part in parts.values())


def test_budget() -> None:
    Budget(time.monotonic() + 100).need(50, "this")
    with pytest.raises(OutOfTimeError, match=r"that takes about 50 s, \d+ s were left"):
        Budget(time.monotonic() + 10).need(50, "that")


def test_timing_is_robust() -> None:
    timing = Timing.of([*range(1, 20), 1000])
    assert (timing.median, timing.low, timing.high, timing.runs) == (10.5, 3, 18, 20)
    assert timing.divided(2).median == 5.25


def test_a_cpu_is_for_trials_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_suite.main(["--device", "cpu"])
    assert "give --size toy" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_suite.main([]) == 2
    assert "sees no GPU" in capsys.readouterr().err


# -- verdicts


def measured() -> dict[str, Any]:
    """A run on a GPU, as far as verdicts look at it."""

    def warp_at(share: float, times: float) -> dict[str, Any]:
        slow = {"bytes_a_second": 1e11, "times_pytorch": 1.0}
        return {"planar": slow, "channels_last": {"bytes_a_second": share * 4e12, "times_pytorch": times}}

    data: dict[str, Any] = {
        "ceilings": {
            "copy": {"bytes_a_second": 4e12},
            "matrix_product": {name: {"flops_a_second": 8e14} for name in ("fp16", "bf16")},
        },
        "warp_speed": {
            "128x128x64 fp16 40 frames": warp_at(0.7, 5.0),
            "32x32x256 fp16 40 frames": warp_at(0.65, 4.0),
            "32x32x256 fp16 8 frames": warp_at(0.1, 1.0),
            "phase of 128 fp16 40 frames": warp_at(0.3, 2.0),
        },
        "parity": {"fp16": {"psnr": 45.0}, "bf16": {"psnr": 33.0}},
        "clip": {"faithful fp32": {"clip": {"median": 0.2}}, "ours fp16": {"clip": {"median": 0.04}}},
        "compiled": {"ours fp16, compiled": {"clip": {"median": 0.02}}, "ours bf16, compiled": {"skipped": "no time"}},
        "batches": {
            "ours fp16": {"1": {"flops_a_second": 1e14}, "8": {"flops_a_second": 3e14}, "16": {"skipped": "no time"}},
            "ours bf16": {},
        },
    }
    return {
        "settings": {"device": "cuda", "size": "full"},
        "parts": {name: {"status": "ok", "data": part} for name, part in data.items()},
    }


def test_verdicts() -> None:
    found = verdicts(measured())
    names = list(TARGETS)
    values = [found[name]["measured"] for name in names]
    assert values == pytest.approx([4.0, 0.65, 10.0, 0.375, 45.0, 33.0])
    assert [found[name]["met"] for name in names] == [True, True, True, False, True, False]


def test_verdicts_of_what_is_missing() -> None:
    result = measured()
    result["parts"]["clip"] = {"status": "failed", "error": "out of memory", "data": None}
    del result["parts"]["ceilings"]
    found = [one["measured"] for one in verdicts(result).values()]
    assert found == [4.0, "not measured", "not measured", "not measured", 45.0, 33.0]


@pytest.mark.usefixtures("no_kernels")
def test_no_plotting_library_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.gpu_plots", None)  # its import fails
    monkeypatch.setattr(gpu_suite, "PARTS", {})
    out = tmp_path / "gpu.json"
    assert gpu_suite.main([*TRIAL, "--out", str(out)]) == 0
    assert "matplotlib is not installed" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))
