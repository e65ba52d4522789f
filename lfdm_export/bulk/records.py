"""What became of jobs, in files to which every run appends, and which the next run reads."""

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
#: Below the folder of the run.
JOURNAL_FOLDER = "journal"
_ENDING = ".jsonl"


@dataclass(frozen=True)
class Record:
    """What became of one job.

    Attributes:
        id: of the job.
        state: "made" or "failed".
        file: the clip's, below the folder of the run.
        digest: of the job; see `Job.digest`.
        content: of what it read; see `content_of`.
        stamps: of what it read, before it was read.
        error: the sentence that says why it failed.
        seconds: that it took; its share, of jobs that were made together.
        worker: host and process that did it.
        at: when, in seconds of the epoch.
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
        """One line."""
        return json.dumps(asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Record | None:
        """What `to_json` gave; None if it is something else."""
        try:
            plain = json.loads(text)
            plain["stamps"] = tuple(None if stamp is None else tuple(map(int, stamp)) for stamp in plain["stamps"])
            record = cls(**plain)
        except (ValueError, TypeError, KeyError, RecursionError):
            return None
        sound = all(isinstance(getattr(record, field.name), _TYPES[str(field.type)]) for field in fields(cls))
        return record if sound and record.state in (MADE, FAILED) else None

    def still_holds(self, job: Job, bundle_id: str, out: Path) -> bool:
        """Whether the job is still the one that this was written of, and its clip is there.

        What it read is compared by its files' sizes and times, and by content where these have changed. A clip whose
        photograph is gone is kept.
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
    """The record of a job that nobody lived to write of."""
    stamps = tuple(source.stamp() for source in job.sources)
    return Record(job.id, FAILED, job.file, job.digest(bundle_id), "", stamps, error, at=time.time())


_TYPES: Mapping[str, type | tuple[type, ...]] = {"str": str, "float": (int, float), "tuple[Stamp, ...]": tuple}


def content_of(read: Iterable[bytes]) -> str:
    """SHA-256 of all that a job reads."""
    digest = hashlib.sha256()
    for part in read:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()


class Journal:
    """The records of a folder. Every writer has a file of its own there, so that any number may write at a time."""

    def __init__(self, out: Path) -> None:
        """Use the folder of a run; nothing is written yet."""
        self._folder = out / JOURNAL_FOLDER
        self._file: TextIO | None = None

    def read(self) -> dict[str, Record]:
        """The newest record of each job.

        Lines that are cut off, as the last one of a killed run, are passed over.
        """
        newest: dict[str, Record] = {}
        for path in sorted(self._folder.glob(f"*{_ENDING}")):
            with path.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    record = Record.from_json(line)
                    if record is None:
                        logger.info("%s: passed over a line that is no record", path)
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
        """Close the file that was written."""
        if self._file is not None:
            self._file.close()
