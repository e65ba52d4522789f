"""Plots of results; needs matplotlib (the extra `bench`).

python benchmarks/plots.py RESULT.json [precision]
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import figures

_PARTS = ("encode", "step", "decode")


def plot_latency(result: Mapping[str, Any], path: Path) -> None:
    """Stacked bars of the parts' medians, with every clip's total as a dot.

    Args:
        result: the result of `benchmarks/latency.py`.
        path: the PNG to write.
    """
    medians = {name: statistics.median(parts["clip"]) for name, parts in result["seconds"].items()}
    last = list(medians)[-1]
    texts = {
        name: f"{median:.1f} s" + ("" if name == last else f"  ({last} {median / medians[last]:.2f}x)")
        for name, median in medians.items()
    }
    _plot_clips(result, texts, path)


def plot_precision(result: Mapping[str, Any], path: Path) -> None:
    """The same for precisions, with each one's speed-up over the first and its PSNR against PyTorch.

    Args:
        result: the result of `benchmarks/precision.py`.
        path: the PNG to write.
    """
    texts = {
        name: f"{found['clip']:.1f} s, {found['ratio']:.2f}x, {found['frames_psnr']:.0f} dB"
        for name, found in result["found"].items()
    }
    _plot_clips(result, texts, path)


def _plot_clips(result: Mapping[str, Any], texts: Mapping[str, str], path: Path) -> None:
    """Stacked bars of the parts' medians, with every clip's total as a dot and a text beside it."""
    seconds, settings = result["seconds"], result["settings"]
    names = list(seconds)
    figure = figures.new_figure(7.0, 1.6 + 0.55 * len(names), dpi=150)
    axes = figure.subplots()
    left = [0.0] * len(names)
    for part in _PARTS:
        repeats = settings["steps"] if part == "step" else 1
        widths = [repeats * statistics.median(seconds[name][part]) for name in names]
        label = {"encode": "encode", "step": f"{repeats} steps", "decode": f"decode {settings['frames']} frames"}[part]
        axes.barh(names, widths, left=left, label=label, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, name in enumerate(names):
        samples = seconds[name]["clip"]
        axes.plot(samples, [row] * len(samples), "k.", markersize=4, label="each clip" if row == 0 else None)
        axes.annotate(
            texts[name], (max(*samples, left[row]), row), xytext=(6, 0), textcoords="offset points", va="center"
        )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(left))
    axes.set_xlabel("seconds per clip")
    axes.legend(loc="lower right", fontsize="small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    size = settings["image_size"]
    title = (
        f"{settings['frames']} frames of {size} x {size}, {settings['steps']} DDIM steps, {settings['threads']} threads"
    )
    axes.set_title(f"{title}\n{result['cpu']}", fontsize="small", loc="left")
    figures.save_figure(figure, path)


if __name__ == "__main__":
    parser = figures.result_parser(__doc__)
    parser.add_argument("kind", nargs="?", choices=("latency", "precision"), default="latency")
    given = parser.parse_args()
    plot = plot_precision if given.kind == "precision" else plot_latency
    plot(json.loads(given.result.read_text(encoding="utf-8")), given.result.with_suffix(".png"))
