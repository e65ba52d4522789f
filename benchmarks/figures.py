"""Plots of results by matplotlib (the extra `bench`), which is imported for the first plot."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from lfdm_export.files.atomic import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def need_matplotlib() -> None:
    """Exit with a message if matplotlib is not installed; called before a long measurement."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("plotting needs matplotlib: pip install 'lfdm-export[bench]', or give --no-plot")


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """An empty figure of a size in inches, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG atomically."""
    with replacing(path) as stream:
        figure.savefig(stream, format="png")


def result_parser(description: str | None) -> argparse.ArgumentParser:
    """The argument parser of scripts that plot a result file; the PNG is written beside it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="the plot is written beside it")
    return parser
