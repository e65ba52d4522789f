"""Plots of throughput results; needs matplotlib (the extra `bench`).

python benchmarks/throughput_plots.py RESULT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_throughput(result: Mapping[str, Any], path: Path) -> None:
    """Goodput, latency tails, closed loop and first frames, per contestant.

    Args:
        result: the result of `benchmarks/throughput.py`.
        path: the PNG to write.
    """
    figure = figures.new_figure(10.0, 7.0, dpi=130)
    ((goodput, tails), (closed, streams)) = figure.subplots(2, 2)
    names = result["settings"]["contestants"]
    limited = [cell for cell in result["open"] if cell["deadline"] is not None]
    if limited:
        groups = [f"{cell['rate']:.2f} requests/s\n(load {cell['load']:g})" for cell in limited]
        _bars(
            goodput, names, groups, [[cell["results"][name]["good_per_second"] for cell in limited] for name in names]
        )
        goodput.set_title(f"clips within {limited[0]['deadline']:.2f} s, per second", fontsize="small", loc="left")
    for cell in result["open"]:
        if cell["deadline"] is None:
            _tails(tails, cell, names)
    if result["closed"]:
        groups = [f"{cell['concurrency']} clients" for cell in result["closed"]]
        rates = [[cell["results"][name]["clips_per_second"] for cell in result["closed"]] for name in names]
        _bars(closed, names, groups, rates)
    closed.set_title("closed loop: clips per second", fontsize="small", loc="left")
    first = [result["streams"]["results"][name]["first_frame"] for name in names]
    heights = [[one[key] if one else 0.0 for key in ("p50", "p90", "p99")] for one in first]
    _bars(streams, names, ["p50", "p90", "p99"], heights)
    title = f"streams, {result['streams']['rate']:.2f}/s: seconds to the first frames"
    streams.set_title(title, fontsize="small", loc="left")
    settings = result["settings"]
    steps = "–".join(map(str, settings["steps"]))
    figure.suptitle(
        f"POLICY:SLOTS; clips of {steps} steps, a quarter of them guided; small model; "
        f"{settings['threads']} thread(s) per engine; {result['cpu']}",
        fontsize="small",
    )
    figures.save_figure(figure, path)


def _bars(axes: Axes, names: Sequence[str], groups: Sequence[str], heights: Sequence[Sequence[float]]) -> None:
    """Grouped bars: one color per contestant, one group per load."""
    width = 0.8 / len(names)
    for index, (name, row) in enumerate(zip(names, heights, strict=True)):
        places = np.arange(len(groups)) + (index - (len(names) - 1) / 2) * width
        bars = axes.bar(places, row, width, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=6)
    axes.set_xticks(range(len(groups)), groups, fontsize="small")
    axes.legend(fontsize="x-small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


def _tails(axes: Axes, cell: Mapping[str, Any], names: Sequence[str]) -> None:
    """Share of requests that took longer than a number of seconds."""
    for name in names:
        latencies = np.sort(cell["results"][name]["latencies"])
        axes.step(latencies, 1 - np.arange(1, len(latencies) + 1) / max(1, len(latencies)), where="post", label=name)
    axes.set_yscale("log")
    axes.set_ylim(0.008, 1.0)
    axes.set_xlabel("seconds", fontsize="small")
    title = f"no deadline, {cell['rate']:.2f} requests/s (load {cell['load']:g}): share that took longer"
    axes.set_title(title, fontsize="small", loc="left")
    axes.legend(fontsize="x-small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    source = figures.result_parser(__doc__).parse_args().result
    plot_throughput(json.loads(source.read_text(encoding="utf-8")), source.with_suffix(".png"))
