"""A report as one self-contained page: no script, no external resources, light and dark.

Labels, provenance and file names are untrusted; every string goes through `html.escape`.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from lfdm_export.parity.report.charts import bar, bar_scale, step_chart
from lfdm_export.parity.report.checks import CHAIN, Check, Pictures, nearest, number, output_rows, sentence

if TYPE_CHECKING:
    from lfdm_export.parity.report.model import Report

#: Factor by which the shown difference of two frames is amplified.
MAGNIFIED = 64
# Maximum length of a shown text, and of a shown list.
_LONGEST, _MOST_LABELS = 400, 60


def page(report: Report) -> str:
    """The whole HTML document."""
    template = Template(files("lfdm_export.parity.report").joinpath("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=_text(f"Parity of {report.bundle}: {'passed' if report.passed else 'FAILED'}"),
        bundle=_text(report.bundle),
        summary=_text(
            f"{report.precision} · {report.engine} against {report.reference} · {_date(report.date)} · "
            f"seed {report.seed}"
        ),
        verdict=_verdict(report),
        stages=_stages(report),
        clip=_clip(report) + _others(report),
        pictures="" if report.pictures is None else _pictures(report.pictures),
        facts=_facts(report),
    )


def _text(value: object) -> str:
    """Any text as HTML, cut if it is too long."""
    text = str(value)
    return escape(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def _date(date: str) -> str:
    """2026-01-31T12:34:56+00:00 -> 2026-01-31 12:34 UTC."""
    return f"{date[:10]} {date[11:16]} UTC"


def _verdict(report: Report) -> str:
    word, style = ("Passed", "") if report.passed else ("Failed", " failed")
    items = "".join(
        f"<li><b>{_text(stage)}</b>: {_text(measured)}.<br><i>{_text(sentence(meaning))}</i></li>"
        for stage, measured, meaning in report.explanations()
    )
    listed = f"<ul>{items}</ul>" if items else ""
    return (
        f'<section class="verdict{style}"><strong>{word}</strong>'
        f"<p>{_text(sentence(report.verdict))}</p>{listed}</section>"
    )


def _stages(report: Report) -> str:
    rows, named = [], ""
    for check, alone, bad in output_rows(report.checks):
        rows.append(_stage_row(check, alone, first=check.stage != named, bad=bad))
        named = check.stage
    head = (
        '<tr><th>stage</th><th>output</th><th class="n">largest</th><th class="n">mean</th><th class="n">relative</th>'
        f'<th class="n">allowed</th><th>{bar_scale()}</th><th class="n">alone</th><th></th></tr>'
    )
    return (
        "<section><h2>Stages</h2>"
        '<p class="soft small">Error of each output on random inputs. Relative: the largest error over the '
        "reference's largest magnitude, or over 1 if that is greater. Alone: a sample alone against the same one in "
        f'a batch of two.</p><div class="scroll"><table class="stages">{head}{"".join(rows)}</table></div></section>'
    )


def _stage_row(check: Check, alone: Check | None, *, first: bool, bad: bool) -> str:
    numbers = (check.max_abs, check.mean_abs, check.found, check.allowed)
    if check.kind != "values":
        numbers = (None, None, None, None)
    cells = "".join(f'<td class="n">{number(value)}</td>' for value in numbers)
    stage = f"<code>{_text(check.stage)}</code>" if first else ""
    beside = "–" if alone is None else number(alone.found)
    drawn = bar(check) if check.kind == "values" else ""
    style = f"{'row1' if first else ''}{' bad' if bad else ''}"
    return (
        f'<tr class="{style}"><td>{stage}</td><td><code>{_text(check.subject)}</code></td>{cells}'
        f'<td class="wide">{drawn}</td><td class="n">{beside}</td><td class="mark">{"✗" if bad else "✓"}</td></tr>'
    )


def _clip(report: Report) -> str:
    checks = [check for check in report.checks if check.stage == CHAIN]
    rows = "".join(_clip_row(check) for check in checks)
    limits = [
        next((check.allowed for check in checks if check.subject.startswith("latent") and word in check.subject), None)
        for word in ("largest", "mean")
    ]
    chart = step_chart(report.steps, limits[0], limits[1]) if report.steps else ""
    return (
        f'<section><h2>A whole clip</h2><p class="soft small">{_text(report.sampler)}; the same noise on both sides. '
        f"Error of the latent after each step:</p>{chart}"
        '<div class="scroll"><table><tr><th>quantity</th><th class="n">found</th><th class="n">allowed</th><th></th>'
        f"<th></th></tr>{rows}</table></div></section>"
    )


def _clip_row(check: Check) -> str:
    unit = f" {check.unit}" if check.unit else ""
    found = check.meaning if check.found is None else f"{number(check.found)}{unit}"
    return (
        f'<tr class="{"" if check.passed else "bad"}"><td>{_text(check.subject)}</td>'
        f'<td class="n{" wrap" if check.found is None else ""}">{_text(found)}</td>'
        f'<td class="n">{check.limit}</td><td class="wide">{bar(check)}</td>'
        f'<td class="mark">{check.mark}</td></tr>'
    )


def _others(report: Report) -> str:
    """Further engines: the check nearest to its limit, or why they did not run."""
    if not report.others:
        return ""
    rows = []
    for other in report.others:
        worst = nearest(other.checks)
        if other.lacking:
            said, drawn, mark = f"not run: {other.lacking}", "", ""
        else:
            said = "" if worst is None else f"{worst.stage} {worst.subject}"
            drawn, mark = "" if worst is None else bar(worst), "✓" if other.passed else "✗"
        rows.append(
            f'<tr class="{"" if other.passed else "bad"}"><td>{_text(other.name)}</td>'
            f'<td class="wrap">{_text(said)}</td><td class="wide">{drawn}</td><td class="mark">{mark}</td></tr>'
        )
    return (
        '<section><h2>Other engines</h2><p class="soft small">The same checks, with the same inputs and tolerances; '
        "shown is the one nearest to its limit.</p>"
        f'<div class="scroll"><table><tr><th>engine</th><th>nearest to its limit</th><th></th><th></th></tr>'
        f"{''.join(rows)}</table></div></section>"
    )


def _pictures(pictures: Pictures) -> str:
    strip = ["<span></span>", *(f"<figcaption>{word}</figcaption>" for word in ("PyTorch", "export", "difference"))]
    rows = []
    magnified = (np.clip(pictures.difference * MAGNIFIED, 0, 1) * 255).round().astype(np.uint8)
    for index, frame in enumerate(pictures.frames):
        strip.append(f'<span class="soft small">frame {frame + 1}</span>')
        strip += [
            _image(images[index], f"{word}, frame {frame + 1}")
            for word, images in (("PyTorch", pictures.expected), ("export", pictures.found), ("difference", magnified))
        ]
        rows += [
            f'<span class="soft small">frame {frame + 1}</span>',
            _image(pictures.panels[index], f"panels of frame {frame + 1}"),
        ]
    heads = "".join(f"<span>{word}</span>" for word in ("source", "generated", "warped", "grid", "occlusion"))
    return (
        f'<section><h2>Frames</h2><p class="soft small">The difference is amplified {MAGNIFIED} times: '
        f'white is 1/{MAGNIFIED} of full brightness, black is none.</p><div class="strip">{"".join(strip)}</div>'
        "</section>"
        '<section><h2>How the export made them</h2><p class="soft small">The grid shows from where in the source each '
        "point is fetched; occlusion is white where the warped source is kept, black where the decoder inpaints.</p>"
        f'<div class="panels"><span></span><div class="heads soft small">{heads}</div>{"".join(rows)}</div></section>'
    )


def _image(pixels: NDArray[np.uint8], description: str) -> str:
    """(H, W, 3) uint8 as a PNG inside the page."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{_text(description)}" src="data:image/png;base64,{data}">'


def _facts(report: Report) -> str:
    labels = [f"<code>{_text(label)}</code>" for label in report.labels[:_MOST_LABELS]]
    if len(report.labels) > _MOST_LABELS:
        labels.append(f"and {len(report.labels) - _MOST_LABELS} more")
    return (
        '<section><h2>Where and with what</h2><div class="two">'
        f"<div>{_table('Here', report.environment)}{_table('Sizes', report.geometry)}</div>"
        f"<div>{_table('Exported with', report.exported_with)}{_table('The weights', report.provenance)}</div></div>"
        f'<h3>Labels</h3><p class="tags">{"".join(labels) or "none"}</p></section>'
    )


def _table(title: str, facts: Mapping[str, object]) -> str:
    rows = "".join(
        f'<tr><td class="soft">{_text(name)}</td><td class="wrap">{_text(value)}</td></tr>'
        for name, value in _flat(facts, "")
    )
    return f"<h3>{title}</h3><table>{rows or '<tr><td>nothing known</td></tr>'}</table>"


def _flat(facts: Mapping[str, object], prefix: str) -> list[tuple[str, object]]:
    """Nested objects as rows; lists and other values as JSON."""
    rows: list[tuple[str, object]] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name} · ")
        else:
            plain = isinstance(value, str | int | float)
            rows.append((prefix + name, value if plain else json.dumps(value, default=str)))
    return rows
