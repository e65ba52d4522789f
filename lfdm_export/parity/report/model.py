"""The report of a verification: as data, as JSON, as a table for the terminal, as a page."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import RenderableType

from lfdm_export.errors import BundleError, InputError
from lfdm_export.files.atomic import write_file
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.files.names import user_path
from lfdm_export.parity.report.checks import Check, OtherEngine, Pictures, StepError, nearest, number, percent
from lfdm_export.parity.report.page import page
from lfdm_export.parity.report.table import table

JSON_NAME, HTML_NAME = "report.json", "report.html"


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
        worst = nearest(self.all_checks)
        if worst is None or worst.share is None:
            return f"all {judged} checks passed"
        return (
            f"all {judged} checks passed; nearest to its limit is {worst.stage} {worst.subject}, at "
            f"{percent(worst.share)}"
        )

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
        return table(self)


def _measured(check: Check) -> str:
    alone = " alone" if check.kind == "batch" else ""
    if check.found is None or check.allowed is None:
        return check.subject + alone
    unit = f" {check.unit}" if check.unit else ""
    times = "" if check.share is None else f" ({percent(check.share)})"
    return f"{check.subject}{alone} found {number(check.found)}{unit}, allowed {check.limit}{times}"
