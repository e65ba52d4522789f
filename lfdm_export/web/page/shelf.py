"""The newest clips of the page, as files that the browser plays and saves."""

from __future__ import annotations

import re
import secrets
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path

from lfdm_export.pictures.clip import Clip

_MOST = 64
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Kept:
    """A clip on the shelf.

    Attributes:
        place: name of its folder, below the folder of the shelf.
        name: name of its files when they are saved.
        files: names of its files in the folder; "clip.motion" and "panels.mp4" are optional.
        about: what the clip shows, as alternative text.
        frames: number of frames.
        width, height: pixels of the clip's pictures.
        size: rows and columns of each panel.
    """

    place: str
    name: str
    files: tuple[str, ...]
    about: str
    frames: int
    width: int
    height: int
    size: int


class Shelf:
    """A folder of the newest clips; older ones are removed. For any number of threads."""

    def __init__(self, folder: Path) -> None:
        """Use an empty folder."""
        self.folder = folder
        self._places: list[str] = []
        self._lock = threading.Lock()

    def keep(self, clip: Clip, *, panels: bool) -> Kept:
        """Write a clip of one sample: as MP4 and GIF, its motion if it has one, and its panels if requested.

        Args:
            clip: the clip.
            panels: whether to write the panels too.

        Raises:
            InputError: the clip cannot be written, or has no panels.
            MissingDependencyError: PyAV is not installed.
        """
        place = secrets.token_hex(16)
        folder = self.folder / place
        folder.mkdir()
        files = [path.name for ending in ("mp4", "gif") for path in clip.save(folder / f"clip.{ending}")]
        if clip.latent.size:  # a motion has no surroundings
            files += [path.name for path in replace(clip, surroundings=None).save(folder / "clip.motion")]
        if panels:
            files += [path.name for path in clip.save(folder / "panels.mp4", panels=True)]
        with self._lock:
            self._places.append(place)
            gone = [self._places.pop(0) for _ in range(len(self._places) - _MOST)]
        for old in gone:
            shutil.rmtree(self.folder / old, ignore_errors=True)
        about = clip.labels[0] if clip.labels else "a motion"
        seed = f"-{clip.seeds[0]}" if clip.seeds else ""
        name = re.sub(r"\W+", "_", about)[:_LONGEST_NAME].strip("_") or "clip"
        frames, size = clip.frames.shape[1:3]
        height, width = (size, size) if clip.surroundings is None else clip.surroundings.picture.shape[:2]
        return Kept(place, name + seed, tuple(files), about, frames, width, height, size)
