"""Tables of jobs: CSV, JSON lines and Parquet, one row per clip.

Required: ``image`` (a path; in Parquet also bytes, or images in the format of the ``datasets`` library) or, in JSON
lines, ``image_base64``; and one of ``label``, ``text``, ``embedding`` (path of a .npy file; in JSON lines and Parquet
also a list of numbers) and ``motion`` (a path). Optional: ``id``, ``seed``, ``sampler``, ``steps``, ``eta``,
``guidance_scale``, ``crop``, ``paste_back``, ``format``, ``fps``, ``scale``, ``panels``. Empty cells are absent values.
Paths are relative to the table's folder. Columns whose names begin with an underscore are ignored.
"""

from __future__ import annotations

import csv
import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from lfdm_export.bulk.job import CONDITIONS, Condition, Job, JobSettings, check_id, nowhere, seed_of
from lfdm_export.bulk.sources import BASE64, InFile, InTable, Source, import_parquet
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.generate.arguments import real_number, whole_number
from lfdm_export.pictures.crop import Crop, parse_crop
from lfdm_export.sampling.noise import check_seeds
from lfdm_export.sampling.options import SamplingOptions

#: Supported file name extensions.
KINDS = (".csv", ".jsonl", ".ndjson", ".parquet")
_TRUE, _FALSE = ("true", "yes", "1"), ("false", "no", "0")
_LONGEST_CELL = 64 << 20
_Reader: TypeAlias = Callable[[object, str], object]


@dataclass(frozen=True)
class _Row:
    """One row as stored in the file.

    Attributes:
        line: row number from 1, without the header.
        cells: plain values by column, without absent ones.
        inside: columns whose values stay in the table until they are needed.
    """

    line: int
    cells: Mapping[str, object]
    inside: Mapping[str, InTable]


def read_jobs(path: str, defaults: JobSettings | None = None) -> tuple[Job, ...]:
    """Read every job of a table, in order; images and other long values stay in the table.

    An invalid row becomes a job with an error message (`Job.fault`); an invalid table raises.

    Args:
        path: a .csv, .jsonl or .parquet file.
        defaults: settings for rows that give none.

    Raises:
        InputError: the file cannot be read, has unknown columns or no rows, or two rows have the same ID.
        MissingDependencyError: the table is a Parquet file, and pyarrow is not installed.
    """
    table = user_path(path).absolute()
    ending = table.suffix.lower()
    if ending not in KINDS:
        raise InputError(f"{path} is not a supported table of jobs, expected one of {', '.join(KINDS)}")
    rows = _csv_rows if ending == ".csv" else _parquet_rows if ending == ".parquet" else _json_rows
    try:
        jobs = tuple(_job(row, table.parent, defaults or JobSettings()) for row in rows(table))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"the table of jobs {path} cannot be read: {reason}") from error
    if not jobs:
        raise InputError(f"the table of jobs {path} has no rows")
    seen: dict[str, int] = {}
    for line, job in enumerate(jobs, 1):
        first = seen.setdefault(job.id.casefold(), line)
        if first != line:
            raise InputError(f"{path}: the id {job.id!r} is in rows {first} and {line}; each names a file of its own")
    return jobs


# --- Kinds of tables ------------------------------------------------------------------------------


def _csv_rows(table: Path) -> Iterator[_Row]:
    csv.field_size_limit(_LONGEST_CELL)
    with table.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        names = [name.strip() for name in next(reader, [])]
        _check_columns(names, table)
        for line, cells in enumerate(filter(None, reader), 1):
            if len(cells) != len(names):
                raise InputError(f"{table}: row {line} has {len(cells)} cells, expected {len(names)}")
            yield _Row(line, _present(dict(zip(names, cells, strict=True))), {})


def _json_rows(table: Path) -> Iterator[_Row]:
    begin = line = 0
    with table.open("rb") as file:
        for text in file:
            at, begin = begin, begin + len(text)
            if not text.strip():
                continue
            line += 1
            try:
                cells = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise InputError(f"{table}: row {line} is not JSON ({error})") from error
            if not isinstance(cells, dict):
                raise InputError(f"{table}: row {line} is {type(cells).__name__}, expected a JSON object")
            _check_columns(cells, table, line)
            long = [name for name, value in cells.items() if name == BASE64 or isinstance(value, list)]
            inside = {name: InTable(str(table), name, at, 0, line) for name in long if cells[name] is not None}
            yield _Row(line, _present({name: cells[name] for name in cells if name not in long}), inside)


def _parquet_rows(table: Path) -> Iterator[_Row]:
    parquet = import_parquet(f"reading {table.name}")
    import pyarrow as pa

    try:
        with parquet.ParquetFile(table) as file:
            schema = file.schema_arrow
            _check_columns(schema.names, table)
            long = [field.name for field in schema if _is_long(field.type)]
            short = [name for name in schema.names if name not in long and not name.startswith("_")]
            line = 0
            for part in range(file.num_row_groups):
                group = file.read_row_group(part, columns=short)
                there = {name: _present_in(file, part, name) for name in long}
                for row, cells in enumerate(group.to_pylist()):
                    line += 1
                    inside = {
                        name: InTable(str(table), name, part, row, line) for name, valid in there.items() if valid[row]
                    }
                    yield _Row(line, _present(cells), inside)
    except pa.ArrowException as error:
        raise InputError(f"the table of jobs {table} cannot be read: {str(error).splitlines()[0]}") from error


def _present_in(file: Any, part: int, name: str) -> list[bool]:
    """Return which rows of a row group have a value in a column; does not read it if the statistics count no nulls."""
    group = file.metadata.row_group(part)
    columns = (group.column(index) for index in range(group.num_columns))
    counts = [
        column.statistics.null_count if column.statistics is not None and column.statistics.has_null_count else None
        for column in columns
        if column.path_in_schema.partition(".")[0] == name and not column.path_in_schema.endswith(".path")
    ]
    if counts and all(count == 0 for count in counts):
        return [True] * group.num_rows
    valid: list[bool] = file.read_row_group(part, columns=[name]).column(0).is_valid().to_pylist()
    return valid


def _is_long(kind: Any) -> bool:
    """Whether values of an Arrow type stay in the table: bytes, images, lists."""
    from pyarrow import types

    binary = types.is_binary(kind) or types.is_large_binary(kind)
    long: bool = (
        binary
        or types.is_struct(kind)
        or types.is_list(kind)
        or types.is_large_list(kind)
        or (types.is_fixed_size_list(kind))
    )
    return long


def _present(cells: Mapping[str, object]) -> dict[str, object]:
    return {
        name: value
        for name, value in cells.items()
        if value is not None and not (isinstance(value, str) and not value.strip()) and not name.startswith("_")
    }


def _check_columns(names: Any, table: Path, line: int | None = None) -> None:
    known = ("id", "image", BASE64, *CONDITIONS, "seed", *_SAMPLING, *_WRITING)
    where = f"{table}" if line is None else f"{table}: row {line}"
    for name in names:
        if name not in known and not str(name).startswith("_"):
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise InputError(
                f"{where} has the unknown column {name!r}: {hint}known are {', '.join(known)}; "
                "one that is for you alone may begin with an underscore"
            )
    if line is None and not {"image", BASE64} & set(names):
        raise InputError(f"{where} has no column image, which says where the photographs are")


# --- Rows -----------------------------------------------------------------------------------------


def _job(row: _Row, folder: Path, defaults: JobSettings) -> Job:
    """Convert a row to a job, with a fault if the row is invalid; only the ID must be valid."""
    given = row.cells.get("id", f"row-{row.line:06d}")
    try:
        name = check_id(str(given))
    except InputError as error:
        raise InputError(f"row {row.line} of the table of jobs: {error}") from error
    job = Job(name, nowhere(), seed=seed_of(name), settings=defaults)
    try:
        seed = _whole(row.cells["seed"], "seed") if "seed" in row.cells else seed_of(name)
        options = replace(defaults.options, **_read(row, _SAMPLING))  # type: ignore[arg-type]
        settings = replace(defaults, options=options, **_read(row, _WRITING))  # type: ignore[arg-type]
        if settings.paste_back and settings.crop is None:
            raise InputError("paste_back needs a crop, the region to put back; found none")
        job = replace(job, seed=check_seeds([seed])[0], settings=settings)
        job = replace(job, image=_image(row, folder))
        return _conditioned(job, row, folder)
    except InputError as error:
        return replace(job, fault=str(error))


def _image(row: _Row, folder: Path) -> Source:
    found = [name for name in ("image", BASE64) if name in row.cells or name in row.inside]
    if len(found) != 1:
        raise InputError(f"found {' and '.join(found) or 'none'} of image and {BASE64}, expected exactly one")
    return _source(row, found[0], folder)


def _conditioned(job: Job, row: _Row, folder: Path) -> Job:
    """Return the job with its condition."""
    found: list[Condition] = [name for name in CONDITIONS if name in row.cells or name in row.inside]
    if len(found) != 1:
        raise InputError(f"found {' and '.join(found) or 'none'} of {', '.join(CONDITIONS)}, expected exactly one")
    (condition,) = found
    if condition in ("label", "text"):
        value = row.cells.get(condition)
        if not isinstance(value, str):
            raise InputError(f"{condition} is {type(value).__name__}, expected text")
        return replace(job, condition=condition, value=value)
    if condition == "motion":
        needless = [name for name in ("seed", *_SAMPLING) if name in row.cells]
        if needless:
            raise InputError(f"a motion samples nothing, found {', '.join(needless)}; leave them empty")
        if "motion" in row.inside:
            raise InputError("motion is not a path; save the motion as a file")
        # The run's default options apply only to rows that sample.
        settings = replace(job.settings, options=SamplingOptions())
        return replace(job, condition=condition, moved_by=_source(row, condition, folder), settings=settings)
    return replace(job, condition=condition, moved_by=_source(row, condition, folder))


def _source(row: _Row, column: str, folder: Path) -> Source:
    if column in row.inside:
        return row.inside[column]
    path = row.cells[column]
    if not isinstance(path, str):
        raise InputError(f"{column} is {type(path).__name__}, expected a path")
    return InFile(str(folder / user_path(path)))


# --- Cells ----------------------------------------------------------------------------------------


def _whole(value: object, name: str) -> int:
    if isinstance(value, float) and value.is_integer():  # spreadsheets store integers as floats
        return int(value)
    return whole_number(value, name)


def _flag(value: object, name: str) -> bool:
    word = str(value).strip().casefold()
    if word not in (*_TRUE, *_FALSE):
        raise InputError(f"{name} is {value!r}, expected true or false")
    return word in _TRUE


def _word(value: object, name: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{name} is {value!r}, expected text")
    return value.strip()


def _crop(value: object, name: str) -> Crop:
    return parse_crop(_word(value, name))


def _read(row: _Row, columns: Mapping[str, _Reader]) -> dict[str, object]:
    """Read those of the columns that the row has, by name."""
    return {name: read(row.cells[name], name) for name, read in columns.items() if name in row.cells}


#: Columns of `SamplingOptions`, and the readers of their cells.
_SAMPLING: Mapping[str, _Reader] = {
    "sampler": _word,
    "steps": _whole,
    "eta": real_number,
    "guidance_scale": real_number,
}
#: Other columns of `JobSettings`, and the readers of their cells.
_WRITING: Mapping[str, _Reader] = {
    "crop": _crop,
    "paste_back": _flag,
    "format": _word,
    "fps": real_number,
    "scale": _whole,
    "panels": _flag,
}
