"""The table of docs/targets.md has the figures of benchmarks/results."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

import pytest

from lfdm_export.engines.targets import TARGETS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in (ROOT / "docs" / "targets.md").read_text().partition("## Size, time and accuracy")[2].splitlines()
    if re.match(r"\| .* \| .* \| .* \| .* \| .* \| .*\|$", line)
][1:]


def row(target, precision, hardware):
    found = [cells for cells in ROWS if cells[0] == target and cells[1] == precision and cells[5] == hardware]
    assert len(found) == 1
    return found[0]


def found_by(name):
    return json.loads((RESULTS / name).read_text())["found"]


@pytest.mark.parametrize(
    ("measured", "found", "hardware"),
    [(name, found, "CPU") for name, found in found_by("precision.json").items()]
    + [(name, one, "CPU, other run") for name, one in found_by("precision_torch.json").items() if "PyTorch" in name],
)
def test_times_on_a_cpu_are_those_of_the_benchmark(measured, found, hardware):
    precision, title = measured.split(", ")
    (target,) = [spec.name for spec in TARGETS if spec.title == title]
    cells = row(f"`{target}`", precision, hardware)
    assert cells[3] == f"{found['clip']:.2f} s"
    assert cells[4] == f"{found['frames_psnr']:.1f} dB"


def test_the_time_of_pytorch_is_that_of_the_benchmark():
    seconds = json.loads((RESULTS / "latency.json").read_text())["seconds"]["PyTorch"]["clip"]
    assert row("PyTorch, not exported", "fp32", "CPU")[3] == f"{statistics.median(seconds):.1f} s"


def test_the_time_on_a_gpu_is_that_of_its_run():
    ways = (RESULTS / "gpu" / "2026-11-27-h200-c" / "gpu.md").read_text()
    [(one, psnr)] = re.findall(r"\| product-fp16 \| 1 \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", ways)
    [eight] = re.findall(r"\| product-fp16-batch \| 8 \| ([\d.]+) \|", ways)
    cells = row("`torch`", "fp16", "H200")
    assert cells[3] == f"{float(one):.1f} ms (batch of 8: {float(eight):.0f} ms)"
    assert cells[4].startswith(f"{psnr} dB")


def test_every_target_has_a_row_and_no_row_an_unknown_one():
    named = {name for cells in ROWS for name in re.findall(r"^`([^`]+)`", cells[0])}
    assert named == {spec.name for spec in TARGETS}


def test_what_has_no_hardware_was_not_measured():
    for cells in ROWS:
        if not cells[5]:
            assert cells[3] == "not measured"
            assert cells[4].startswith("not measured")
