"""Where a job's picture, embedding or motion lies: in a file of its own, or in a cell of the table of jobs."""

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

#: Of a file or a cell; no picture is larger.
MAX_BYTES = 256 << 20
#: Columns of JSON lines that hold a picture as text.
BASE64 = "image_base64"
#: Size and time of the last change of a file, in nanoseconds; None where there is none.
Stamp = tuple[int, int] | None


@dataclass(frozen=True)
class InFile:
    """A file.

    Attributes:
        path: absolute.
    """

    path: str

    @property
    def name(self) -> str:
        """For messages."""
        return self.path

    def stamp(self) -> Stamp:
        """Changes whenever the content does, as far as the file system tells."""
        return _stamp(self.path)

    def read(self) -> bytes:
        """The content.

        Raises:
            InputError: it cannot be read, or is too large.
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
        table: path of the table, absolute.
        column: name of the column.
        part: of a Parquet file the row group; of JSON lines the byte at which the line begins.
        row: of a Parquet file the row within the group; of JSON lines 0.
        line: of the table, counted as people do; for messages.
    """

    table: str
    column: str
    part: int
    row: int
    line: int

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.table}, row {self.line}, {self.column}"

    def stamp(self) -> Stamp:
        """That of the table."""
        return _stamp(self.table)

    def read(self) -> bytes:
        """The content; numbers as JSON.

        Raises:
            InputError: it cannot be read.
            MissingDependencyError: of a Parquet file, without pyarrow.
        """
        if Path(self.table).suffix.lower() == ".parquet":
            value = _group(self.table, self.column, self.part)[self.row]
        else:
            value = json.loads(_line(self.table, self.part))[self.column]
        if isinstance(value, dict):  # pictures as the `datasets` library keeps them
            value = value.get("bytes")
        if self.column == BASE64 and isinstance(value, str):
            try:
                return base64.b64decode(value, validate=True)
            except (binascii.Error, ValueError) as error:
                raise InputError(f"{self.name} is no base64 ({error}); encode the picture's bytes anew") from error
        if isinstance(value, bytes):
            return value
        if isinstance(value, Sequence) and not isinstance(value, str):
            return json.dumps(list(value)).encode()
        raise InputError(f"{self.name} holds {type(value).__name__}, expected bytes or a list of numbers")


Source = InFile | InTable


def import_parquet(purpose: str) -> Any:
    """`pyarrow.parquet`.

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
    """A column of one row group; jobs come in order, so that the next one is most often of the same."""
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
