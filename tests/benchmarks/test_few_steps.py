"""The comparison of clips of few steps, on the shipped model's bundle."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import few_steps
from lfdm_export.bundle import ready


def test_every_number_of_steps_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "few.json"
    options = ["--steps", "1,3", "--rounds", "2", "--threads", "1", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["few_steps.py", str(ready.unpack()), *options])
    assert few_steps.main() == 0
    [bundle] = json.loads(out.read_text())["bundles"]
    assert (bundle["precision"], bundle["frames"], bundle["image_size"]) == ("fp32", 16, 64)
    times = {
        count: {part: len(values) for part, values in seconds.items()} for count, seconds in bundle["seconds"].items()
    }
    once = {"encode": 2, "decode": 2, "clip": 2, "clip_cpu": 2}
    assert times == {"1": {**once, "step": 2}, "3": {**once, "step": 6}}
    assert "3 steps" in capsys.readouterr().out


@pytest.mark.parametrize("value", ["0", "two", "1,,2", ""])
def test_numbers_of_steps_are_checked(
    value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["few_steps.py", str(tmp_path), "--steps", value])
    with pytest.raises(SystemExit):
        few_steps.main()
    assert "expected numbers of steps such as 1,2,4,10" in capsys.readouterr().err
