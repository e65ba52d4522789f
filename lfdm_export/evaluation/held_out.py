"""Clips of a data set's held-out split by number, in an order that depends only on the seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import InputError
from lfdm_export.wording import shortened
from lfdm_models.training.data import choose_frames, permutation
from lfdm_models.training.draws import Draws
from lfdm_models.training.layouts import DiskSet, Entry
from lfdm_models.training.pictures import ClipError, DiskClip

UInt8Array = NDArray[np.uint8]

# Stream of draws that separates its frames from those of trainings.
_FRAMES = 2**52
#: The label of clips without one.
NO_LABEL = "None"


@dataclass(frozen=True)
class HeldOutClips:
    """Held-out clips, shuffled in every epoch; a clip shows other frames in each.

    Attributes:
        clips: the split, without clips that have no label.
        size: pixels per side.
        frames: frames per clip.
        seed: seed of order and frames.
    """

    clips: DiskSet
    size: int
    frames: int
    seed: int

    @classmethod
    def of(cls, clips: DiskSet, bundle: Bundle, seed: int) -> HeldOutClips:
        """Prepare clips for a bundle, in its size and number of frames.

        Raises:
            InputError: no clip has a label, or the bundle does not know one of the labels.
        """
        entries = tuple(entry for entry in clips.entries if entry.label != NO_LABEL)
        known = {label.strip().casefold() for label in bundle.labels}
        unknown = sorted({entry.label for entry in entries if entry.label.strip().casefold() not in known})
        if unknown or not entries:
            found = f"the labels {shortened(unknown)}, which" if unknown else "no labels, and"
            raise InputError(
                f"the held-out clips of {clips.name} have {found} {bundle.path} does not know; its labels are "
                f"{shortened(bundle.labels) or 'none'}: evaluate a bundle of this data set, exported with its labels"
            )
        geometry = bundle.manifest.geometry
        kept = DiskSet(clips.name, entries, clips.labels, clips.framing, clips.choice)
        return cls(kept, geometry.image_size, geometry.frames, seed)

    def __len__(self) -> int:
        return len(self.clips.entries)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the clips, in the data set's order."""
        present = {entry.label for entry in self.clips.entries}
        return tuple(label for label in self.clips.labels if label in present)

    @property
    def subjects(self) -> tuple[str, ...]:
        """The subjects of the clips, in natural order; empty if some clip names none."""
        present = {entry.subject for entry in self.clips.entries}
        return () if "" in present else tuple(sorted(present, key=lambda name: (len(name), name)))

    def entry(self, number: int) -> Entry:
        """The clip with a number."""
        epoch, place = divmod(number, len(self))
        return self.clips.entries[int(permutation(len(self), self.seed, epoch)[place])]

    def entries(self, count: int) -> tuple[Entry, ...]:
        """The clips 0 … count - 1."""
        return tuple(self.entry(number) for number in range(count))

    def read(self, number: int, *, first_only: bool = False) -> UInt8Array:
        """Frames (T, size, size, 3) uint8 of the clip with a number; with `first_only`, T is 1.

        Raises:
            InputError: the clip cannot be read, or has a single frame.
        """
        path = self.entry(number).path
        draws = Draws(self.seed, _FRAMES + number)
        try:
            clip = DiskClip(path, self.clips.framing, self.size)
            if len(clip) < 2:
                raise InputError(f"{path} has {len(clip)} frames, expected 2 or more; remove it from the split")
            chosen = choose_frames(len(clip), self.frames, self.clips.choice, draws)
            return clip.read(chosen[:1] if first_only else chosen)
        except ClipError as error:
            raise InputError(f"{path} cannot be read ({error}); repair it, or remove it from the split") from error
