"""An evaluation as JSON, as a Markdown table, and as a plot where matplotlib is installed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lfdm_export.errors import InputError
from lfdm_export.files.atomic import replacing, write_file
from lfdm_export.files.json_codec import to_plain

if TYPE_CHECKING:
    from lfdm_export.evaluation.evaluate import Evaluation, Generation
    from lfdm_export.evaluation.reconstruction import Reconstruction
    from lfdm_export.sampling.options import SamplingOptions

JSON, MARKDOWN, PLOT = "evaluation.json", "evaluation.md", "evaluation.png"
#: Columns of options of sampling.
SETTING_HEADER = ("sampler", "steps", "eta", "guidance")


def write_evaluation(evaluation: Evaluation, folder: Path) -> tuple[Path, ...]:
    """Write the report's files into a folder; the plot only if matplotlib is installed.

    Returns:
        Paths of the written files.

    Raises:
        InputError: the folder is not writable.
    """
    try:
        written = [folder / JSON, folder / MARKDOWN]
        write_file(written[0], (json.dumps(to_plain(evaluation), indent=2) + "\n").encode())
        write_file(written[1], markdown(evaluation).encode())
        if evaluation.generations and _plot(evaluation, folder / PLOT):
            written.append(folder / PLOT)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    return tuple(written)


def markdown(evaluation: Evaluation) -> str:
    """Return the tables: reconstruction, settings, labels, and the confusion matrix of each setting."""
    lines = [
        f"# Evaluation ({evaluation.precision}, seed {evaluation.seed})",
        "",
        f"Measured on {evaluation.data}.",
        "",
        *reconstruction_lines(evaluation.reconstruction, "clips of held-out characters"),
        f"The classifier recognizes {evaluation.real_accuracy:.1%} of the real clips; features of two sets of real "
        f"clips are {evaluation.real_frechet:.3f} apart; rebuilt clips differ from the first frame by "
        f"{evaluation.real_still:.5f} where the real ones stand still.",
        "",
    ]
    if not evaluation.generations:
        return "\n".join(lines)
    header = [*SETTING_HEADER, "clips", "accuracy", "Fréchet", "still parts", "s / clip"]
    lines += [*table(header, [_row(one) for one in evaluation.generations]), ""]
    shown = [[label, *(f"{one.by_label[label]:.0%}" for one in evaluation.generations)] for label in evaluation.labels]
    lines += [*table(["accuracy", *(setting_name(one.setting) for one in evaluation.generations)], shown), ""]
    for one in evaluation.generations:
        rows = [[label, *map(str, row)] for label, row in zip(evaluation.labels, one.confusion, strict=True)]
        lines += [
            f"{setting_name(one.setting)}: requested (rows), seen (columns)",
            "",
            *table(["", *evaluation.seen], rows),
            "",
        ]
    return "\n".join(lines)


def reconstruction_lines(found: Reconstruction, of: str) -> list[str]:
    """The results of the LFAE in lines of Markdown; `of` says what its clips are."""
    return [
        f"Reconstruction of {found.clips} {of}, mean L1 of colors in [0, 1]: rebuilt {found.frame:.5f}, warped "
        f"{found.warped:.5f}, copying the first frame {found.copied:.5f}; rebuilt / copied **{found.ratio:.3f}**.",
        "",
        *table(["label", "rebuilt / copied"], [[label, f"{ratio:.3f}"] for label, ratio in found.by_label.items()]),
        "",
    ]


def setting_name(setting: SamplingOptions) -> str:
    """Sampler, steps and the options that are not the default."""
    options = {"eta": setting.eta, "guidance": setting.guidance_scale}
    return " ".join(
        [
            f"{setting.sampler} {setting.steps}",
            *(f"{name} {value:g}" for name, value in options.items() if value is not None),
        ]
    )


def setting_cells(setting: SamplingOptions) -> list[str]:
    """Cells of a table for `SETTING_HEADER`."""
    options = ["default" if value is None else f"{value:g}" for value in (setting.eta, setting.guidance_scale)]
    return [str(setting.sampler), str(setting.steps), *options]


def _row(one: Generation) -> list[str]:
    values = [f"{one.accuracy:.1%}", f"{one.frechet:.3f}", f"{one.still:.5f}", f"{one.seconds:.2f}"]
    return [*setting_cells(one.setting), str(one.clips), *values]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table in lines."""
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def _plot(evaluation: Evaluation, path: Path) -> bool:
    """Plot accuracy and distance over steps, one line per sampler; returns False if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    for sampler in dict.fromkeys(one.setting.sampler for one in evaluation.generations):
        chosen = [one for one in evaluation.generations if one.setting.sampler == sampler]
        chosen.sort(key=lambda one: one.setting.steps or 0)
        steps = [one.setting.steps for one in chosen]
        left.plot(steps, [100 * one.accuracy for one in chosen], "o-", label=sampler)
        right.plot(steps, [one.frechet for one in chosen], "o-", label=sampler)
    measured = sorted({one.setting.steps for one in evaluation.generations if one.setting.steps})
    left.axhline(100 * evaluation.real_accuracy, color="gray", linestyle=":", label="real clips")
    right.axhline(evaluation.real_frechet, color="gray", linestyle=":", label="real clips")
    for axes, title in ((left, "label seen by the classifier, %"), (right, "Fréchet distance of its features")):
        axes.set(xscale="log", xlabel="steps", title=title)
        axes.set_xticks(measured, [str(steps) for steps in measured])
        axes.minorticks_off()
        axes.legend(fontsize="small")
    left.set_ylim(0, 103)
    with replacing(path) as stream:
        canvas.print_png(stream)
    return True
