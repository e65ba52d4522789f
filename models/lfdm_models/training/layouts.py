"""Layout on disk, and splits, of the published data sets and of the user's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lfdm_models.labels import MHAD, MUG, NATOPS
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.pictures import Framing, is_clip

logger = logging.getLogger(__name__)

Split = Literal["train", "test"]
FrameChoice = Literal["random", "spread"]

_MUG_TRAIN = (8, 17, 21, 28, 30, 31, 34, 36, 37, 38, 39, 42, 43, 44, 45, 55, 60, 61, 62, 63, 71, 75, 76, 77, 83, 84)
_MUG_TEST = (1, 2, 6, 7, 10, 13, 14, 20, 27, 32, 33, 40, 46, 48, 49, 52, 64, 65, 66, 70, 72, 73, 74, 78, 79, 82)
_MHAD_NAME = re.compile(r"a(\d+)_s(\d+)_t(\d+)", re.IGNORECASE)
_NATOPS_NAME = re.compile(r"g(\d+)_?s(\d+)", re.IGNORECASE)
#: Rules of the data sets for their pictures.
FRAMING = {
    "mug": Framing(),
    "mhad": Framing(resize_first=(336, 480)),
    "natops": Framing(frame_size=(320, 240), crop=(30, 10, 290, 239)),
    "plain": Framing(),
}
# UTD-MHAD has 27 actions; the published model has labels for all except this one ("sit to stand").
_MHAD_ABSENT = 24


@dataclass(frozen=True)
class Entry:
    """A clip on disk.

    Attributes:
        path: a video, or a folder of pictures.
        label: one of the data set's labels; "None" for a clip without one.
        subject: number or name of the person in it; "" where the data set does not say.
    """

    path: Path
    label: str
    subject: str = ""


@dataclass(frozen=True)
class DiskSet:
    """The clips of one split of a data set.

    Attributes:
        name: name of the data set.
        entries: the clips of the split, in the order of their paths.
        labels: all labels, in the order of their embeddings.
        framing: applied to pictures before they are scaled.
        choice: how frames are chosen: at random and sorted, the first fixed, or one from each of T equal intervals.
    """

    name: str
    entries: tuple[Entry, ...]
    labels: tuple[str, ...]
    framing: Framing
    choice: FrameChoice


def mug(root: Path, split: Split) -> DiskSet:
    """MUG: folders of pictures, somewhere below a folder named by subject and one named by label.

    Both ``subjects3/SUBJECT/LABEL/takeNNN/*.jpg`` and ``SUBJECT/LABEL/*.jpg`` work; the split is the published one.

    Raises:
        TrainingError: the folder is missing, or has no clip of the split.
    """
    subjects = {f"{number:03d}" for number in (_MUG_TRAIN if split == "train" else _MUG_TEST)}
    entries = []
    for path in _clips_below(root):
        parts = [part.lower() for part in path.relative_to(root).parts]
        label = next((part for part in parts if part in MUG), None)
        subject = next((part for part in parts if part in subjects), None)
        if label is not None and subject is not None:
            entries.append(Entry(path, label, subject))
    expected = "pictures in SUBJECT/LABEL/TAKE folders"
    return DiskSet("mug", _some(entries, root, split, expected), MUG, FRAMING["mug"], "random")


def mhad(root: Path, split: Split, subjects: Sequence[int] | None = None) -> DiskSet:
    """UTD-MHAD: videos (or folders of pictures) named ``aACTION_sSUBJECT_tTRIAL…``.

    Args:
        root: folder of the clips, at any depth.
        split: part of the subjects; by default, odd numbers are for training, as in the data set's own protocol.
        subjects: the subjects in this split, instead of the default.

    Raises:
        TrainingError: the folder is missing, or has no clip of the split.
    """
    chosen = set(subjects) if subjects is not None else {n for n in range(1, 9) if (n % 2 == 1) == (split == "train")}
    entries, odd = [], 0
    for path in _clips_below(root):
        match = _MHAD_NAME.search(path.name)
        if match is None or int(match[2]) not in chosen or int(match[1]) == _MHAD_ABSENT:
            continue
        index = int(match[1]) - 1 - (int(match[1]) > _MHAD_ABSENT)
        if 0 <= index < len(MHAD):
            entries.append(Entry(path, MHAD[index], str(int(match[2]))))
        else:
            odd += 1
    _report(odd, root, "an action number out of 1 to 27")
    found = _some(entries, root, split, "clips named a1_s1_t1_color.avi")
    return DiskSet("mhad", found, MHAD, FRAMING["mhad"], "spread")


def natops(root: Path, split: Split, subjects: Sequence[int] | None = None) -> DiskSet:
    """NATOPS: videos (or folders of pictures), one per gesture, named ``gGESTUREsSUBJECT…``.

    Args:
        root: folder of the clips, at any depth.
        split: part of the subjects; by default 1 to 10 are for training and 11 to 20 for tests, which is this project's
            choice: check it against the protocol that you compare with.
        subjects: the subjects in this split, instead of the default.

    Raises:
        TrainingError: the folder is missing, or has no clip of the split.
    """
    chosen = set(subjects if subjects is not None else range(1, 11) if split == "train" else range(11, 21))
    entries, odd = [], 0
    for path in _clips_below(root):
        match = _NATOPS_NAME.search(path.name)
        if match is None or int(match[2]) not in chosen:
            continue
        index = int(match[1]) - 1
        if 0 <= index < len(NATOPS):
            entries.append(Entry(path, NATOPS[index], str(int(match[2]))))
        else:
            odd += 1
    _report(odd, root, "a gesture number out of 1 to 24")
    found = _some(entries, root, split, "clips named g01s01r01.avi")
    return DiskSet("natops", found, NATOPS, FRAMING["natops"], "spread")


def plain(root: Path, split: Split) -> DiskSet:
    """The user's own clips: ``LABEL/CLIP``, where a clip is a video, a GIF or a folder of pictures.

    In ``LABEL/SUBJECT/CLIP`` the middle folder names the person. Folders ``train`` and ``test``, if both exist, are the
    splits; otherwise all clips are for training. Clips in a folder ``None`` have no label.

    Raises:
        TrainingError: the folder is missing, or has no clip of the split.
    """
    if (root / "train").is_dir() and (root / "test").is_dir():
        base = root / split
    elif split == "train":
        base = root
    else:
        raise TrainingError(f"{root} has no folders train and test, so no split for tests; sort the clips into both")
    entries = []
    for path in _clips_below(base):
        parts = path.relative_to(base).parts
        if len(parts) > 1:
            entries.append(Entry(path, parts[0], parts[1] if len(parts) > 2 else ""))
    found = _some(entries, base, split, "LABEL/CLIP, a clip being a video or a folder of pictures")
    labels = tuple(sorted({entry.label for entry in found} - {"None"}))
    if not labels:
        raise TrainingError(f"{base} holds clips without a label only; put clips into folders named by label")
    return DiskSet("plain", found, labels, FRAMING["plain"], "spread")


def _clips_below(root: Path) -> Iterator[Path]:
    """Every video, and every folder with pictures, in the order of their paths."""
    if not root.is_dir():
        raise TrainingError(f"there is no folder {root}; give the folder of the data set")
    for path in sorted(root.rglob("*")):
        if not path.name.startswith(".") and is_clip(path):
            yield path


def _some(entries: Sequence[Entry], root: Path, split: str, expected: str) -> tuple[Entry, ...]:
    if not entries:
        raise TrainingError(f"{root} has no clips of the {split} split; expected {expected}")
    return tuple(entries)


def _report(count: int, root: Path, what: str) -> None:
    if count:
        logger.warning("%s: %d clips have %s and are skipped", root, count, what)
