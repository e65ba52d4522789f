"""Pictures of results by matplotlib (the extra `bench`), which is imported when the first is drawn."""

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
    """End the program with a sentence where matplotlib is not installed: before measuring, so that it costs no hour."""
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("plotting needs matplotlib: pip install 'lfdm-export[bench]', or give --no-plot")


def new_figure(width: float, height: float, dpi: int) -> Figure:
    """An empty figure, in inches, that no window shows."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with replacing(path) as stream:
        figure.savefig(stream, format="png")


def result_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the scripts that draw a result again: its file, which gets a PNG beside it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, metavar="RESULT.json", help="the picture goes beside it")
    return parser
