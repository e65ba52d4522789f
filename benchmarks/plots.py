"""Pictures of results; needs matplotlib (the extra `bench`).

python benchmarks/plots.py RESULT.json
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_PARTS = ("encode", "step", "decode")


def plot_latency(result: Mapping[str, Any], path: Path) -> None:
    """Stacked bars of the parts' medians, with every clip's total as a dot.

    Args:
        result: what `benchmarks/latency.py` wrote.
        path: the PNG to write.
    """
    seconds, settings = result["seconds"], result["settings"]
    names = list(seconds)
    figure = Figure(figsize=(7.0, 1.6 + 0.55 * len(names)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = [0.0] * len(names)
    for part in _PARTS:
        repeats = settings["steps"] if part == "step" else 1
        widths = [repeats * statistics.median(seconds[name][part]) for name in names]
        label = {"encode": "encode", "step": f"{repeats} steps", "decode": f"decode {settings['frames']} frames"}[part]
        axes.barh(names, widths, left=left, label=label, height=0.6)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    medians = [statistics.median(seconds[name]["clip"]) for name in names]
    for row, name in enumerate(names):
        samples = seconds[name]["clip"]
        axes.plot(samples, [row] * len(samples), "k.", markersize=4, label="each clip" if row == 0 else None)
        text = f"{medians[row]:.1f} s"
        if row < len(names) - 1:
            text += f"  (bundle {medians[row] / medians[-1]:.2f}x)"
        axes.annotate(text, (max(*samples, left[row]), row), xytext=(6, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(left))
    axes.set_xlabel("seconds a clip")
    axes.legend(loc="lower right", fontsize="small", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    size = settings["image_size"]
    title = (
        f"{settings['frames']} frames of {size} x {size}, {settings['steps']} DDIM steps, {settings['threads']} threads"
    )
    axes.set_title(f"{title}\n{result['cpu']}", fontsize="small", loc="left")
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(path)


if __name__ == "__main__":
    source = Path(sys.argv[1])
    plot_latency(json.loads(source.read_text()), source.with_suffix(".png"))
