"""The fuzzer: its cases can be repeated, and it detects all kinds of failures."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz
from lfdm_export.errors import InputError


def test_cases_depend_only_on_their_numbers(tmp_path: Path):
    data = bytes(range(256)) * 20
    made = [fuzz.damaged(data, random.Random(f"x:{number}")) for number in range(50)]
    assert made == [fuzz.damaged(data, random.Random(f"x:{number}")) for number in range(50)]
    assert len({*made}) > 40
    plain = {"a": [1, {"b": "c"}], "d": None}
    assert repr(fuzz.rearranged(plain, random.Random(7))) == repr(fuzz.rearranged(plain, random.Random(7)))
    assert plain == {"a": [1, {"b": "c"}], "d": None}


@pytest.mark.parametrize(
    ("error", "outcome"), [(InputError("ours"), "refused"), (KeyError("theirs"), "foreign:KeyError")]
)
def test_errors_are_distinguished(error: Exception, outcome: str):
    def run() -> None:
        raise error

    assert fuzz._outcome(run).startswith(outcome)
    assert fuzz._outcome(lambda: None) == "taken"


@pytest.mark.parametrize("target", ["json", "request", "picture", "clip"])
def test_every_case_passes(target: str):
    found = list(fuzz.cases((sys.executable, fuzz.__file__, "--child", target, "0", "20")))
    assert [number for number, _ in found] == list(range(20))
    assert {outcome for _, outcome in found} <= {"taken", "refused"}


@pytest.mark.parametrize(
    ("code", "seconds", "outcome"),
    [
        ("import os; os.abort()", 120, "crash:-6"),
        ("import time; time.sleep(1000)", 0.2, "hang"),
        ("print('end taken', 1 << 40, flush=True)", 120, "grown"),
    ],
)
def test_failed_children_are_detected(code: str, seconds: float, outcome: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(fuzz, "SECONDS", seconds)
    assert list(fuzz.cases((sys.executable, "-c", f"print('begin 3', flush=True); {code}"))) == [(3, outcome)]
