"""Records of the GPU suite: the results of one part, as JSON that is always valid."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import write_json

Record = dict[str, Any]

#: Folders whose names are removed from records: they mean nothing on another machine.
_FOLDERS = (f"{sys.prefix}/", f"{Path(__file__).resolve().parents[1]}/")


def write_record(path: Path, record: Record) -> None:
    """Write a record atomically; JSON has no infinities or NaN, so they become "inf" and "nan"."""
    write_json(path, plain(record))


def read_record(path: Path) -> Record | None:
    """Read a part's record; None if there is none."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record


def plain(value: Any) -> Any:
    """A record ready to be written: without infinities, and without the names of this machine's folders."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        for folder in _FOLDERS:
            value = value.replace(folder, "")
        return value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
