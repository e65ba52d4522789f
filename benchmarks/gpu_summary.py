"""The GPU suite's result as Markdown tables, and as plots if matplotlib is installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu_plots import plot
from benchmarks.gpu_records import Record
from benchmarks.gpu_verdicts import NOT_MEASURED, floors, verdicts

_STAGES = ("encode", "step", "decode", "clip", "end_to_end")
#: Kernels per stage in the summary; the JSON has more.
_KERNELS = 12


def write_summary(result: Record, out: Path) -> None:
    """Write gpu.md and gpu.png into a folder."""
    (out / "gpu.md").write_text(summary(result), encoding="utf-8")
    if importlib.util.find_spec("matplotlib") is None:
        print("no plots: matplotlib is not installed", file=sys.stderr)
        return
    plot(result, out / "gpu.png")


def summary(result: Record) -> str:
    """A result as Markdown tables; missing values are marked as not measured."""
    settings, parts = result["settings"], result["parts"]
    chip = (parts.get("ceilings", {}).get("data") or {}).get("chip", {})
    weights = (parts.get("shared", {}).get("data") or {}).get("weights", "none were needed")
    versions = {**result["versions"], **chip.get("versions", {})}
    lines = [
        f"# {result['gpu']}, {result['date']}",
        "",
        *(["**A trial: its times mean nothing.**", ""] if settings["device"] != "cuda" or settings["tiny"] else []),
        f"Weights: {weights}. Budget: {settings['minutes']:g} minutes. {result['nvidia-smi']}",
        f"Versions: {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        "",
        "## Targets",
        "",
        *_table(
            ("what", "target", "measured", "met"),
            (
                (name, one["target"], _number(one["measured"]), {True: "yes", False: "no"}.get(one["met"], one["met"]))
                for name, one in verdicts(result).items()
            ),
        ),
        *_chip(result),
        *_ways(result),
        *_products(parts),
        *_batches(parts),
        *_kernels(parts),
        *_runs(parts),
    ]
    return "\n".join(lines) + "\n"


def _chip(result: Record) -> list[str]:
    ceilings = result["parts"].get("ceilings", {}).get("data") or {}
    rates = [(f"matrix product, {name}, TFLOP/s", f"{one['flops_per_second'] / 1e12:.1f}")
             for name, one in ceilings.get("matrix_product", {}).items()]  # fmt: skip
    if "copy" in ceilings:
        rates.append(("copy, read and written, TB/s", f"{ceilings['copy']['bytes_per_second'] / 1e12:.2f}"))
    rates += [(f"floor of {name}, fp16, ms", f"{1e3 * value:.3f}") for name, value in floors(result).items()]
    if not rates:
        return ["", "## The chip", "", f"Rates: {NOT_MEASURED}."]
    return ["", "## The chip", "", *_table(("measured", "value"), rates)]


def _ways(result: Record) -> list[str]:
    floor = floors(result).get("clip")
    rows = []
    for name, part in result["parts"].items():
        data = part.get("data") or {}
        if "seconds_to_prepare" not in data:
            continue
        times = [_milliseconds(data, stage) for stage in _STAGES]
        over = NOT_MEASURED
        if floor and "end_to_end" in data:
            over = f"{data['end_to_end']['median'] / floor:.1f}"
        parity = data.get("parity")
        psnr = _number(parity["psnr"]) if isinstance(parity, dict) else "–"
        launches = data.get("launched", {}).get("step", {}).get("launches", NOT_MEASURED)
        rows.append((name, *times, over, psnr, str(launches)))
    if not rows:
        return ["", "## One clip at batch 1", "", f"{NOT_MEASURED.capitalize()}."]
    head = ("way", *(f"{stage.replace('_', ' ')}, ms" for stage in _STAGES), "× floor", "PSNR, dB", "launches per step")
    return ["", "## One clip at batch 1", "", *_table(head, rows)]


def _batches(parts: Record) -> list[str]:
    rows = [
        (name, batch, _milliseconds(times, "step"), f"{int(batch) / times['clip']['median']:.1f}")
        for name in parts
        if name.startswith("batches")
        for batch, times in sorted((parts[name].get("data") or {}).items(), key=lambda item: int(item[0]))
    ]
    return ["", "## Batches", "", *_table(("way", "batch", "step, ms", "clips per second"), rows)] if rows else []


def _products(parts: Record) -> list[str]:
    rows = [
        (name, batch, _milliseconds(found, "end_to_end"), f"{int(batch) / found['end_to_end']['median']:.1f}",
         _number(found["psnr"]) if "psnr" in found else "–", f"{found['seconds_to_prepare']:.0f}")
        for name in parts
        if name.startswith("product")
        for batch, found in (parts[name].get("data") or {}).items()
    ]  # fmt: skip
    head = ("part", "batch", "end to end, ms", "clips per second", "PSNR of 8-bit frames, dB", "s to prepare")
    return ["", "## The target torch", "", *_table(head, rows)] if rows else []


def _kernels(parts: Record) -> list[str]:
    lines = []
    for name in ("ours-fp16-compiled", "ours-fp16"):
        for stage, found in ((parts.get(name, {}).get("data") or {}).get("launched") or {}).items():
            rows = [
                (one["name"].replace("|", "\\|"), str(one["launches"]), f"{1e6 * one['seconds']:.0f}")
                for one in found["kernels"][:_KERNELS]
            ]
            title = f"## Kernels of {name}, {stage}: {found['launches']} launches, {1e3 * found['seconds']:.2f} ms"
            lines += ["", title, "", *_table(("kernel", "launches", "µs"), rows)]
    return lines


def _runs(parts: Record) -> list[str]:
    rows = [
        (name, part["status"], f"{part.get('seconds', 0):.1f}",
         (part.get("error") or part.get("reason") or "").partition("\n")[0].replace("|", "\\|"))
        for name, part in parts.items()
    ]  # fmt: skip
    lines = ["", "## Parts", "", *_table(("part", "status", "seconds", "why"), rows)]
    for name, part in parts.items():
        if part["status"] == "failed":
            lines += ["", f"### The end of {name}'s output", "", "```", *part.get("last_lines", []), "```"]
    return lines


def _milliseconds(data: Record, stage: str) -> str:
    return f"{1e3 * data[stage]['median']:.3f}" if stage in data else NOT_MEASURED


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else "the same" if value is None else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
