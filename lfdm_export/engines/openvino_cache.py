"""What OpenVINO compiled, kept in files: read only for exactly the same graph, weights, versions, processor, options.

An entry is one file: a line of JSON with its key and the SHA-256 of the rest, then what the plugin exported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lfdm_export.machine import package_versions, processor_facts

logger = logging.getLogger(__name__)

_LONGEST_HEADER = 4096


def cache_key(graph: bytes, weights: Mapping[str, NDArray[np.uint8]], options: Mapping[str, object]) -> str:
    """SHA-256 of everything that decides what is compiled.

    Args:
        graph: the graph, or a digest of it.
        weights: files of weights by name.
        options: of the compiler.
    """
    digest = hashlib.sha256()
    facts = {
        "options": {name: str(value) for name, value in sorted(options.items())},
        "versions": package_versions(("openvino", "lfdm-export")),
        "processor": processor_facts(),
    }
    digest.update(json.dumps(facts, sort_keys=True).encode())
    for name, data in sorted(weights.items()):
        digest.update(f"{name} {len(data)} ".encode())
        digest.update(data.data)
    digest.update(graph)
    return digest.hexdigest()


@dataclass(frozen=True)
class CompiledCache:
    """A folder of compiled graphs; made when the first is written."""

    folder: Path

    def path(self, entry: str) -> Path:
        """The file of an entry."""
        return self.folder / f"{entry}.compiled"

    def read(self, entry: str, key: str) -> bytes | None:
        """What was written under that name with that key, if it is whole; else None."""
        try:
            with self.path(entry).open("rb") as file:
                header = json.loads(file.readline(_LONGEST_HEADER))
                if not isinstance(header, dict) or header.get("key") != key:
                    return None
                blob = file.read()
        except (OSError, ValueError):
            return None
        return blob if hashlib.sha256(blob).hexdigest() == header.get("sha256") else None

    def write(self, entry: str, key: str, blob: bytes | memoryview) -> None:
        """Keep an entry, in place of an older one; a folder that cannot be written leaves the cache as it is."""
        path = self.path(entry)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        header = {"key": key, "sha256": hashlib.sha256(blob).hexdigest()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                file.write(json.dumps(header).encode() + b"\n")
                file.write(blob)
            temporary.replace(path)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            logger.warning("what OpenVINO compiled cannot be kept in %s: %s", self.folder, error.strerror or error)
