"""The cost of quantizing, layer by layer: the report that a bundle stores beside its graphs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lfdm_export.errors import BundleError
from lfdm_export.files.atomic import write_file
from lfdm_export.files.json_codec import LATER, from_plain, to_plain
from lfdm_export.quantize.ranges import Format

#: Files of the report in a bundle's parity folder.
JSON_NAME, MARKDOWN_NAME = "sensitivity.json", "sensitivity.md"
# Prefix of the names of the UNet's layers.
_UNET = "denoise.unet."


@dataclass(frozen=True)
class Sensitivity:
    """The sensitivity of one layer, or of a group of layers.

    Attributes:
        name: name of the layer or group.
        layers: number of layers.
        weights: number of weights.
        kept: why it stays float; None if the bundle quantizes it.
        alone: ratio of signal to error of the stage's output in dB when only it is quantized.
        without: the same when everything that the bundle quantizes is quantized except it; None if not measured.
    """

    name: str
    layers: int
    weights: int
    kept: str | None
    alone: float
    without: float | None = None


@dataclass(frozen=True)
class StageSensitivity:
    """The sensitivity of one stage.

    Attributes:
        stage: its name.
        output: the output whose error was measured.
        states: number of states measured.
        together: ratio of signal to error of the stage in the bundle, in dB.
        everything: the same if the kept layers were quantized too.
        groups: worst first.
        layers: worst first; only as many as the time allowed, from the worst groups first.
        total_layers: number of all layers.
        kept: the layers that stay float, with the reason.
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
class Correction:
    """The correction of one stage's biases, measured on the held-out chain.

    Attributes:
        stage: its name.
        layers: number of corrected layers.
        states: number of states that their shifts are the mean of.
        ratio: ratio of signal to error of the stage's output in dB, without and with the correction.
        shift: largest mean error of a channel of the output as a share of its root mean square, without and with it.
    """

    stage: str
    layers: int
    states: int
    ratio: tuple[float, float]
    shift: tuple[float, float]


@dataclass(frozen=True)
class SensitivityReport:
    """The sensitivity of a model in one format.

    Attributes:
        form: "int8" or "fp8".
        method: method for scales.
        evaluations: evaluations of the UNet for calibration.
        timesteps: smallest and largest timestep of the calibration, and the number of timesteps.
        labels: number of labels in the calibration.
        seconds: time of calibration and measurement.
        stages: measured stages.
        corrections: the correction of each stage's biases; empty if there was none.
    """

    form: Format
    method: str
    evaluations: int
    timesteps: tuple[int, int, int]
    labels: int
    seconds: float
    stages: tuple[StageSensitivity, ...]
    corrections: tuple[Correction, ...] = field(default=(), metadata=LATER)

    def summary(self) -> str:
        """One line: the number of quantized layers, and the most sensitive ones."""
        total = sum(stage.total_layers for stage in self.stages)
        kept = sum(len(stage.kept) for stage in self.stages)
        worst = ", ".join(f"{stage} {_short(layer.name)} {layer.alone:.1f} dB" for stage, layer in self.worst(3))
        return f"{total - kept} of {total} layers in {self.form}; most sensitive: {worst}"

    def worst(self, count: int = 5) -> list[tuple[str, Sensitivity]]:
        """The most sensitive layers of all stages, with their stages; those that stay float included."""
        found = [(stage.stage, layer) for stage in self.stages for layer in stage.layers or stage.groups]
        return sorted(found, key=lambda one: one[1].alone)[:count]

    def write(self, folder: Path) -> Path:
        """Write the report as JSON and as Markdown; returns the path of the Markdown file."""
        text = json.dumps(to_plain(self), indent=1, allow_nan=False) + "\n"
        for name, content in ((JSON_NAME, text), (MARKDOWN_NAME, self.markdown())):
            write_file(folder / name, content.encode())
        return folder / MARKDOWN_NAME

    @classmethod
    def read(cls, folder: Path) -> SensitivityReport:
        """Read the result of `write`.

        Raises:
            BundleError: the file is missing or damaged.
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
            "only this is quantized. *Without*: all that the bundle quantizes is, except this. A low *alone*, or a "
            "*without* far above *together*, is a sensitive layer.",
            "",
            f"Scales by {self.method}, from {self.evaluations} evaluations of the UNet along chains of {self.labels} "
            f"labels and {self.timesteps[2]} timesteps from {self.timesteps[0]} to {self.timesteps[1]}; "
            f"{self.seconds:.0f} s in total.",
            "",
            "Most sensitive:",
            "",
            *(f"- `{stage}` `{_short(layer.name)}`: {layer.alone:.1f} dB alone" for stage, layer in self.worst()),
        ]
        if self.corrections:
            lines += [
                "",
                "The tables below are without the correction of biases, which takes back the mean error of each output "
                "of the quantized layers. Its effect on a stage's output, on the same chain:",
                "",
                "| stage | layers | states | signal to error | largest mean error of a channel |",
                "|---|---|---|---|---|",
                *map(_corrected, self.corrections),
            ]
        for stage in self.stages:
            lines += [
                "",
                f"## {stage.stage}: {stage.together:.1f} dB of {stage.output} together",
                "",
                f"{stage.states} states; {stage.everything:.1f} dB if the layers that stay float were quantized too.",
            ]
            for title, rows in (("group", stage.groups), ("layer", stage.layers)):
                if not rows:
                    continue
                lines += ["", f"| {title} | alone | without | layers | weights | |", "|---|---|---|---|---|---|"]
                lines += [_row(row) for row in rows]
            if len(stage.layers) < stage.total_layers:
                lines += ["", f"{len(stage.layers)} of {stage.total_layers} layers; the time limit was reached."]
        return "\n".join(lines) + "\n"


def _short(name: str) -> str:
    """A layer's name within its stage."""
    return name.removeprefix(_UNET)


def _corrected(one: Correction) -> str:
    ratio = " → ".join(f"{value:.1f} dB" for value in one.ratio)
    shift = " → ".join(f"{value:.2%}" for value in one.shift)
    return f"| {one.stage} | {one.layers} | {one.states} | {ratio} | {shift} |"


def _row(row: Sensitivity) -> str:
    without = "" if row.without is None else f"{row.without:.1f}"
    kept = f"stays float: {row.kept}" if row.kept else ""
    return f"| `{_short(row.name)}` | {row.alone:.1f} | {without} | {row.layers} | {row.weights} | {kept} |"
