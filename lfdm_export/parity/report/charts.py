"""The page's two charts as inline SVG; colors come from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from lfdm_export.parity.report.checks import Check, StepError, number

# Powers of ten of the bars' range: from a millionth of the allowed value to ten times it.
_LOWEST, _HIGHEST = -6.0, 1.0
_BAR_WIDTH, _BAR_HEIGHT = 300.0, 16.0
_CHART_WIDTH, _CHART_HEIGHT = 960.0, 300.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 62.0, 130.0, 14.0, 40.0


def bar(check: Check) -> str:
    """A check's error as a share of the allowed value, on a logarithmic scale with a red line at 1."""
    share = check.share
    if share is None:
        return ""
    limit = _bar_position(1.0)
    length = _bar_position(share)
    over = " over" if share > 1 else ""
    ticks = "".join(
        f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="1" y2="{_BAR_HEIGHT - 1:g}"/>'
        for x in (_bar_position(10.0**power) for power in range(-5, 0))
    )
    return (
        f'<svg viewBox="0 0 {_BAR_WIDTH:g} {_BAR_HEIGHT:g}" role="img" aria-label="{share:.2g} of what is allowed">'
        f'<rect class="track" x="0" y="4" width="{_BAR_WIDTH:g}" height="8" rx="2"/>{ticks}'
        f'<rect class="bar{over}" x="0" y="4" width="{length:.1f}" height="8" rx="2"/>'
        f'<line class="limit" x1="{limit:.1f}" x2="{limit:.1f}" y1="0" y2="{_BAR_HEIGHT:g}"/></svg>'
    )


def bar_scale() -> str:
    """The axis above a column of bars."""
    labels = "".join(
        f'<text x="{_bar_position(10.0**power):.1f}" y="11" text-anchor="middle">{text}</text>'
        for power, text in ((-5, "10⁻⁵"), (-4, "10⁻⁴"), (-3, "10⁻³"), (-2, "1%"), (-1, "10%"), (0, "limit"))
    )
    return f'<svg viewBox="0 0 {_BAR_WIDTH:g} 14" role="img" aria-label="share of what is allowed">{labels}</svg>'


def _bar_position(share: float) -> float:
    power = math.log10(share) if share > 0 else _LOWEST
    return _BAR_WIDTH * (min(max(power, _LOWEST), _HIGHEST) - _LOWEST) / (_HIGHEST - _LOWEST)


def step_chart(steps: Sequence[StepError], largest_allowed: float | None, mean_allowed: float | None) -> str:
    """Largest and mean error of the latent after each step with their limits, on a logarithmic scale."""
    series = (
        ("first", "largest", [step.max_abs for step in steps], largest_allowed),
        ("second", "mean", [step.mean_abs for step in steps], mean_allowed),
    )
    shown = [value for _, _, values, limit in series for value in (*values, limit) if value]
    if not shown:
        return '<p class="soft">No error at any step.</p>'
    low, high = math.floor(math.log10(min(shown)) - 0.1), math.ceil(math.log10(max(shown)) + 0.1)
    parts = [_decades(low, high), _step_labels(steps)]
    for name, word, values, limit in series:
        if limit:
            parts.append(_limit(name, f"{word}, allowed", _height(limit, low, high)))
        parts.append(_line(name, word, values, low, high))
    return (
        f'<svg viewBox="0 0 {_CHART_WIDTH:g} {_CHART_HEIGHT:g}" role="img" '
        f'aria-label="error of the latent after each step">{"".join(parts)}</svg>'
    )


def _height(value: float, low: int, high: int) -> float:
    power = min(max(math.log10(value), low), high) if value > 0 else low
    return _TOP + (_CHART_HEIGHT - _TOP - _BOTTOM) * (high - power) / (high - low)


def _across(index: int, count: int) -> float:
    return _LEFT + 24 + (_CHART_WIDTH - _LEFT - _RIGHT - 48) * (index / (count - 1) if count > 1 else 0.5)


def _decades(low: int, high: int) -> str:
    lines = []
    for power in range(low, high + 1):
        y = _height(10.0**power, low, high)
        lines.append(f'<line class="grid" x1="{_LEFT:g}" x2="{_CHART_WIDTH - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
        lines.append(f'<text x="{_LEFT - 8:g}" y="{y + 4:.1f}" text-anchor="end">10{raised}</text>')
    return "".join(lines)


def _step_labels(steps: Sequence[StepError]) -> str:
    """Step and timestep below the chart, as many as fit."""
    every = math.ceil(len(steps) / 20)
    base = _CHART_HEIGHT - _BOTTOM
    labels = [
        f'<text x="{_across(index, len(steps)):.1f}" y="{base + 16:g}" text-anchor="middle">{index + 1}</text>'
        f'<text x="{_across(index, len(steps)):.1f}" y="{base + 31:g}" text-anchor="middle">t {step.timestep}</text>'
        for index, step in enumerate(steps)
        if index % every == 0 or index == len(steps) - 1
    ]
    return "".join((f'<text x="{_LEFT - 8:g}" y="{base + 16:g}" text-anchor="end">step</text>', *labels))


def _limit(name: str, text: str, y: float) -> str:
    end = _CHART_WIDTH - _RIGHT
    return (
        f'<line class="{name} limit" x1="{_LEFT:g}" x2="{end:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        f'<text class="{name}" x="{end + 8:g}" y="{y + 4:.1f}">{escape(text)}</text>'
    )


def _line(name: str, text: str, values: Sequence[float | None], low: int, high: int) -> str:
    points = [
        (_across(index, len(values)), _height(value, low, high), value)
        for index, value in enumerate(values)
        if value is not None
    ]
    if not points:
        return ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points)
    dots = "".join(
        f'<circle class="{name} dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{text} {number(value)}</title></circle>'
        for x, y, value in points
    )
    y = points[-1][1]
    label = f'<text class="{name}" x="{_CHART_WIDTH - _RIGHT + 8:g}" y="{y + 4:.1f}">{escape(text)}</text>'
    return f'<polyline class="{name}" points="{path}"/>{dots}{label}'
