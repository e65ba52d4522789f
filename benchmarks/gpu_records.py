"""Records of the GPU suite: what one part found, as JSON that is valid whatever happened."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from benchmarks.machine import write_json

Record = dict[str, Any]

#: Folders whose names are left out of what is recorded: they say nothing about another machine.
_FOLDERS = (f"{sys.prefix}/", f"{Path(__file__).resolve().parents[1]}/")


def write_record(path: Path, record: Record) -> None:
    """Write a record, whole or not at all; JSON has no infinities, so that they become "inf" and "nan"."""
    write_json(path, plain(record))


def read_record(path: Path) -> Record | None:
    """What a part wrote; None if it wrote nothing."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record


def plain(value: Any) -> Any:
    """A record as it is kept: without infinities, and without the names of this machine's folders."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str):
        for folder in _FOLDERS:
            value = value.replace(folder, "")
        return value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
