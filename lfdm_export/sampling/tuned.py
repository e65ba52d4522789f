"""Tables with few steps, learned for the weights of one model by `lfdm_export.evaluation.tuning`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lfdm_export.errors import InputError
from lfdm_export.files.atomic import write_file
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.sampling.rows import (
    NEXT_FROM_NOISE,
    NEXT_FROM_PREDICTED_NOISE,
    NEXT_FROM_X0,
    X0_FROM_LATENT,
    X0_FROM_PREDICTED_NOISE,
    SamplerTable,
    estimating_rows,
    make_table,
)
from lfdm_export.sampling.tables import SAMPLERS
from lfdm_models.schedule import Schedule

#: Name of the sampler, in addition to the names in `lfdm_export.sampling.tables.SAMPLERS`.
TUNED = "tuned"
#: Key in checkpoints and provenance for the steps that a DM was distilled for.
FEW_STEPS = "few_steps"
#: Maximum number of steps per table: with more, the exact samplers are as good.
MOST_STEPS = 20
# A larger gain is an error; dynamic thresholding limits its effect.
_LARGEST_GAIN = 100.0
# A file of tables has a few kilobytes.
_LARGEST_FILE = 1 << 20


def sampler_names() -> tuple[str, ...]:
    """All sampler names."""
    return (*SAMPLERS, TUNED)


@dataclass(frozen=True)
class TunedSteps:
    """The learned numbers of a chain of S steps.

    A step estimates x0, multiplies it by its gain, thresholds it, and goes to the noise level of the next time, where
    part of the noise is drawn again. With gains of 1 these are DDIM steps, with eta from 0 to above 1.

    Attributes:
        times: (S,), the training timestep passed to the network, decreasing.
        gains: (S,), factors of the x0 estimates, above 0.
        fresh: (S - 1,), share of the noise variance at the next time that is drawn again, 0 … 1.
    """

    times: tuple[int, ...]
    gains: tuple[float, ...]
    fresh: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: the lengths do not match, a number is out of range, or the times do not decrease.
        """
        steps = len(self.times)
        if not 1 <= steps <= MOST_STEPS or (len(self.gains), len(self.fresh)) != (steps, steps - 1):
            found = f"{steps} times, {len(self.gains)} gains and {len(self.fresh)} shares of fresh noise"
            raise ValueError(f"found {found}, expected S of 1 to {MOST_STEPS}, S and S - 1")
        if min(self.times) < 0 or any(a <= b for a, b in zip(self.times, self.times[1:], strict=False)):
            raise ValueError(f"times are {self.times}, expected falling ones of 0 or more")
        if not all(0 < gain <= _LARGEST_GAIN for gain in self.gains):
            raise ValueError(f"gains are {self.gains}, expected above 0 and up to {_LARGEST_GAIN:g}")
        if not all(0 <= share <= 1 for share in self.fresh):
            raise ValueError(f"shares of fresh noise are {self.fresh}, expected 0 to 1")

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return len(self.times)

    def table(self, schedule: Schedule) -> SamplerTable:
        """The steps as a table.

        Raises:
            InputError: the schedule ends before the first time.
        """
        times = np.array(self.times, np.int64)
        if times[0] >= schedule.steps:
            raise InputError(
                f"the tuned sampler starts at time {times[0]}, but the schedule has {schedule.steps} training steps; "
                "tune it for this model: lfdm-train schedule"
            )
        ratio = schedule.sqrt_recipm1_alphas_cumprod[times[1:]].astype(np.float64)
        signal, share = 1 / np.sqrt(1 + ratio**2), np.array(self.fresh)
        rows = estimating_rows(schedule, times)
        rows[:, [X0_FROM_LATENT, X0_FROM_PREDICTED_NOISE]] *= np.array(self.gains)[:, None]
        rows[:, NEXT_FROM_X0] = np.append(signal, 1.0)
        rows[:-1, NEXT_FROM_PREDICTED_NOISE] = ratio * signal * np.sqrt(1 - share)
        rows[:-1, NEXT_FROM_NOISE] = ratio * signal * np.sqrt(share)
        return make_table(TUNED, times, rows, np.arange(self.steps) < self.steps - 1)


@dataclass(frozen=True)
class TunedSampler:
    """Tables for one model's weights.

    Attributes:
        version: version of what the numbers mean.
        dm_sha256: SHA-256 of the DM checkpoint that they were learned for.
        guidance_scale: guidance scale that they were learned with.
        tables: one per number of steps, increasing.
        found: how they were learned, one line for people.
    """

    dm_sha256: str
    guidance_scale: float
    tables: tuple[TunedSteps, ...]
    found: str
    version: int = 1

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: another version, no table, two tables with the same number of steps, or no SHA-256.
        """
        if self.version != 1:
            raise ValueError(f"tuned.version is {self.version}, this program knows version 1; tune again")
        counts = [table.steps for table in self.tables]
        if not counts or counts != sorted(set(counts)):
            raise ValueError(f"tuned.tables are of {counts} steps, expected one or more of rising numbers")
        if len(self.dm_sha256) != 64 or not set(self.dm_sha256) <= set("0123456789abcdef"):
            raise ValueError("tuned.dm_sha256 is not a SHA-256 in hexadecimal")
        if not math.isfinite(self.guidance_scale):
            raise ValueError("tuned.guidance_scale is not finite")

    @classmethod
    def of_distilled(cls, provenance: Mapping[str, object], dm_sha256: str | None) -> TunedSampler | None:
        """The sampler that a DM was distilled for, if its provenance has one.

        Raises:
            InputError: the entry is wrong, or the checkpoint's SHA-256 is missing.
        """
        if FEW_STEPS not in provenance:
            return None
        try:
            steps = from_plain(TunedSteps, provenance[FEW_STEPS], FEW_STEPS)
            # Guidance was distilled into the weights: they run once per step.
            return cls(dm_sha256 or "", 1.0, (steps,), "distilled into these weights by lfdm-train distill")
        except ValueError as error:
            raise InputError(str(error)) from error

    def save(self, path: Path) -> None:
        """Write the tables as a JSON file. `lfdm-export --tuned` adds it to other bundles of these weights.

        Raises:
            OSError: the file cannot be written.
        """
        write_file(path, (json.dumps(to_plain(self), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> TunedSampler:
        """Read what `save` wrote.

        Raises:
            InputError: the file cannot be read or does not hold tables.
        """
        try:
            with path.open("rb") as file:
                return from_plain(cls, json.loads(file.read(_LARGEST_FILE)), "tuned")
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"the tuned sampler {path} cannot be read: {reason}; make it with lfdm-train schedule --out"
            ) from error

    def require_weights(self, dm_sha256: str | None) -> None:
        """Refuse weights other than those that the tables were learned for.

        Args:
            dm_sha256: SHA-256 of the DM checkpoint, if known.

        Raises:
            InputError: it does not match; the message says what to do.
        """
        if dm_sha256 != self.dm_sha256:
            found = "unknown" if dm_sha256 is None else dm_sha256[:12]
            raise InputError(
                f"the tuned sampler was learned for the DM of SHA-256 {self.dm_sha256[:12]}, this model's is {found}; "
                "tune it for these weights: lfdm-train schedule"
            )

    def table(self, schedule: Schedule, steps: int | None = None) -> SamplerTable:
        """Return the table with this number of steps; the longest by default.

        Raises:
            InputError: no table has this number of steps.
        """
        steps = self.tables[-1].steps if steps is None else steps
        for found in self.tables:
            if found.steps == steps:
                return found.table(schedule)
        raise InputError(
            f"steps: found {steps}, but sampler {TUNED!r} has tables of {self.step_counts()} steps; "
            "choose one of these, or tune another: lfdm-train schedule"
        )

    def step_counts(self) -> str:
        """The available numbers of steps, in words."""
        return ", ".join(str(table.steps) for table in self.tables)

    def with_tables(self, tables: Sequence[TunedSteps]) -> tuple[TunedSteps, ...]:
        """Return the tables, with `tables` replacing those with the same number of steps."""
        merged = {table.steps: table for table in (*self.tables, *tables)}
        return tuple(merged[steps] for steps in sorted(merged))
