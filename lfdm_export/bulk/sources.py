"""Sources of a job's image, embedding or motion: a file, or a cell of the table of jobs."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfdm_export.errors import InputError, MissingDependencyError

#: Limit of a file or a cell; no image is larger.
MAX_BYTES = 256 << 20
#: Column of JSON lines that holds an image as text.
BASE64 = "image_base64"
#: Size in bytes and modification time in nanoseconds of a file; None if there is no file.
Stamp = tuple[int, int] | None


@dataclass(frozen=True)
class InFile:
    """A file.

    Attributes:
        path: absolute path.
    """

    path: str

    @property
    def name(self) -> str:
        """Name for error messages."""
        return self.path

    def stamp(self) -> Stamp:
        """Return a stamp that changes with the content, as far as the file system reports changes."""
        return _stamp(self.path)

    def read(self) -> bytes:
        """Return the content.

        Raises:
            InputError: the file cannot be read, or is too large.
        """
        try:
            with Path(self.path).open("rb") as file:
                content = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise InputError(f"{self.path} cannot be read: {error.strerror or error}; check the path") from error
        if len(content) > MAX_BYTES:
            raise InputError(f"{self.path} has more than {MAX_BYTES >> 20} MiB; give a smaller file")
        return content


@dataclass(frozen=True)
class InTable:
    """A cell of a table of jobs: bytes, text in base64, or numbers.

    Attributes:
        table: absolute path of the table.
        column: name of the column.
        part: row group of a Parquet file; byte offset of the line in JSON lines.
        row: row within the group of a Parquet file; 0 in JSON lines.
        line: row number from 1, for error messages.
    """

    table: str
    column: str
    part: int
    row: int
    line: int

    @property
    def name(self) -> str:
        """Name for error messages."""
        return f"{self.table}, row {self.line}, {self.column}"

    def stamp(self) -> Stamp:
        """Return the stamp of the table."""
        return _stamp(self.table)

    def read(self) -> bytes:
        """Return the content; numbers as JSON.

        Raises:
            InputError: the cell cannot be read.
            MissingDependencyError: the table is a Parquet file, and pyarrow is not installed.
        """
        if Path(self.table).suffix.lower() == ".parquet":
            value = _group(self.table, self.column, self.part)[self.row]
        else:
            value = json.loads(_line(self.table, self.part))[self.column]
        if isinstance(value, dict):  # image format of the `datasets` library
            value = value.get("bytes")
        if self.column == BASE64 and isinstance(value, str):
            try:
                return base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError) as error:
                raise InputError(f"{self.name} is not base64 ({error}); encode the bytes of a picture") from error
        if isinstance(value, bytes):
            return value
        if isinstance(value, Sequence) and not isinstance(value, str):
            return json.dumps(list(value)).encode()
        raise InputError(f"{self.name} holds {type(value).__name__}, expected bytes or a list of numbers")


Source = InFile | InTable


def import_parquet(purpose: str) -> Any:
    """Return the module `pyarrow.parquet`.

    Raises:
        MissingDependencyError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise MissingDependencyError("pyarrow", purpose, "bulk") from error
    return pyarrow.parquet


@functools.lru_cache(maxsize=2)
def _group(table: str, column: str, group: int) -> list[object]:
    """Return a column of one row group; cached, because consecutive jobs usually read the same group."""
    parquet = import_parquet(f"reading {table}")
    try:
        with parquet.ParquetFile(table) as file:
            found: list[object] = file.read_row_group(group, columns=[column]).column(0).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{table} cannot be read: {str(error).splitlines()[0]}") from error
    return found


def _line(table: str, begin: int) -> bytes:
    try:
        with Path(table).open("rb") as file:
            file.seek(begin)
            return file.readline(2 * MAX_BYTES)
    except OSError as error:
        raise InputError(f"{table} cannot be read: {error.strerror or error}") from error


def _stamp(path: str) -> Stamp:
    try:
        facts = os.stat(path)  # noqa: PTH116
    except (OSError, ValueError):
        return None
    return facts.st_size, facts.st_mtime_ns
