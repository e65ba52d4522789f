"""One-line texts about objects of the interface, errors and counts."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from lfdm_export.errors import LfdmExportError


def shortened(names: Collection[object], most: int = 4) -> str:
    """The first `most` names, and the number of the others: "anger, disgust, fear, happiness + 3 more"."""
    shown = ", ".join(str(name) for name in list(names)[:most])
    return f"{shown} + {len(names) - most} more" if len(names) > most else shown


def count(number: int, noun: str) -> str:
    """A number and its noun: "1 clip", "3 clips"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def not_default(settings: Any) -> str:
    """A dataclass's name and its fields that differ from their default; a field with `repr=False` stays hidden."""
    shown = []
    for field in dataclasses.fields(settings):
        made = dataclasses.MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(settings, field.name)
        if value != (field.default if made is dataclasses.MISSING else made):
            shown.append(f"{field.name}={value!r}" if field.repr else f"{field.name}=<hidden>")
    return f"{type(settings).__name__}({', '.join(shown)})"


def one_line(error: Exception, most: int = 500) -> str:
    """The text of a library's error in one line of at most `most` characters."""
    return " ".join(str(error).split())[:most]


#: What PyTorch and the engines say instead of raising MemoryError.
_NO_MEMORY = ("can't allocate memory", "bad_alloc", "Failed to allocate memory", "out of memory")


def describe_error(error: Exception) -> str:
    """What went wrong, in one sentence."""
    if isinstance(error, LfdmExportError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        return "out of memory; use fewer frames or a smaller image, or close other programs"
    return f"{type(error).__name__}: {error} (a fault of this program: run again with --debug, and report it)"
