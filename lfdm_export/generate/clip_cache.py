"""Clips that were made before, by everything that decides their bits."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.errors import BundleError
from lfdm_export.files.arrays import read_arrays
from lfdm_export.files.atomic import write_file
from lfdm_export.files.names import user_path
from lfdm_export.files.room import make_room, used_now
from lfdm_export.pictures.clip import Clip

logger = logging.getLogger(__name__)

#: Bytes that a cache may take where nobody says: some thousand clips of the published size.
DEFAULT_SIZE = 4_000_000_000
_ENDING = ".npz"


def clip_key(facts: Mapping[str, object], arrays: Iterable[NDArray[Any]]) -> str:
    """SHA-256 of what a clip is made from.

    Args:
        facts: plain JSON values by name.
        arrays: pictures, embeddings, latents: their types, shapes and bytes count.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ClipCache:
    """A folder of clips, made when the first is written. For any number of processes.

    An entry is a NumPy archive; one that is damaged, or is not what its key stands for, is made again.

    Attributes:
        folder: the folder.
        size: bytes that it may take; what was used longest ago goes first.
    """

    folder: Path
    size: int = DEFAULT_SIZE

    @classmethod
    def at(cls, folder: str | os.PathLike[str]) -> ClipCache:
        """The cache in a folder, as the user names it.

        Raises:
            InputError: see `lfdm_export.files.names.user_path`.
        """
        return cls(user_path(folder))

    def read(self, key: str, batch: int, frames: int, manifest: Manifest) -> Clip | None:
        """A clip, without labels, seeds and settings, if it is there and whole; else None.

        Args:
            key: of `clip_key`.
            batch: samples of the clip.
            frames: its frames.
            manifest: of the bundle that makes it.
        """
        path = self._path(key)
        size, small = manifest.geometry.image_size, manifest.geometry.latent_size
        if not path.is_file():
            return None
        expected = {
            "frames": ("uint8", (batch, frames, size, size, 3)),
            "warped": ("uint8", (batch, frames, size, size, 3)),
            "latent": ("float32", (batch, 3, frames, small, small)),
            "source": ("uint8", (batch, size, size, 3)),
        }
        try:
            arrays = read_arrays(path, expected, "cached clip")
        except BundleError as error:
            logger.info("made anew: %s", error)
            return None
        used_now(path)
        return Clip(
            frames=arrays["frames"],
            warped=arrays["warped"],
            latent=arrays["latent"],
            source=arrays["source"],
            residual_flow=manifest.config.residual_flow,
        )

    def write(self, key: str, clip: Clip) -> None:
        """Keep a clip, if there is room; where the folder cannot be written, a warning says so."""
        stream = io.BytesIO()
        np.savez_compressed(stream, frames=clip.frames, warped=clip.warped, latent=clip.latent, source=clip.source)
        content = stream.getvalue()
        if len(content) > self.size:
            logger.info("a clip is not kept: it takes %d bytes, the cache may take %d", len(content), self.size)
            return
        path = self._path(key)
        try:
            make_room(self.folder, _ENDING, len(content), self.size, replaced=path)
            write_file(path, content)
        except OSError as error:
            logger.warning("a clip is not kept in %s: %s", self.folder, error.strerror or error)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}{_ENDING}"
