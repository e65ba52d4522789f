"""Records of the GPU suite: what one part found, as JSON that is valid whatever happened."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from benchmarks.machine import write_json

Record = dict[str, Any]


def write_record(path: Path, record: Record) -> None:
    """Write a record, whole or not at all; JSON has no infinities, so that they become "inf" and "nan"."""
    write_json(path, _finite(record))


def read_record(path: Path) -> Record | None:
    """What a part wrote; None if it wrote nothing."""
    try:
        record: Record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return record


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
