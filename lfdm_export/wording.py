"""What objects of the interface, and errors, say of themselves, in one line."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from lfdm_export.errors import LfdmExportError


def shortened(names: Collection[object], most: int = 4) -> str:
    """The first of some names, and how many there are beyond them: "anger, disgust, fear, happiness + 3 more"."""
    shown = ", ".join(str(name) for name in list(names)[:most])
    return f"{shown} + {len(names) - most} more" if len(names) > most else shown


def count(number: int, noun: str) -> str:
    """A number and its noun: "1 clip", "3 clips"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def not_default(settings: Any) -> str:
    """A dataclass's name and those of its fields that are not at their default; a field without repr is never shown."""
    shown = []
    for field in dataclasses.fields(settings):
        made = dataclasses.MISSING if field.default_factory is dataclasses.MISSING else field.default_factory()
        value = getattr(settings, field.name)
        if value != (field.default if made is dataclasses.MISSING else made):
            shown.append(f"{field.name}={value!r}" if field.repr else f"{field.name}=<hidden>")
    return f"{type(settings).__name__}({', '.join(shown)})"


def one_line(error: Exception, most: int = 500) -> str:
    """The text of a library's error in one line, of so many characters at most."""
    return " ".join(str(error).split())[:most]


def describe_error(error: Exception) -> str:
    """What went wrong, in a sentence."""
    if isinstance(error, LfdmExportError):
        return str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror or error}"
    if isinstance(error, MemoryError):
        return "out of memory; use fewer frames or a smaller image, or close other programs"
    return f"{type(error).__name__}: {error} (a fault of this program: run again with --debug, and report it)"
