"""The requested videos, in SQLite and files beside it. Both outlive the server."""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

from lfdm_export.errors import InputError
from lfdm_export.files.atomic import claimed

Status = Literal["queued", "in_progress", "completed", "failed", "cancelled"]
STATUSES: tuple[Status, ...] = get_args(Status)
#: The final statuses.
ENDED: tuple[Status, ...] = ("completed", "failed", "cancelled")
_SCHEMA = """
CREATE TABLE IF NOT EXISTS videos (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    completed_at INTEGER,
    progress INTEGER NOT NULL DEFAULT 0,
    wish TEXT NOT NULL,
    error TEXT
);
CREATE INDEX IF NOT EXISTS by_status ON videos (status, number);
"""
# The column `wish`, named so in stored databases, has the request.
_COLUMNS = "id, status, created_at, completed_at, progress, wish, error"


@dataclass(frozen=True)
class Video:
    """A requested video.

    Attributes:
        id: ``video_`` and 32 hexadecimal digits.
        status: the status.
        created_at, completed_at: seconds since the epoch.
        progress: percent, 0 to 100.
        request: the request, as plain JSON values by name.
        error: why it failed, as a sentence.
    """

    id: str
    status: Status = "queued"
    created_at: int = 0
    completed_at: int | None = None
    progress: int = 0
    request: Mapping[str, object] = field(default_factory=dict)
    error: str | None = None


class Store:
    """A folder of videos. For any number of threads of one process."""

    def __init__(self, folder: Path) -> None:
        """Open or create the folder, and queue again what an earlier server did not finish.

        Raises:
            InputError: the folder cannot be used.
        """
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._claim = claimed(folder / "lock")
            self._database = sqlite3.connect(folder / "videos.sqlite3", check_same_thread=False, isolation_level=None)
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.executescript(_SCHEMA)
        except BlockingIOError as error:
            raise InputError(f"another server uses the folder of videos {folder}; give each its own") from error
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"the folder of videos {folder} cannot be used: {error}; choose another") from error
        with self._locked() as database:
            database.execute("UPDATE videos SET status = 'queued', progress = 0 WHERE status = 'in_progress'")

    def close(self) -> None:
        """Close the database."""
        with self._lock:
            self._database.close()
        self._claim.close()

    def add(self, request: Mapping[str, object], photo: bytes, most: int) -> Video | None:
        """Queue a request; returns None if the queue is full.

        Args:
            request: the request.
            photo: the prepared picture, as PNG.
            most: most requests that may be queued or running.
        """
        video = Video("video_" + secrets.token_hex(16), created_at=int(time.time()), request=request)
        self.photo(video.id).write_bytes(photo)
        with self._locked() as database:
            (active,) = database.execute(
                "SELECT count(*) FROM videos WHERE status IN ('queued', 'in_progress')"
            ).fetchone()
            if active < most:
                database.execute(
                    "INSERT INTO videos (id, status, created_at, wish) VALUES (?, 'queued', ?, ?)",
                    (video.id, video.created_at, json.dumps(request)),
                )
                return video
        self.photo(video.id).unlink(missing_ok=True)
        return None

    def get(self, name: str) -> Video | None:
        """Look up a video by its id; None if there is no such video."""
        with self._locked() as database:
            row = database.execute(f"SELECT {_COLUMNS} FROM videos WHERE id = ?", (name,)).fetchone()
        return None if row is None else _video(row)

    def page(self, *, limit: int, after: str | None, newest_first: bool) -> tuple[list[Video], bool]:
        """List videos in the order of their requests, and say whether there are more.

        Args:
            limit: most videos to list.
            after: id of the last video of the page before.
            newest_first: list the newest first, else the oldest.

        Raises:
            InputError: there is no video with the id `after`.
        """
        order, beyond = ("DESC", "<") if newest_first else ("ASC", ">")
        with self._locked() as database:
            condition, values = "", []
            if after is not None:
                row = database.execute("SELECT number FROM videos WHERE id = ?", (after,)).fetchone()
                if row is None:
                    raise InputError(f"there is no video {after[:80]!r} to list after")
                condition, values = f"WHERE number {beyond} ?", [row[0]]
            rows = database.execute(
                f"SELECT {_COLUMNS} FROM videos {condition} ORDER BY number {order} LIMIT ?",
                (*values, limit + 1),
            ).fetchall()
        return [_video(row) for row in rows[:limit]], len(rows) > limit

    def begin_next(self) -> Video | None:
        """Set the oldest queued video to in progress, and return it; None if none is queued."""
        with self._locked() as database:
            row = database.execute(
                f"SELECT {_COLUMNS} FROM videos WHERE status = 'queued' ORDER BY number LIMIT 1"
            ).fetchone()
            if row is None:
                return None
            database.execute("UPDATE videos SET status = 'in_progress' WHERE id = ?", (row[0],))
        return replace(_video(row), status="in_progress")

    def report(self, name: str, progress: int) -> None:
        """Store the progress of a video in progress."""
        with self._locked() as database:
            database.execute("UPDATE videos SET progress = ? WHERE id = ? AND status = 'in_progress'", (progress, name))

    def end(self, name: str, status: Status, error: str | None = None) -> bool:
        """Store how a video ended; returns False if it had ended before or does not exist."""
        progress = ", progress = 100" if status == "completed" else ""
        with self._locked() as database:
            changed = database.execute(
                f"UPDATE videos SET status = ?, error = ?, completed_at = ?{progress} "
                "WHERE id = ? AND status IN ('queued', 'in_progress')",
                (status, error, int(time.time()), name),
            ).rowcount
        self.photo(name).unlink(missing_ok=True)
        return bool(changed)

    def remove(self, name: str) -> None:
        """Remove a video and its files."""
        with self._locked() as database:
            database.execute("DELETE FROM videos WHERE id = ?", (name,))
        for path in (self.photo(name), self.clip(name, "mp4"), self.clip(name, "gif")):
            path.unlink(missing_ok=True)

    def photo(self, name: str) -> Path:
        """The file of a request's picture, removed when the video ends."""
        return self.folder / f"{name}.png"

    def clip(self, name: str, ending: str) -> Path:
        """The file of a video."""
        return self.folder / f"{name}.{ending}"

    @contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield self._database
            except BaseException:
                self._database.execute("ROLLBACK")
                raise
            self._database.execute("COMMIT")


def _video(row: tuple[object, ...]) -> Video:
    name, status, created_at, completed_at, progress, request, error = row
    return Video(name, status, created_at, completed_at, progress, json.loads(str(request)), error)  # type: ignore[arg-type]
