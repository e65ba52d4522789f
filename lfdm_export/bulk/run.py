"""Generates a folder of clips from a table of jobs, on this machine or on a Ray cluster; interrupted runs resume."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from lfdm_export.bulk.job import Job, JobSettings
from lfdm_export.bulk.maker import Maker, MakerSettings
from lfdm_export.bulk.records import FAILED, MADE, Journal, Record
from lfdm_export.bulk.summary import Summary, summarize, table_name, table_rows, write_summary
from lfdm_export.bulk.table import read_jobs
from lfdm_export.bulk.workers import Unit, make_in_processes
from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.engines.targets import AUTO
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.machine import available_cores
from lfdm_export.pictures.clip import rehearse_saving


@dataclass(frozen=True)
class Shard:
    """Every `count`-th row, starting at row `index`.

    Attributes:
        index: index of the shard, from 0.
        count: number of shards.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: the index is not below the count.
        """
        if not 0 <= self.index < self.count:
            raise InputError(
                f"found shard {self.index}/{self.count}, expected I/N with I from 0 to N - 1: the first of four is 0/4"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Parse ``I/N``.

        Raises:
            InputError: the text has another form.
        """
        found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if found is None:
            raise InputError(f"the shard is {text!r}, expected I/N such as 0/4, counted from 0")
        return cls(int(found[1]), int(found[2]))

    @property
    def ending(self) -> str:
        """Suffix in the names of the shard's summaries; "" for a single shard."""
        return "" if self.count == 1 else f"-{self.index}-of-{self.count}"


@dataclass(frozen=True)
class BulkOptions:
    """How a table of jobs is run. These options do not change the clips, except for the last bits.

    Attributes:
        shard: rows to run.
        workers: number of concurrent processes (with Ray: actors).
        batch: clips of equal settings per batch. 1 gives clips bit-identical to `Pipeline.generate`; larger batches use
            the engines better and differ by rounding.
        threads: threads per worker; None divides the cores among the workers.
        target, device: arguments of `lfdm_export.generate.pipeline.Pipeline.open`.
        retry_failed: whether to retry rows that failed before; otherwise they are skipped while unchanged.
        ray: address of a Ray cluster, or "local" to start one on this machine; None runs without Ray.
    """

    shard: Shard = Shard()
    workers: int = 1
    batch: int = 1
    threads: int | None = None
    target: str = AUTO
    device: Device = "cpu"
    retry_failed: bool = False
    ray: str | None = None

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: a number is below 1.
        """
        for name in ("workers", "batch"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True)
class BulkProgress:
    """Progress of a run.

    Attributes:
        total: rows of the table, or of the shard.
        made: existing clips, including those of earlier runs.
        failed: failed rows, including those of earlier runs.
        rate: rows per second of this run; None before the first.
    """

    total: int
    made: int
    failed: int
    rate: float | None

    @property
    def done(self) -> int:
        """Number of finished rows."""
        return self.made + self.failed

    @property
    def seconds_left(self) -> float | None:
        """Estimated seconds left at the current rate."""
        return (self.total - self.done) / self.rate if self.rate else None


#: Called before the first clip, and whenever some clips are done.
OnProgress: TypeAlias = Callable[[BulkProgress], None]


def run_jobs(
    bundle: Bundle | str | os.PathLike[str],
    table: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    defaults: JobSettings | None = None,
    options: BulkOptions | None = None,
    progress: OnProgress | None = None,
) -> Summary:
    """Generate every clip of a table of jobs that does not exist yet.

    Clips are written atomically below `out`, named by the IDs of their rows. ``out/journal`` records the result of
    each row; an interrupted run resumes when it is started again. A row is generated again if it, or a file it reads,
    has changed. A failed row is recorded and does not stop the others.

    Args:
        bundle: a bundle, or the path of one.
        table: a .csv, .jsonl or .parquet file; `lfdm_export.bulk.table` documents the columns.
        out: folder of the clips; created if missing.
        defaults: settings for rows that give none.
        options: how to run the table.
        progress: called before the first clip, and whenever some clips are done.

    Returns:
        The results; also written to ``out/summary.json``, beside a table with one row per job.

    Raises:
        InputError: the table or an option is invalid, or the folder is not writable.
        EngineError: an engine cannot be loaded.
        MissingDependencyError: Parquet or Ray is used without the extra ``bulk``.
    """
    options = options or BulkOptions()
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    folder = user_path(out).absolute()
    jobs = read_jobs(os.fspath(table), defaults)[options.shard.index :: options.shard.count]
    for chosen in sorted({job.settings.format for job in jobs}):
        rehearse_saving(folder / f"clip.{chosen}")
    try:
        return _run(bundle, jobs, folder, options, progress)
    except OSError as error:
        raise InputError(f"{folder} cannot be written: {error.strerror or error}; choose another folder") from error


def _run(
    bundle: Bundle, jobs: Sequence[Job], folder: Path, options: BulkOptions, progress: OnProgress | None
) -> Summary:
    pipeline = Pipeline.open(bundle, threads=_threads(options), target=options.target, device=options.device)
    journal = Journal(folder)
    settings = MakerSettings(
        bundle=str(bundle.path.resolve()),
        bundle_id=bundle.manifest.bundle_id,
        out=str(folder),
        target=options.target,
        device=options.device,
        threads=_threads(options),
    )
    work = _Work(jobs, _known(jobs, journal, settings, retry_failed=options.retry_failed))
    units = plan_units(jobs, work.records, options.batch)
    if units and options.ray is None:  # chosen once; on a cluster each machine chooses its own
        settings = replace(settings, target=pipeline.stages.target)
    report = progress or (lambda _: None)
    try:
        report(work.progress())
        with contextlib.closing(_answers(settings, units, options, pipeline)) as answers:
            for answer in answers:
                journal.write(work.take(answer))
                report(work.progress())
    finally:
        journal.close()
        summary = summarize(
            jobs, work.records, now=work.now, seconds=work.seconds, table=table_name(options.shard.ending)
        )
        facts = {
            "bundle": bundle.name,
            "bundle_id": settings.bundle_id,
            "target": settings.target,
            "shard": f"{options.shard.index}/{options.shard.count}",
        }
        write_summary(folder, options.shard.ending, summary, facts, table_rows(jobs, work.records))
    return summary


class _Work:
    """Records of the jobs so far, and the rate of this run."""

    def __init__(self, jobs: Sequence[Job], records: dict[str, Record]) -> None:
        self.records = records
        self.now: list[Record] = []
        self._total = len(jobs)
        self._made = sum(record.state == MADE for record in records.values())
        self._began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def take(self, answer: Sequence[Record]) -> list[Record]:
        """Add the records of a worker, and return those of jobs that were not done before."""
        fresh = [record for record in answer if record.id not in self.records]
        self.records.update({record.id: record for record in fresh})
        self.now += fresh
        self._made += sum(record.state == MADE for record in fresh)
        return fresh

    def progress(self) -> BulkProgress:
        rate = len(self.now) / self.seconds if self.now else None
        return BulkProgress(self._total, self._made, len(self.records) - self._made, rate)


def _known(jobs: Sequence[Job], journal: Journal, settings: MakerSettings, *, retry_failed: bool) -> dict[str, Record]:
    """Return the valid records of earlier runs, by ID."""
    written = journal.read()
    found = {}
    for job in jobs:
        record = written.get(job.id)
        if record is None or (retry_failed and record.state == FAILED):
            continue
        if record.still_holds(job, settings.bundle_id, Path(settings.out)):
            found[job.id] = record
    return found


def plan_units(jobs: Sequence[Job], known: Mapping[str, Record], batch: int) -> list[tuple[Job, ...]]:
    """Divide jobs into batches, in the order of their first rows; omit batches that are entirely done.

    The batches depend only on the table, never on existing clips: a resumed run gives the same bits as an
    uninterrupted one.
    """
    open_units: dict[tuple[object, ...], list[Job]] = {}
    units: list[list[Job]] = []
    for job in jobs:
        unit = open_units.get(job.group)
        if unit is None or len(unit) == batch or job.fault:
            unit = []
            units.append(unit)
            if not job.fault:
                open_units[job.group] = unit
        unit.append(job)
    return [tuple(unit) for unit in units if any(job.id not in known for job in unit)]


def _threads(options: BulkOptions) -> int | None:
    return options.threads or (None if options.workers == 1 else max(1, available_cores() // options.workers))


def _answers(
    settings: MakerSettings, units: Sequence[Unit], options: BulkOptions, pipeline: Pipeline
) -> Generator[list[Record], None, None]:
    if options.ray is not None:
        from lfdm_export.bulk.ray_data import make_on_ray

        yield from make_on_ray(settings, units, address=options.ray, workers=options.workers)
    elif options.workers > 1 and len(units) > 1:
        yield from make_in_processes(settings, units, options.workers)
    else:
        maker = Maker(settings, pipeline)
        for unit in units:
            yield maker.make(unit)
