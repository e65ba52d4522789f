"""Records of jobs, in files that every run appends to and the next run reads."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TextIO

from lfdm_export.bulk.job import Job
from lfdm_export.bulk.sources import Stamp
from lfdm_export.errors import InputError

logger = logging.getLogger(__name__)

MADE, FAILED = "made", "failed"
#: Folder of the records, below the folder of the run.
JOURNAL_FOLDER = "journal"
_ENDING = ".jsonl"


@dataclass(frozen=True)
class Record:
    """Result of one job.

    Attributes:
        id: ID of the job.
        state: "made" or "failed".
        file: path of the clip, relative to the folder of the run.
        digest: digest of the job, from `lfdm_export.bulk.job.Job.digest`.
        content: digest of the inputs, from `content_of`.
        stamps: stamps of the inputs, taken before reading.
        error: error message of a failed job.
        seconds: duration; for a batch, the job's share.
        worker: host and process of the worker.
        at: time of the record, in seconds since the epoch.
    """

    id: str
    state: str
    file: str
    digest: str
    content: str
    stamps: tuple[Stamp, ...]
    error: str = ""
    seconds: float = 0.0
    worker: str = ""
    at: float = 0.0

    def to_json(self) -> str:
        """Return the record as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Record | None:
        """Read the output of `to_json`; None for any other text."""
        try:
            plain = json.loads(text)
            plain["stamps"] = tuple(None if stamp is None else tuple(map(int, stamp)) for stamp in plain["stamps"])
            record = cls(**plain)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        sound = all(isinstance(getattr(record, field.name), _TYPES[str(field.type)]) for field in fields(cls))
        return record if sound and record.state in (MADE, FAILED) else None

    def still_holds(self, job: Job, bundle_id: str, out: Path) -> bool:
        """Whether the record still describes the job, and the clip exists.

        Inputs are compared by file size and time, and by content if these differ. A clip whose image was deleted is
        kept.
        """
        if self.digest != job.digest(bundle_id) or self.file != job.file:
            return False
        if self.state == MADE and not (out / self.file).is_file():
            return False
        stamps = tuple(source.stamp() for source in job.sources)
        if stamps == self.stamps:
            return True
        if None in stamps:
            return self.state == MADE
        try:
            return self.content == content_of([source.read() for source in job.sources])
        except InputError:
            return False


def failed_record(job: Job, bundle_id: str, error: str) -> Record:
    """Return the record of a job whose workers died."""
    stamps = tuple(source.stamp() for source in job.sources)
    return Record(job.id, FAILED, job.file, job.digest(bundle_id), "", stamps, error, at=time.time())


_TYPES: Mapping[str, type | tuple[type, ...]] = {"str": str, "float": (int, float), "tuple[Stamp, ...]": tuple}


def content_of(read: Iterable[bytes]) -> str:
    """Return the SHA-256 of everything that a job reads."""
    digest = hashlib.sha256()
    for part in read:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


class Journal:
    """Records of a folder. Each writer appends to its own file, so any number of writers can run concurrently."""

    def __init__(self, out: Path) -> None:
        """Use the folder of a run; writes nothing yet."""
        self._folder = out / JOURNAL_FOLDER
        self._file: TextIO | None = None

    def read(self) -> dict[str, Record]:
        """Return the newest record of each job.

        Incomplete lines, such as the last one of a killed run, are skipped.
        """
        newest: dict[str, Record] = {}
        for path in sorted(self._folder.glob(f"*{_ENDING}")):
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    record = Record.from_json(line)
                    if record is None:
                        logger.info("%s: passed over a line that is not a record", path)
                    elif record.id not in newest or newest[record.id].at <= record.at:
                        newest[record.id] = record
        return newest

    def write(self, records: Sequence[Record]) -> None:
        """Append records.

        Raises:
            OSError: the file cannot be written.
        """
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(4)}{_ENDING}"
            self._file = path.open("x", encoding="utf-8")
        self._file.write("".join(record.to_json() + "\n" for record in records))
        self._file.flush()

    def close(self) -> None:
        """Close this writer's file."""
        if self._file is not None:
            self._file.close()
