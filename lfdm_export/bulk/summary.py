"""Summary of a run: a JSON file, and a table with one row per job."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

from lfdm_export import __version__
from lfdm_export.bulk.job import Job
from lfdm_export.bulk.records import MADE, Record
from lfdm_export.bulk.sources import import_parquet
from lfdm_export.files.atomic import write_file
from lfdm_export.pictures.metadata import PROGRAM
from lfdm_export.sampling.options import OPTION_NAMES

NAME = "summary"
#: State of a job that has no record.
LEFT = "left"
_NUMBERS = {"seed": "uint64", "steps": "int32", "eta": "float32", "guidance_scale": "float32", "seconds": "float64"}
_MOST_FAILURES = 100


@dataclass(frozen=True)
class Summary:
    """Results of a table of jobs.

    Attributes:
        jobs: rows of the table, or of this shard.
        made: rows whose clip exists.
        failed: rows that failed, in this run or an earlier one.
        left: rows without a record, because the run ended early.
        made_now, failed_now: the same counts for this run alone.
        seconds: duration of this run.
        failures: error messages of all failed rows, by ID.
        table: name of the file with one row per job.
    """

    jobs: int
    made: int
    failed: int
    left: int
    made_now: int
    failed_now: int
    seconds: float
    failures: Mapping[str, str]
    table: str

    @property
    def clips_per_second(self) -> float:
        """Throughput of this run."""
        return self.made_now / self.seconds if self.seconds > 0 else 0.0


def summarize(
    jobs: Sequence[Job], records: Mapping[str, Record], *, now: Sequence[Record], seconds: float, table: str
) -> Summary:
    """Count the results.

    Args:
        jobs: jobs of the shard.
        records: newest record of each job.
        now: records that this run wrote.
        seconds: duration of this run.
        table: name of the file with one row per job.
    """
    known = [records[job.id] for job in jobs if job.id in records]
    made = sum(record.state == MADE for record in known)
    made_now = sum(record.state == MADE for record in now)
    return Summary(
        jobs=len(jobs),
        made=made,
        failed=len(known) - made,
        left=len(jobs) - len(known),
        made_now=made_now,
        failed_now=len(now) - made_now,
        seconds=round(seconds, 3),
        failures={record.id: record.error for record in known if record.state != MADE},
        table=table,
    )


def table_name(ending: str) -> str:
    """Return ``summary`` with the shard's suffix: a Parquet file if pyarrow is installed, else CSV."""
    return f"{NAME}{ending}" + (".parquet" if find_spec("pyarrow") else ".csv")


def write_summary(
    out: Path, ending: str, summary: Summary, facts: Mapping[str, object], rows: Sequence[Mapping[str, object]]
) -> None:
    """Write both files.

    Args:
        out: folder of the run.
        ending: the shard's suffix, before the dot in both names.
        summary: the counts.
        facts: facts of bundle and run, as plain JSON values.
        rows: result of `table_rows`.

    Raises:
        OSError: a file cannot be written.
    """
    plain = asdict(summary)
    plain["failures"] = dict(list(summary.failures.items())[:_MOST_FAILURES])
    plain["clips_per_second"] = round(summary.clips_per_second, 4)
    text = json.dumps({"program": PROGRAM, "version": __version__, **facts, **plain}, indent=2, ensure_ascii=False)
    write_file(out / summary.table, _parquet(rows) if summary.table.endswith(".parquet") else _csv(rows))
    write_file(out / f"{NAME}{ending}.json", (text + "\n").encode())


def table_rows(jobs: Sequence[Job], records: Mapping[str, Record]) -> list[dict[str, object]]:
    """Return one row per job: its inputs and its result."""
    rows: list[dict[str, object]] = []
    for job in jobs:
        record = records.get(job.id)
        motion = job.condition == "motion"
        rows.append(
            {
                "id": job.id,
                "state": LEFT if record is None else record.state,
                "file": record.file if record is not None and record.state == MADE else None,
                "error": (record.error or None) if record is not None else None,
                "image": job.image.name,
                "label": job.value if job.condition == "label" else None,
                "text": job.value if job.condition == "text" else None,
                "embedding": job.moved_by.name if job.moved_by is not None and not motion else None,
                "motion": job.moved_by.name if job.moved_by is not None and motion else None,
                "seed": None if motion else job.seed,
                **{name: getattr(job.settings.options, name) for name in OPTION_NAMES},
                "seconds": record.seconds if record is not None else None,
                "worker": (record.worker or None) if record is not None else None,
            }
        )
    return rows


def _csv(rows: Sequence[Mapping[str, object]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _parquet(rows: Sequence[Mapping[str, object]]) -> bytes:
    parquet = import_parquet("a summary as Parquet")
    import pyarrow as pa

    schema = pa.schema([(name, _NUMBERS.get(name, "string")) for name in rows[0]])
    sink = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(list(rows), schema=schema), sink)
    return sink.getvalue()
