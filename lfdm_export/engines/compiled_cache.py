"""Compiled stages, kept in the user cache folder, limited in size: never in a bundle.

They are code for this machine, and a bundle may come from a stranger. An entry is read only under exactly the key that
it was written with, which holds everything that determines the compiled code. It is one file: a line of JSON with its
key and the SHA-256 of the rest, then the output of the compiler.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path

from lfdm_export.errors import InputError
from lfdm_export.files.atomic import replacing
from lfdm_export.files.room import make_room, used_now
from lfdm_export.machine import optional_cache

logger = logging.getLogger(__name__)

#: Sets the maximum size of the cache, such as 500MB; 0 stores nothing.
SIZE_VARIABLE = "LFDM_CACHE_SIZE"
#: Default maximum size in bytes: two models of the published size with all their stages.
DEFAULT_SIZE = 4_000_000_000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", re.IGNORECASE)
_LONGEST_HEADER = 4096
_ENDING = ".compiled"


def user_compiled_cache(compiler: str) -> CompiledCache | None:
    """The cache of a compiler, by its name; None if there is no folder for it, or LFDM_CACHE_SIZE is 0.

    Raises:
        InputError: LFDM_CACHE_SIZE is not a size.
    """
    size, folder = cache_size(), optional_cache()
    return None if size == 0 or folder is None else CompiledCache(folder / compiler, size)


def cache_size() -> int:
    """Maximum size of the user cache, in bytes.

    Raises:
        InputError: LFDM_CACHE_SIZE is not a size.
    """
    said = os.environ.get(SIZE_VARIABLE, "").strip()
    if not said:
        return DEFAULT_SIZE
    found = _SIZE.fullmatch(said)
    if found is None:
        raise InputError(f"{SIZE_VARIABLE} is {said!r}, expected a size such as 4GB or 500MB, or 0 to keep nothing")
    return int(float(found[1]) * _UNITS[found[2].upper()])


@dataclass(frozen=True)
class CompiledCache:
    """A folder of compiled graphs, created by the first write. Several processes may share it.

    Attributes:
        folder: the folder.
        size: maximum size in bytes; the least recently used entries are removed first.
    """

    folder: Path
    size: int = DEFAULT_SIZE

    def read(self, name: str, key: str) -> bytes | None:
        """Return the entry with this name and key; None if it is missing or damaged."""
        path = self._path(name, key)
        try:
            with path.open("rb") as file:
                header = json.loads(file.readline(_LONGEST_HEADER))
                if not isinstance(header, dict) or header.get("key") != key:
                    return None
                blob = file.read()
        except (OSError, ValueError):
            return None
        if hashlib.sha256(blob).hexdigest() != header.get("sha256"):
            return None
        used_now(path)
        return blob

    def write(self, name: str, key: str, blob: bytes | memoryview) -> None:
        """Store an entry if there is space; if the folder is not writable, the cache remains unchanged."""
        path = self._path(name, key)
        header = json.dumps({"key": key, "sha256": hashlib.sha256(blob).hexdigest()}).encode() + b"\n"
        needed = len(header) + memoryview(blob).nbytes
        if needed > self.size:
            logger.info("%s is not kept: it takes %d bytes, the cache may take %d", name, needed, self.size)
            return
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            make_room(self.folder, _ENDING, needed, self.size, replaced=path)
            with replacing(path) as file:
                file.write(header)
                file.write(blob)
        except OSError as error:
            logger.info("what was compiled cannot be kept in %s: %s", self.folder, error.strerror or error)

    def _path(self, name: str, key: str) -> Path:
        return self.folder / f"{name}-{key[:16]}{_ENDING}"
