"""Plots of the results of `gpu_suite.py`; needs matplotlib.

python benchmarks/gpu_plots.py FOLDER/gpu.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import figures


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Three panels: WarpBlend's bandwidth, one clip, clips per second by batch. A panel without data stays empty.

    Args:
        result: the result of `gpu_suite.py`.
        path: the PNG to write.
    """
    figure = figures.new_figure(9.0, 10.0, dpi=130)
    bandwidth, clip, batches = figure.subplots(3)
    parts = {name: part.get("data") or {} for name, part in result["parts"].items()}
    _bandwidth(bandwidth, parts)
    _clip(clip, parts)
    _batches(batches, parts)
    for axes in (bandwidth, clip, batches):
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['gpu']}, PyTorch {result['versions'].get('torch', '?')}", fontsize="medium")
    figures.save_figure(figure, path)


def _bandwidth(axes: Any, parts: Mapping[str, Any]) -> None:
    ceiling = parts.get("ceilings", {}).get("copy", {}).get("bytes_per_second")
    speeds = parts.get("warp", {})
    names = [name for name in speeds if "40 frames" in name] or list(speeds)
    for shift, form in ((-0.2, "planar"), (0.2, "channels_last")):
        values = [speeds[name][form]["bytes_per_second"] / 1e12 for name in names]
        axes.barh([row + shift for row in range(len(names))], values, height=0.38, label=form.replace("_", " "))
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    if ceiling:
        axes.axvline(ceiling / 1e12, color="k", linewidth=1, label="device copy")
        axes.axvline(0.6 * ceiling / 1e12, color="k", linewidth=1, linestyle=":", label="60% of it")
    axes.set_xlabel("WarpBlend: bytes that must move, TB per second")
    axes.legend(fontsize="small", frameon=False, loc="lower right")


def _clip(axes: Any, parts: Mapping[str, Any]) -> None:
    names = [name for name, data in parts.items() if "seconds_to_prepare" in data and "clip" in data]
    seconds = [parts[name]["clip"]["median"] * 1e3 for name in names]
    axes.barh(names, seconds, color=["C1" if name.startswith("ours") else "C0" for name in names])
    for row, value in enumerate(seconds):
        text = f"{value:.1f} ms" + (f"  ({seconds[0] / value:.1f}x)" if row else "")
        axes.annotate(text, (value, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize="small")
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize="small")
    axes.set_xlabel("one clip at batch 1, ms")


def _batches(axes: Any, parts: Mapping[str, Any]) -> None:
    for way in (name for name in parts if name.startswith("batches")):
        by_batch = parts[way]
        points = sorted(
            (int(batch), int(batch) / one["clip"]["median"]) for batch, one in by_batch.items() if "clip" in one
        )
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=way)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("batch")
    axes.set_ylabel("clips per second")
    if axes.lines:
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small", frameon=False)


if __name__ == "__main__":
    source = figures.result_parser(__doc__).parse_args().result
    plot(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
