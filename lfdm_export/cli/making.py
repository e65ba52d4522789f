"""Generates the clips of one command, collects failures of single clips, and prints the summary."""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from lfdm_export.cli.console import FAILED, OK, complain, say
from lfdm_export.cli.planned import PlannedClip
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.paste import Surroundings, read_surroundings
from lfdm_export.wording import count, describe_error, shortened


@dataclass
class Making:
    """Results of the clips of one command.

    Attributes:
        args: arguments of the command.
        wanted: clips of the command.
        made: files of the written clips.
        failures: errors by clip.
        steps: sampling steps of each clip, as reported by a server.
    """

    args: argparse.Namespace
    wanted: tuple[PlannedClip, ...]
    made: dict[PlannedClip, tuple[Path, ...]] = field(default_factory=dict)
    failures: dict[PlannedClip, Exception] = field(default_factory=dict)
    steps: int | None = None
    _started: float = field(default_factory=time.monotonic)

    def attempt(self, planned: PlannedClip, make: Callable[[], Clip]) -> None:
        """Generate and write one clip; if there are others, store an error for `finish`.

        Raises:
            Exception: the only clip failed, or --debug is set.
        """
        try:
            self.write(planned, make())
        except Exception as error:
            if self.alone:
                raise
            self.failures[planned] = error

    @property
    def alone(self) -> bool:
        """Whether the first error ends the command: there is only one clip, or --debug is set."""
        return len(self.wanted) == 1 or self.args.debug

    def write(self, planned: PlannedClip, clip: Clip) -> None:
        """Write one clip.

        Raises:
            LfdmExportError: the clip cannot be written.
        """
        args = self.args
        if args.paste_back:
            clip = replace(clip, surroundings=self._surroundings)
        self.made[planned] = clip.save(
            planned.out, format=args.format, panels=args.panels, fps=args.fps, scale=args.scale
        )
        if clip.timings:
            self.steps = int(clip.timings[0]["steps"])

    @functools.cached_property
    def _surroundings(self) -> Surroundings:
        """The photograph that all clips of the command are put back into."""
        return read_surroundings(self.args.image, self.args.crop)

    def fail(self, planned: PlannedClip, error: Exception) -> None:
        """Store an error for `finish`.

        Raises:
            Exception: that error, if there is only one clip, or with --debug.
        """
        if self.alone:
            raise error
        self.failures[planned] = error

    def finish(self, program: str, facts: Mapping[str, object]) -> int:
        """Print the files, the summary and the failures; returns the exit status.

        The summary is one line of ``key=value``, without spaces in values; several seeds are separated by commas.
        """
        made = [planned for planned in self.wanted if planned in self.made]
        for planned in made:
            for path in self.made[planned]:
                say(self.args, f"clip  {path}")
        if made:
            seconds = time.monotonic() - self._started
            summary = {"clips": len(made), "seconds": f"{seconds:.2f}", **facts}
            if "sampler" in facts:
                summary["seed"] = ",".join(map(str, dict.fromkeys(planned.seed for planned in made)))
            say(self.args, "made  " + " ".join(f"{key}={value}" for key, value in summary.items()))
        for message, planned_clips in _grouped(self.failures.items()).items():
            complain(program, f"error: {message} ({shortened(list(map(str, planned_clips)), 3)})")
        if self.failures:
            total, failed = count(len(self.wanted), "clip"), len(self.failures)
            complain(program, f"error: {failed} of {total} failed" + ("; the others are kept" if self.made else ""))
        return FAILED if self.failures else OK


def _grouped(failures: Iterable[tuple[PlannedClip, Exception]]) -> dict[str, list[PlannedClip]]:
    """Group clips by error message."""
    found: dict[str, list[PlannedClip]] = {}
    for planned, error in failures:
        found.setdefault(describe_error(error), []).append(planned)
    return found
