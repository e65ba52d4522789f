"""A cache of clips, keyed by everything that determines their bits."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from lfdm_export import __version__
from lfdm_export.bundle.manifest import Manifest
from lfdm_export.errors import BundleError
from lfdm_export.files.arrays import read_arrays
from lfdm_export.files.atomic import write_file
from lfdm_export.files.names import user_path
from lfdm_export.files.room import make_room, used_now
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.pictures.clip import Clip

logger = logging.getLogger(__name__)

#: Default size of a cache in bytes: some thousand clips of the published size.
DEFAULT_SIZE = 4_000_000_000
_ENDING = ".npz"


def clip_key(facts: Mapping[str, object], arrays: Iterable[NDArray[Any]]) -> str:
    """SHA-256 of the inputs of a clip.

    Args:
        facts: plain JSON values by name.
        arrays: pictures, embeddings, latents; the hash covers their dtypes, shapes and bytes.
    """
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class ClipCache:
    """A folder of clips, created by the first write. Several processes may share it.

    An entry is a NumPy archive; an entry that is damaged or does not match its key is replaced.

    Attributes:
        folder: the folder.
        size: maximum size in bytes; the least recently used entries are removed first.
    """

    folder: Path
    size: int = DEFAULT_SIZE

    @classmethod
    def at(cls, folder: str | os.PathLike[str]) -> ClipCache:
        """Open the cache in a folder, as the user names it.

        Raises:
            InputError: the path is not valid; see `lfdm_export.files.names.user_path`.
        """
        return cls(user_path(folder))

    def get_or_make(
        self,
        stages: StageRunner,
        made_from: Mapping[str, object],
        arrays: Sequence[NDArray[np.generic]],
        make: Callable[[], Clip],
    ) -> Clip:
        """Return the stored clip; if there is none, make and store it.

        Args:
            stages: makes the clip: its bundle and its engine are part of the key.
            made_from: what determines the clip besides the arrays and the engine, including ``batch`` and ``frames``.
                The name of the bundle, ``bundle``, does not count.
            arrays: pictures, embeddings, latents.
            make: makes the clip.
        """
        facts = {**made_from, "bundle": None, "version": __version__, "engine": stages.engine_facts()}
        key, batch, frames = clip_key(facts, arrays), cast(int, made_from["batch"]), cast(int, made_from["frames"])
        clip = self.read(key, batch, frames, stages.bundle.manifest)
        if clip is None:
            clip = make()
            self.write(key, clip)
        return clip

    def read(self, key: str, batch: int, frames: int, manifest: Manifest) -> Clip | None:
        """Return a clip, without labels, seeds and settings; None if it is missing or damaged.

        Args:
            key: from `clip_key`.
            batch: samples of the clip.
            frames: frames of the clip.
            manifest: manifest of the bundle that makes the clip.
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
            logger.info("made again: %s", error)
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
        """Store a clip if there is space; if the folder is not writable, log a warning."""
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
