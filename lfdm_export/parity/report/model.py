"""The report of a verification: as data, as JSON, as a table for the terminal, as a page."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import BundleError, InputError
from lfdm_export.files.atomic import write_file
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.files.names import user_path

if TYPE_CHECKING:
    from rich.console import RenderableType

JSON_NAME, HTML_NAME = "report.json", "report.html"
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

    @property
    def nearest(self) -> Check | None:
        """The check nearest to its limit, or farthest beyond it."""
        limits = [check for check in self.checks if check.share is not None]
        return max(limits, key=lambda check: check.share or 0.0, default=None)


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


@dataclass(frozen=True, repr=False)
class Report:
    """The result of a verification.

    Attributes:
        bundle: name of the bundle's folder.
        precision: precision of its graphs.
        date: time of the verification, ISO 8601, UTC.
        engine: the engine that ran the graphs.
        reference: what the outputs were compared with, in words.
        seed: seed of inputs and noise.
        sampler: sampler of the clip, in words.
        checks: all checks of `engine`, in the order in which they were made.
        steps: errors after each step of the clip.
        environment: versions, processor and threads of this machine, by name.
        exported_with: versions at export.
        provenance: provenance of the weights.
        labels: the bundle's labels.
        geometry: sizes of the bundle, by name.
        others: further engines that made the same checks, or could not.
        pictures: pictures for the page; not in the JSON.
    """

    bundle: str
    precision: str
    date: str
    engine: str
    reference: str
    seed: int
    sampler: str
    checks: tuple[Check, ...]
    steps: tuple[StepError, ...]
    environment: Mapping[str, str]
    exported_with: Mapping[str, str]
    provenance: Mapping[str, object]
    labels: tuple[str, ...]
    geometry: Mapping[str, int]
    others: tuple[OtherEngine, ...] = ()
    pictures: Pictures | None = field(default=None, repr=False, compare=False)

    def __repr__(self) -> str:
        failed = len(self.failures)
        outcome = f"{failed} of {len(self.all_checks)} checks failed" if failed else "passed"
        return f"<Report of {self.bundle!r}, {self.precision}, {self.engine}: {outcome}>"

    @property
    def passed(self) -> bool:
        """Whether every check passed, with every engine that ran."""
        return not self.failures

    @property
    def all_checks(self) -> tuple[Check, ...]:
        """The checks of all engines; in those of `others` the engine's name precedes the stage's."""
        further = (
            dataclasses.replace(check, stage=f"{other.name}: {check.stage}")
            for other in self.others
            for check in other.checks
        )
        return (*self.checks, *further)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.all_checks if not check.passed)

    def explanations(self) -> list[tuple[str, str, str]]:
        """The failures, as (stage, found and allowed value, meaning); equal failures of a stage are joined."""
        together: dict[tuple[str, str], list[str]] = {}
        for check in self.failures:
            together.setdefault((check.stage, check.meaning), []).append(_measured(check))
        return [(stage, "; ".join(measured), meaning) for (stage, meaning), measured in together.items()]

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        judged = sum(check.judged for check in self.all_checks)
        if not self.passed:
            stages = list(dict.fromkeys(check.stage for check in self.failures))
            return (
                f"{len(self.failures)} of {judged} checks failed, in {', '.join(stages)}: "
                "the export's results differ from the model's"
            )
        limits = [check for check in self.all_checks if check.share is not None]
        worst = max(limits, key=lambda check: check.share or 0.0, default=None)
        nearest = ""
        if worst is not None and worst.share is not None:
            nearest = f"; nearest to its limit is {worst.stage} {worst.subject}, at {percent(worst.share)}"
        return f"all {judged} checks passed{nearest}"

    def to_json(self) -> str:
        """An indented JSON document, without the pictures."""
        plain = to_plain(dataclasses.replace(self, pictures=None))
        del plain["pictures"]
        return json.dumps({"passed": self.passed, "verdict": self.verdict, **plain}, indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read the result of `to_json`, which has no pictures.

        Raises:
            InputError: the text is not such a document.
        """
        try:
            plain = json.loads(text)
            said = {name: plain.pop(name) for name in ("passed", "verdict")}
            report = from_plain(cls, {**plain, "pictures": None}, "report")
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
            raise InputError(f"this is not a report of lfdm-verify ({error}); verify again") from error
        if said != {"passed": report.passed, "verdict": report.verdict}:
            raise InputError("the report's verdict is not that of its checks; verify again")
        return report

    def write(self, folder: str | os.PathLike[str]) -> Path:
        """Write report.json and report.html, each atomically.

        Args:
            folder: folder to write to, created if missing; for a bundle BUNDLE/parity.

        Returns:
            Path of the page.

        Raises:
            BundleError: the folder cannot be written.
        """
        from lfdm_export.parity.report.page import page

        target = user_path(folder)
        try:
            for name, text in ((JSON_NAME, self.to_json()), (HTML_NAME, page(self))):
                # A label can contain half a surrogate pair, which JSON can represent and UTF-8 cannot.
                write_file(target / name, text.encode("utf-8", "xmlcharrefreplace"))
            return target / HTML_NAME
        except OSError as error:
            raise BundleError(
                f"the report cannot be written to {target} ({error.strerror or error}); make the folder writable"
            ) from error

    def table(self) -> RenderableType:
        """The report as a table for the terminal."""
        from lfdm_export.parity.report.table import table

        return table(self)


def _measured(check: Check) -> str:
    alone = " alone" if check.kind == "batch" else ""
    if check.found is None or check.allowed is None:
        return check.subject + alone
    unit = f" {check.unit}" if check.unit else ""
    times = "" if check.share is None else f" ({percent(check.share)})"
    return f"{check.subject}{alone} found {number(check.found)}{unit}, allowed {check.limit}{times}"


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
