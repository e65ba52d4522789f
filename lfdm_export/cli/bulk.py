"""``lfdm-generate --jobs``: a table of jobs -> a folder of clips."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lfdm_export.cli.console import FAILED, OK, complain, make_console, say
from lfdm_export.cli.planned import options_of
from lfdm_export.wording import count

if TYPE_CHECKING:
    from lfdm_export.bulk.run import BulkProgress
    from lfdm_export.bulk.summary import Summary

PROGRAM = "lfdm-generate"
#: Options of a single clip; with --jobs, columns of the table replace them.
_OF_A_ROW = ("image", "label", "text", "embedding", "drive", "motion", "labels_all", "seed", "seeds", "cache", "url")
#: Options that require --jobs.
_OF_JOBS = ("shard", "workers", "batch", "retry_failed", "ray")
#: Seconds between lines of progress without a terminal.
_LINE_INTERVAL = 30.0
_SHOWN_FAILURES = 5


def add_bulk_options(parser: argparse.ArgumentParser) -> None:
    """Add --jobs and its options."""
    group = parser.add_argument_group("many clips (instead of --image and a motion)")
    group.add_argument(
        "--jobs",
        metavar="TABLE",
        help="one row per clip: .csv, .jsonl or .parquet; --out is a folder; see docs/bulk.md",
    )
    group.add_argument("--shard", metavar="I/N", help="run share I (from 0) of N shares of the rows")
    group.add_argument("--workers", type=int, metavar="K", help="concurrent processes, or Ray actors (default: 1)")
    group.add_argument(
        "--batch",
        type=int,
        metavar="N",
        help="clips of equal settings per batch; above 1 the rounding differs (default: 1)",
    )
    group.add_argument("--retry-failed", action="store_true", help="retry rows that failed in an earlier run")
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="run on a Ray cluster (without ADDRESS: one started on this machine)",
    )


def check_bulk_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Reject invalid combinations: prints the usage and exits with status 2."""
    missing = ["--image"] * (args.jobs is None and args.image is None) + ["-o/--out"] * (args.out is None)
    if missing:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    if args.jobs is None:
        given = [name for name in _OF_JOBS if getattr(args, name) not in (None, False)]
        if given:
            parser.error(f"--{given[0].replace('_', '-')} is for --jobs; leave it out")
        if not any((args.label, args.text, args.embedding, args.drive, args.motion, args.labels_all)):
            parser.error("one of the arguments --label --text --embedding --drive --motion --labels-all is required")
        return
    given = [name for name in _OF_A_ROW if getattr(args, name) not in (None, False)]
    if given:
        parser.error(f"--{given[0].replace('_', '-')} is of one clip: with --jobs the rows say it; leave it out")
    if args.frames is not None or args.stride is not None:
        parser.error("--frames and --stride are not for --jobs, whose clips are whole; leave them out")


def generate_in_bulk(args: argparse.Namespace) -> int:
    """Generate the clips of the table and print the summary; returns the exit status."""
    from lfdm_export.bulk.job import JobSettings
    from lfdm_export.bulk.run import BulkOptions, Shard, run_jobs

    defaults = JobSettings(
        options=options_of(args),
        crop=args.crop,
        paste_back=args.paste_back,
        format=args.format or JobSettings.format,
        fps=args.fps,
        scale=args.scale,
        panels=args.panels,
    )
    options = BulkOptions(
        shard=Shard() if args.shard is None else Shard.parse(args.shard),
        workers=1 if args.workers is None else args.workers,
        batch=1 if args.batch is None else args.batch,
        threads=args.threads,
        target=args.target,
        retry_failed=args.retry_failed,
        ray=args.ray,
    )
    with BulkBar(quiet=args.quiet) as bar:
        summary = run_jobs(args.bundle, args.jobs, args.out, defaults=defaults, options=options, progress=bar)
    _say_summary(args, summary)
    return FAILED if summary.failed else OK


def _say_summary(args: argparse.Namespace, summary: Summary) -> None:
    before = summary.made - summary.made_now
    words = f"{summary.made_now} made now, {before} before" if before else f"{summary.made} made"
    say(args, f"clips    {args.out} ({words}, {summary.failed} failed, of {count(summary.jobs, 'row')})")
    say(args, f"summary  {summary.table} there")
    say(args, f"made  clips={summary.made_now} seconds={summary.seconds:.2f}")
    for name, sentence in list(summary.failures.items())[:_SHOWN_FAILURES]:
        complain(PROGRAM, f"error: {name}: {sentence}")
    if summary.failed:
        rest = summary.failed - _SHOWN_FAILURES
        more = f" ({rest} more in the summary)" if rest > 0 else ""
        total = count(summary.jobs, "row")
        complain(PROGRAM, f"error: {summary.failed} of {total} failed{more}; --retry-failed takes them up again")


class BulkBar:
    """Progress of a run on stderr: a bar on a terminal, otherwise a line every half minute; nothing if quiet."""

    def __init__(self, *, quiet: bool) -> None:
        """Create the bar without drawing it."""
        console = make_console(stderr=True)
        self._lines = not quiet and not console.is_terminal
        self._progress = Progress(
            TextColumn("clips"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
            disable=quiet or self._lines,
        )
        self._task = self._progress.add_task("", total=None)
        self._said = time.monotonic()

    def __enter__(self) -> BulkBar:
        """Start drawing."""
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the bar from the screen."""
        self._progress.stop()

    def __call__(self, progress: BulkProgress) -> None:
        """Show the progress."""
        text = describe_progress(progress)
        self._progress.update(self._task, total=progress.total, completed=progress.done, description=text)
        if self._lines and time.monotonic() - self._said >= _LINE_INTERVAL:
            self._said = time.monotonic()
            complain(PROGRAM, f"{progress.done} of {count(progress.total, 'row')}, {text}")


def describe_progress(progress: BulkProgress) -> str:
    """Return rate, time left and failures, as "12.0 clips/min, 1 h 20 min left, 3 failed"."""
    parts = []
    if progress.rate is not None and progress.seconds_left is not None:
        per_minute = 60 * progress.rate
        rate = f"{per_minute:.1f} clips/min" if per_minute < 600 else f"{progress.rate:.1f} clips/s"
        parts += [rate, f"{_duration(progress.seconds_left)} left"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    return ", ".join(parts)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
