"""``recipe.json``: what was made of a recipe in a folder, from what, by which sessions, on what machine.

OUT/recipe.json    this record
OUT/PART/          the files of each part; of trained parts also state, log and checkpoints
OUT/card.md        the tables of a model card, once everything is made
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from lfdm_export.errors import InputError
from lfdm_export.files.atomic import write_file
from lfdm_export.files.digests import json_digest, sha256_and_size
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.recipe.parts import Part, Recipe

RECORD, CARD = "recipe.json", "card.md"


@dataclass(frozen=True)
class Session:
    """One process's work on a part.

    Attributes:
        started: time of its start, in UTC, as in ISO 8601.
        seconds: wall time, up to its last checkpoint if it was killed.
        first_step, last_step: steps of the optimizer that were done before it and after it.
        seconds_per_step: wall time per step, without loading and saving at the start and the end; None for no steps.
        cpu_seconds_per_step: the same in seconds of a core, which other programs on the machine affect less.
        load: the machine's load average of a minute at the end; None where the system has none.
        device: "cpu", or the GPU's name.
        machine: processor, threads and versions.
        ended: how it ended; "killed" until it has ended.
    """

    started: str
    seconds: float
    first_step: int
    last_step: int
    seconds_per_step: float | None
    cpu_seconds_per_step: float | None
    load: float | None
    device: str
    machine: Mapping[str, str]
    ended: Literal["killed", "stopped", "failed", "done"] = "killed"


@dataclass(frozen=True)
class Entry:
    """State of one part.

    Attributes:
        key: hash of its settings and of the files that it is made from.
        settings: its settings.
        files: SHA-256 of each of its result's files, by path in the part's folder; empty until it is done.
        sessions: its sessions since the key last changed.
    """

    key: str
    settings: Mapping[str, object]
    files: Mapping[str, str] = field(default_factory=dict)
    sessions: tuple[Session, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the part was made completely."""
        return bool(self.files)


@dataclass(frozen=True)
class _Content:
    """The content of the file."""

    format: Literal["lfdm-recipe"]
    version: Literal[1]
    recipe: str
    recipe_version: int
    parts: Mapping[str, Entry]


class Record:
    """The record of a folder; every change is written at once."""

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        """Read the record of `folder`, if there is one.

        Raises:
            InputError: the record is of another recipe or cannot be read.
        """
        self.folder, self.recipe = folder, recipe
        self.entries: dict[str, Entry] = {}
        path = folder / RECORD
        if not path.exists():
            return
        try:
            content = from_plain(_Content, json.loads(path.read_bytes()), RECORD)
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{path} cannot be read as a recipe's record: {error}; choose another folder") from error
        if content.recipe != recipe.name:
            raise InputError(f"{folder} is of recipe {content.recipe!r}, not {recipe.name!r}; choose another folder")
        self.entries = dict(content.parts)

    def key(self, part: Part) -> str:
        """Hash of everything that a part's result depends on, with its inputs as they are now."""
        recipe = self.recipe
        content = {
            "recipe": [recipe.name, recipe.version, to_plain(recipe.config), recipe.image_size, recipe.frames],
            "part": [part.kind, to_plain(part)],
            "inputs": {name: dict(self.entries[name].files) for name in part.inputs},
        }
        return json_digest(content)

    def made(self, part: Part) -> bool:
        """Whether a part is there, whole, and made with today's settings and inputs, which must be there too."""
        entry = self.entries.get(part.name)
        if entry is None or not entry.done or entry.key != self.key(part):
            return False
        return digests(self.folder / part.name, entry.files) == entry.files

    def begin(self, part: Part) -> None:
        """Add an entry for a part, in place of one with another key or with results that are damaged."""
        key, entry = self.key(part), self.entries.get(part.name)
        if entry is None or entry.key != key or entry.done:
            self.entries[part.name] = Entry(key, to_plain(part))

    def add(self, part: Part, session: Session) -> None:
        """Add a session, which `update` may change."""
        self._change(part, sessions=(*self.entries[part.name].sessions, session))

    def update(self, part: Part, session: Session, files: Mapping[str, str] | None = None) -> None:
        """Replace the last session; `files` of the result mark the part as done."""
        entry = self.entries[part.name]
        self._change(part, sessions=(*entry.sessions[:-1], session), files=files or {})

    def _change(self, part: Part, **changes: Any) -> None:
        self.entries[part.name] = replace(self.entries[part.name], **changes)
        content = _Content("lfdm-recipe", 1, self.recipe.name, self.recipe.version, self.entries)
        text = json.dumps(to_plain(content), indent=1, ensure_ascii=False) + "\n"
        write_file(self.folder / RECORD, text.encode())


def digests(folder: Path, names: Mapping[str, object] | tuple[str, ...]) -> dict[str, str]:
    """SHA-256 of the files that are in `folder`, by their names there; a folder's name stands for its files."""
    found: dict[str, str] = {}
    for name in names:
        path = folder / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found |= {
            file.relative_to(folder).as_posix(): sha256_and_size(file)[0]
            for file in files
            if file.is_file() and not file.is_symlink()
        }
    return found


def load_average() -> float | None:
    """The machine's load average of a minute; None where the system has none."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
