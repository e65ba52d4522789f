"""What quantising costs, layer by layer: the report that a bundle carries beside its graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lfdm_export.errors import BundleError
from lfdm_export.files.atomic import write_file
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.quantize.ranges import Format

#: Files of a report in a bundle's parity folder.
JSON_NAME, MARKDOWN_NAME = "sensitivity.json", "sensitivity.md"
# What the names of all of the UNet's layers begin with.
_UNET = "denoise.unet."


@dataclass(frozen=True)
class Sensitivity:
    """Of one layer, or of a group of them.

    Attributes:
        name: of the layer or group.
        layers: how many.
        weights: how many values.
        kept: why it stays float; None if the bundle quantises it.
        alone: ratio of signal to error of the stage's output in dB when only it is quantised.
        without: the same when all that the bundle quantises is quantised but it; None if it was not measured.
    """

    name: str
    layers: int
    weights: int
    kept: str | None
    alone: float
    without: float | None = None


@dataclass(frozen=True)
class StageSensitivity:
    """Of one stage.

    Attributes:
        stage: its name.
        output: that the error was measured on.
        states: that it was measured in.
        together: ratio of signal to error in dB of the stage as the bundle has it.
        everything: the same if what is kept were quantised too.
        groups: worst first.
        layers: worst first; those that the time was enough for, of the worst groups first.
        total_layers: how many there are.
        kept: the layers that stay float, and why.
    """

    stage: str
    output: str
    states: int
    together: float
    everything: float
    groups: tuple[Sensitivity, ...]
    layers: tuple[Sensitivity, ...]
    total_layers: int
    kept: Mapping[str, str]


@dataclass(frozen=True)
class SensitivityReport:
    """Of a model in a format.

    Attributes:
        form: "int8" or "fp8".
        method: that scales were found by.
        evaluations: of the UNet that calibration took.
        timesteps: smallest and largest that it saw, and how many.
        labels: how many of the known ones it saw.
        seconds: that the report took.
        stages: what was measured.
    """

    form: Format
    method: str
    evaluations: int
    timesteps: tuple[int, int, int]
    labels: int
    seconds: float
    stages: tuple[StageSensitivity, ...]

    def summary(self) -> str:
        """How many layers are quantised, and which cost most, in a line."""
        total = sum(stage.total_layers for stage in self.stages)
        kept = sum(len(stage.kept) for stage in self.stages)
        worst = ", ".join(f"{stage} {_short(layer.name)} {layer.alone:.1f} dB" for stage, layer in self.worst(3))
        return f"{total - kept} of {total} layers in {self.form}; most sensitive: {worst}"

    def worst(self, count: int = 5) -> list[tuple[str, Sensitivity]]:
        """The layers that cost most, of all stages, with their stages; those that stay float included."""
        found = [(stage.stage, layer) for stage in self.stages for layer in stage.layers or stage.groups]
        return sorted(found, key=lambda one: one[1].alone)[:count]

    def write(self, folder: Path) -> Path:
        """Write it as JSON and as Markdown; returns the latter's path."""
        text = json.dumps(to_plain(self), indent=1, allow_nan=False) + "\n"
        for name, content in ((JSON_NAME, text), (MARKDOWN_NAME, self.markdown())):
            write_file(folder / name, content.encode())
        return folder / MARKDOWN_NAME

    @classmethod
    def read(cls, folder: Path) -> SensitivityReport:
        """What `write` wrote.

        Raises:
            BundleError: there is none, or it is damaged.
        """
        path = folder / JSON_NAME
        try:
            return from_plain(cls, json.loads(path.read_text(encoding="utf-8")), "sensitivity")
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read ({error}); export again") from error

    def markdown(self) -> str:
        """The report as tables."""
        lines = [
            f"# What {self.form} costs, layer by layer",
            "",
            "Ratio of signal to error of the stage's output in dB, on a chain that calibration did not see. *Alone*: "
            "only this is quantised. *Without*: all that the bundle quantises is, but this. A low *alone*, or a "
            "*without* far above *together*, is a sensitive layer.",
            "",
            f"Scales by {self.method}, from {self.evaluations} evaluations of the UNet along chains of {self.labels} "
            f"labels and {self.timesteps[2]} timesteps from {self.timesteps[0]} to {self.timesteps[1]}; "
            f"{self.seconds:.0f} s in all.",
            "",
            "Most sensitive:",
            "",
            *(f"- `{stage}` `{_short(layer.name)}`: {layer.alone:.1f} dB alone" for stage, layer in self.worst()),
        ]
        for stage in self.stages:
            lines += [
                "",
                f"## {stage.stage}: {stage.together:.1f} dB of {stage.output} together",
                "",
                f"{stage.states} states; with what stays float quantised too, it would be {stage.everything:.1f} dB.",
            ]
            for title, rows in (("group", stage.groups), ("layer", stage.layers)):
                if not rows:
                    continue
                lines += ["", f"| {title} | alone | without | layers | weights | |", "|---|---|---|---|---|---|"]
                lines += [_row(row) for row in rows]
            if len(stage.layers) < stage.total_layers:
                lines += ["", f"{len(stage.layers)} of {stage.total_layers} layers; time was up."]
        return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    """A layer's name within its stage."""
    return name.removeprefix(_UNET)


def _row(row: Sensitivity) -> str:
    without = "" if row.without is None else f"{row.without:.1f}"
    kept = f"stays float: {row.kept}" if row.kept else ""
    return f"| `{_short(row.name)}` | {row.alone:.1f} | {without} | {row.layers} | {row.weights} | {kept} |"
