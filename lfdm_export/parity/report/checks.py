"""What a verification found: the checks, the errors of the steps, other engines, pictures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

#: The stage name of checks that concern a whole clip.
CHAIN = "chain"

#: "interface": names, dtypes and shapes; "finite": no NaN or infinity; "values": error against PyTorch;
#: "batch": a sample alone against the same sample in a batch; "clip": a quantity of a whole clip.
Kind = Literal["interface", "finite", "values", "batch", "clip"]


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        stage: name of the stage, or CHAIN.
        kind: kind of the check.
        subject: output or quantity that was measured.
        passed: whether the check passed.
        found: the measured value; None if nothing could be measured.
        allowed: the largest value of `found` that passes, or the smallest (`at_least`); None if it is only reported.
        unit: unit of `found`; "" for a plain number. Stage errors are relative to max(1, `scale`).
        max_abs, mean_abs: absolute errors, if `found` is relative.
        scale: largest magnitude of the reference, for stage errors.
        compared: number of compared values.
        meaning: what a failure means, or why nothing was measured; "" if it passed.
        at_least: a larger `found` is better, as a signal-to-error ratio in dB.
    """

    stage: str
    kind: Kind
    subject: str
    passed: bool
    found: float | None = None
    allowed: float | None = None
    unit: str = ""
    max_abs: float | None = None
    mean_abs: float | None = None
    scale: float | None = None
    compared: int = 0
    meaning: str = ""
    at_least: bool = False

    @property
    def judged(self) -> bool:
        """Whether the check can fail; else its value is only reported."""
        return self.kind != "clip" or self.allowed is not None or not self.passed

    @property
    def share(self) -> float | None:
        """`found` as a share of `allowed`; above 1 is a failure. For a ratio in dB: the share of the error."""
        if self.found is None or not self.allowed:
            return None
        return 10 ** ((self.allowed - self.found) / 20) if self.at_least else self.found / self.allowed

    @property
    def mark(self) -> str:
        """How it ended, as one character; "" if it cannot fail."""
        return "" if not self.judged else "✓" if self.passed else "✗"

    @property
    def limit(self) -> str:
        """The allowed value, in a few characters."""
        return f"≥ {number(self.allowed)}" if self.at_least and self.allowed is not None else number(self.allowed)


@dataclass(frozen=True)
class StepError:
    """Error of the latent after one sampling step.

    Attributes:
        timestep: training step that was the network's input.
        max_abs, mean_abs: maximum and mean of the latent's |error|; None if it is not finite.
    """

    timestep: int
    max_abs: float | None
    mean_abs: float | None


@dataclass(frozen=True)
class OtherEngine:
    """The result of a further engine.

    Attributes:
        name: name of the engine, and where it ran.
        checks: its checks; none if it did not run.
        lacking: why it did not run, and what to do; "" if it ran.
    """

    name: str
    checks: tuple[Check, ...] = ()
    lacking: str = ""

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


@dataclass(frozen=True, eq=False)
class Pictures:
    """The clip on the page, for K of its frames.

    Attributes:
        frames: numbers of the frames.
        expected, found: PyTorch's and the export's, (K, H, W, 3) uint8.
        difference: |difference| of the unrounded frames, (K, H, W, 3) float32.
        panels: source, frame, warped image, deformed grid and occlusion of the export, (K, H, 5W, 3) uint8.
    """

    frames: tuple[int, ...]
    expected: NDArray[np.uint8]
    found: NDArray[np.uint8]
    difference: NDArray[np.float32]
    panels: NDArray[np.uint8]


def nearest(checks: Iterable[Check]) -> Check | None:
    """The check nearest to its limit, or farthest beyond it; None if none has a limit."""
    limited = [check for check in checks if check.share is not None]
    return max(limited, key=lambda check: check.share or 0.0, default=None)


def output_rows(checks: Iterable[Check]) -> list[tuple[Check, Check | None, bool]]:
    """The stages' outputs that the report shows.

    Returns:
        Each output's check, or the one that kept it from being compared; the check of a sample alone, if any; whether
        one of the two failed.
    """
    of_stages = [check for check in checks if check.stage != CHAIN]
    alone = {(check.stage, check.subject): check for check in of_stages if check.kind == "batch"}
    rows = []
    for check in of_stages:
        if check.kind == "values" or (not check.passed and check.kind != "batch"):
            beside = alone.get((check.stage, check.subject))
            rows.append((check, beside, not check.passed or (beside is not None and not beside.passed)))
    return rows


def percent(share: float) -> str:
    """A share of a tolerance, short enough for a table."""
    if share >= 10:
        return f"{share:,.0f}×"
    return f"{share:.2g}×" if share >= 2 else f"{share:.0%}" if share >= 0.01 else "<1%"


def sentence(text: str) -> str:
    """A clause as a sentence."""
    return f"{text[:1].upper()}{text[1:]}."


def number(value: float | None) -> str:
    """A measured value, to three digits."""
    if value is None:
        return "–"
    return f"{value:.3g}" if value == 0 or 0.01 <= abs(value) < 10_000 else f"{value:.1e}"
