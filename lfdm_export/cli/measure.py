"""``lfdm-train evaluate --data``: the measures of the LFDM paper on held-out clips of a data set."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from lfdm_export.cli.console import OK, Bars, complain, say
from lfdm_export.errors import InputError, LfdmExportError
from lfdm_export.files.atomic import rehearse
from lfdm_export.files.names import user_path
from lfdm_models.training.settings import DATA, DEVICES

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.evaluation.held_out import HeldOutClips
    from lfdm_export.evaluation.measures import Measure
    from lfdm_export.generate.pipeline import Pipeline
    from lfdm_export.sampling.options import SamplingOptions

#: The data that need no options of this module.
DRAWN = "procedural"
# Options for data sets alone, by their names in the arguments.
_DATA_OPTIONS = ("root", "subjects", "i3d", "measures", "real_clips")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``evaluate`` for data sets."""
    group = parser.add_argument_group("held-out clips of a data set")
    group.add_argument("--data", choices=DATA, default=DRAWN, help="the data set (default: %(default)s)")
    group.add_argument("--root", metavar="DIR", help="folder of the data set")
    group.add_argument("--subjects", metavar="2,4,6", help="held-out subjects (mhad, natops)")
    group.add_argument(
        "--i3d", metavar="FILE", help="TorchScript file of I3D; it holds code, so use one that you trust"
    )
    group.add_argument(
        "--measures",
        metavar="A,B",
        help="of l1, fvd, cfvd, sfvd (default: l1; with --i3d also fvd and cfvd, and sfvd if the clips name subjects)",
    )
    group.add_argument(
        "--real-clips", type=int, metavar="N", help="real clips to compare with (default: every held-out clip once)"
    )
    group.add_argument("--batch-size", type=int, default=4, metavar="N", help="clips per run (default: %(default)s)")
    group.add_argument("--device", choices=DEVICES, default="auto", help="device of I3D (default: %(default)s)")
    group.add_argument("--no-plot", action="store_true", help="no plot, which needs matplotlib")


def refuse_data_options(args: argparse.Namespace) -> None:
    """Raise if options for data sets are given for drawn characters.

    Raises:
        InputError: the first of them.
    """
    for name in _DATA_OPTIONS:
        if getattr(args, name) is not None:
            option = "--" + name.replace("_", "-")
            raise InputError(f"{option} is for data sets, and the data are drawn characters; name the set with --data")


def measure(program: str, args: argparse.Namespace, settings: Sequence[SamplingOptions]) -> int:
    """Measure a bundle, print the tables and write the report; returns the exit status.

    Raises:
        LfdmExportError: an option is not valid, or something cannot be read or measured.
    """
    import torch

    from lfdm_export.evaluation.measure import measure_held_out
    from lfdm_export.evaluation.measures import PUBLISHED_CLIPS, Counts
    from lfdm_export.evaluation.measures_report import JSON, measures_markdown, need_matplotlib, write_measures
    from lfdm_export.evaluation.video_features import VideoFeatures
    from lfdm_export.generate.pipeline import Pipeline
    from lfdm_models.training.errors import TrainingError

    if not args.no_plot:
        need_matplotlib()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    clips = PUBLISHED_CLIPS if args.clips is None else args.clips
    counts = Counts(clips, args.real_clips, args.batch_size, args.seed)
    pipeline = Pipeline.open(args.bundle, threads=args.threads)
    folder = report_folder(args, pipeline.bundle, JSON)
    try:
        held_out = _held_out(args, pipeline)
        features = None if args.i3d is None else VideoFeatures.load(user_path(args.i3d), args.device)
    except TrainingError as error:
        raise LfdmExportError(str(error)) from error
    wanted = _measures(args.measures, held_out, distances=features is not None and bool(settings))
    with Bars(quiet=args.quiet) as progress:
        found = measure_held_out(
            pipeline, held_out, settings, wanted, features=features, counts=counts, progress=progress
        )
    say(args, measures_markdown(found))
    say_reports(program, args, lambda: write_measures(found, folder, plot=not args.no_plot))
    return OK


def report_folder(args: argparse.Namespace, bundle: Bundle, name: str) -> Path:
    """The folder for the results: --out, else inside the bundle.

    One that is named is checked before hours of measuring, by its file `name`; the bundle may be mounted read-only.

    Raises:
        OSError: a named folder cannot be written to.
    """
    if args.out is None:
        return bundle.path / "evaluation"
    folder = user_path(args.out)
    rehearse(folder / name)
    return folder


def say_reports(program: str, args: argparse.Namespace, write: Callable[[], Sequence[Path]]) -> None:
    """Write the results, and print their paths; without --out a failure is a warning, as the results are printed.

    Raises:
        InputError: a named folder cannot be written to.
    """
    try:
        say(args, "\n".join(f"report  {path}" for path in write()))
    except InputError as error:
        if args.out is not None:
            raise
        complain(program, f"warning: {error}")


def _held_out(args: argparse.Namespace, pipeline: Pipeline) -> HeldOutClips:
    from lfdm_export.evaluation.held_out import HeldOutClips
    from lfdm_models.training.recipes import DataSettings

    root = None if args.root is None else user_path(args.root)
    data = DataSettings(args.data, root, subjects=_numbers(args.subjects))
    return HeldOutClips.of(data.disk_set("test"), pipeline.bundle, args.seed)


def _numbers(value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        return tuple(int(part) for part in value.split(","))
    except ValueError:
        raise InputError(f"--subjects is {value!r}, expected numbers such as 2,4,6") from None


def _measures(value: str | None, held_out: HeldOutClips, *, distances: bool) -> tuple[Measure, ...]:
    """The measures that --measures names, or the default."""
    from lfdm_export.evaluation.measures import MEASURES, Measure

    if value is None:
        if not distances:
            return ("l1",)
        return MEASURES if held_out.subjects else ("l1", "fvd", "cfvd")
    named = [part.strip().lower() for part in value.split(",")]
    unknown = [name for name in named if name not in get_args(Measure)]
    if unknown:
        raise InputError(f"--measures has {unknown[0]!r}, expected some of {', '.join(MEASURES)}")
    return tuple(measure for measure in MEASURES if measure in named)
