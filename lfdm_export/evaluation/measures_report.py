"""The measures of held-out clips as JSON, as Markdown tables, and as a plot."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from lfdm_export.errors import InputError, MissingDependencyError
from lfdm_export.evaluation.report import SETTING_HEADER, reconstruction_lines, setting_cells, setting_name, table
from lfdm_export.files.atomic import replacing, write_file
from lfdm_export.files.json_codec import to_plain
from lfdm_export.wording import count

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lfdm_export.evaluation.measures import ConditionalDistance, HeldOutMeasures

JSON, MARKDOWN, PLOT = "measures.json", "measures.md", "measures.png"
_NOT_MEASURED = "—"


def need_matplotlib() -> None:
    """Check that the plot can be made; called before long measurements.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError("matplotlib", "the plot, which --no-plot leaves out,", "bench")


def write_measures(found: HeldOutMeasures, folder: Path, *, plot: bool = True) -> tuple[Path, ...]:
    """Write the report's files into a folder.

    Returns:
        Paths of the written files.

    Raises:
        InputError: the folder is not writable.
        MissingDependencyError: a plot is requested, and matplotlib is not installed.
    """
    if plot:
        need_matplotlib()
    try:
        written = [folder / JSON, folder / MARKDOWN]
        write_file(written[0], (json.dumps(to_plain(found), indent=2, allow_nan=False) + "\n").encode())
        write_file(written[1], measures_markdown(found).encode())
        if plot:
            _plot(found, folder / PLOT)
            written.append(folder / PLOT)
    except OSError as error:
        raise InputError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    return tuple(written)


def measures_markdown(found: HeldOutMeasures) -> str:
    """Return the tables: all settings, classes, subjects, and the reconstruction."""
    subjects = count(len(found.subjects), "subject") if found.subjects else "unknown subjects"
    lines = [
        f"# Held-out clips of {found.data} ({found.precision}, seed {found.seed})",
        "",
        f"Measured on {found.held_out} held-out clips of {subjects} and {count(len(found.labels), 'label')}, "
        f"{found.frames} frames of {found.image_size}x{found.image_size}.",
        "",
    ]
    if found.features is not None:
        lines += [
            f"Distances compare {found.features.width} features per clip of {found.features.file} (SHA-256 "
            f"{found.features.sha256[:16]}) with those of {found.real} real clips; clip n has the noise of seed "
            f"{found.first_noise_seed} + n.",
            "",
            *_settings(found),
            "",
        ]
        for title, groups in (("class", "cfvd"), ("subject", "sfvd")):
            lines += _groups(found, title, groups)
    if found.reconstruction is not None:
        lines += reconstruction_lines(found.reconstruction, "held-out clips")
    return "\n".join(lines)


def _settings(found: HeldOutMeasures) -> list[str]:
    rows = []
    for one in found.generations:
        whole = _NOT_MEASURED if one.fvd is None else f"{one.fvd:.2f}"
        conditional = [_mean(one.cfvd), _mean(one.sfvd)]
        rows.append([*setting_cells(one.setting), str(one.clips), whole, *conditional, f"{one.seconds:.2f}"])
    return table([*SETTING_HEADER, "clips", "FVD", "cFVD", "sFVD", "s / clip"], rows)


def _mean(distance: ConditionalDistance | None) -> str:
    return _NOT_MEASURED if distance is None else f"{distance.mean:.2f} ± {distance.deviation:.2f}"


def _groups(found: HeldOutMeasures, title: str, measure: str) -> list[str]:
    """FVD of each group by setting, with the numbers of clips."""
    distances = [getattr(one, measure) for one in found.generations]
    if not distances or distances[0] is None:
        return []
    names = [setting_name(one.setting) for one in found.generations]
    rows = [
        [name, str(group.real), str(group.generated), *(f"{one.groups[name].fvd:.2f}" for one in distances)]
        for name, group in distances[0].groups.items()
    ]
    return [*table([title, "real", "generated", *(f"FVD, {name}" for name in names)], rows), ""]


def _plot(found: HeldOutMeasures, path: Path) -> None:
    """Plot what was measured: distances by setting, by class and by subject; reconstruction by label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parts = [name for name in ("cfvd", "sfvd") if found.generations and getattr(found.generations[0], name) is not None]
    panels = bool(found.generations) + len(parts) + (found.reconstruction is not None)
    rows = max(len(found.generations) * 3, len(found.labels), len(found.subjects))
    figure = Figure(figsize=(4.5 * max(panels, 1), max(4.0, 0.25 * rows)), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = iter(figure.subplots(1, max(panels, 1), squeeze=False)[0])
    if found.generations:
        _plot_settings(found, next(axes))
    for part in parts:
        _plot_groups(found, part, next(axes))
    if found.reconstruction is not None:
        ratios = found.reconstruction.by_label
        shown = next(axes)
        shown.barh(range(len(ratios)), list(ratios.values()), color="C7")
        shown.axvline(1, color="gray", linestyle=":")
        _name_bars(shown, list(ratios), "L1 rebuilt / copied (1: first frame)")
    with replacing(path) as stream:
        canvas.print_png(stream)


def _plot_settings(found: HeldOutMeasures, axes: Axes) -> None:
    """FVD, and cFVD and sFVD with their standard deviations, one group of bars per setting."""
    for place, (title, color) in enumerate((("fvd", "C0"), ("cfvd", "C1"), ("sfvd", "C2"))):
        values = [getattr(one, title) for one in found.generations]
        if values[0] is None:
            continue
        heights = [value if isinstance(value, float) else value.mean for value in values]
        errors = None if title == "fvd" else [value.deviation for value in values]
        at = [index + 0.27 * (place - 1) for index in range(len(values))]
        axes.barh(at, heights, 0.25, xerr=errors, color=color, label=title.replace("fvd", "FVD"))
    axes.legend(fontsize="small")
    _name_bars(axes, [setting_name(one.setting) for one in found.generations], "Fréchet distance")


def _plot_groups(found: HeldOutMeasures, measure: str, axes: Axes) -> None:
    """FVD of each class or subject, a mark per setting."""
    names = list(getattr(found.generations[0], measure).groups)
    for one in found.generations:
        groups = getattr(one, measure).groups
        axes.plot([groups[name].fvd for name in names], range(len(names)), "o", label=setting_name(one.setting))
    axes.legend(fontsize="small")
    _name_bars(axes, names, f"FVD per {'class' if measure == 'cfvd' else 'subject'}")


def _name_bars(axes: Axes, names: list[str], title: str) -> None:
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.invert_yaxis()
    axes.set_title(title)
    axes.set_xlim(left=0)
