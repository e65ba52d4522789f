"""A report for the terminal: readable in 80 columns, with failures emphasized."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from lfdm_export.parity.report.checks import CHAIN, Check, nearest, number, output_rows, percent, sentence

if TYPE_CHECKING:
    from lfdm_export.parity.report.model import Report

_GOOD, _BAD, _DIM = "green", "bold red", "dim"
# Shown instead of numbers if a stage has none.
_WITHOUT_NUMBERS = {"interface": "unfit", "finite": "NaN", "values": "NaN"}


def table(report: Report) -> RenderableType:
    """Tables of the stages and the clip, the failures with their meaning, the verdict."""
    parts: list[RenderableType] = [
        Text(f"compared with {report.reference}; seed {report.seed}", style=_DIM),
        _stages(report),
        _clip(report),
    ]
    if report.others:
        parts.append(_others(report))
    parts += [
        Text(f"✗ {stage}: ", style=_BAD) + Text(f"{measured}. ") + Text(sentence(meaning), style="italic")
        for stage, measured, meaning in report.explanations()
    ]
    mark = Text("✓ passed: ", style=_GOOD) if report.passed else Text("✗ FAILED: ", style=_BAD)
    parts.append(mark + Text(report.verdict, style="" if report.passed else _BAD))
    return Group(*parts)


def _stages(report: Report) -> Table:
    """One row per output, or a row with the reason why a stage's outputs could not be compared."""
    shown = _grid("stage", "output", "error", "mean", "allowed", "used", "alone", "")
    named = ""
    for check, alone, bad in output_rows(report.checks):
        cells = [check.stage if check.stage != named else "", check.subject, *_numbers(check)]
        cells += ["–" if alone is None else number(alone.found), "✗" if bad else "✓"]
        shown.add_row(*_styled(cells, bad=bad))
        named = check.stage
    return shown


def _numbers(check: Check) -> list[str]:
    """Error, mean, allowed, share."""
    if check.kind != "values" or check.found is None:
        return [_WITHOUT_NUMBERS[check.kind], "", "", ""]
    share = check.share
    return [
        number(check.found),
        number(check.mean_abs),
        number(check.allowed),
        "–" if share is None else percent(share),
    ]


def _clip(report: Report) -> Table:
    """One row per quantity of the whole clip."""
    shown = _grid(f"clip ({report.sampler})", "found", "allowed", "used", "")
    for check in report.checks:
        if check.stage != CHAIN:
            continue
        unit = f" {check.unit}" if check.unit else ""
        found = check.meaning if check.found is None and check.passed else f"{number(check.found)}{unit}"
        share = check.share
        cells = [check.subject, found, check.limit, "" if share is None else percent(share), check.mark]
        shown.add_row(*_styled(cells, bad=not check.passed))
    return shown


def _others(report: Report) -> Table:
    """One row per engine: the check nearest to its limit, or why it did not run."""
    shown = _grid("other engines", "nearest to its limit", "used", "")
    for other in report.others:
        if other.lacking:
            shown.add_row(Text(other.name, style=_DIM), Text(f"not run: {other.lacking}", style=_DIM), "", "")
            continue
        worst = nearest(other.checks)
        subject = "" if worst is None else f"{worst.stage} {worst.subject}"
        share = None if worst is None else worst.share
        cells = [other.name, subject, "–" if share is None else percent(share), "✓" if other.passed else "✗"]
        shown.add_row(*_styled(cells, bad=not other.passed))
    return shown


def _grid(*titles: str) -> Table:
    """A table whose first one or two columns are words and all others numbers."""
    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold", show_edge=False)
    for index, title in enumerate(titles):
        words = index == 0 or title in ("output", "nearest to its limit")
        grid.add_column(Text(title), justify="left" if words else "right", no_wrap=not words, overflow="fold")
    return grid


def _styled(cells: list[str], *, bad: bool) -> list[Text]:
    if bad:
        return [Text(cell, style=_BAD) for cell in cells]
    return [*map(Text, cells[:-1]), Text(cells[-1], style=_GOOD)]
