"""A handful of pictures and clips of one person: pairs of frames to learn from, and others to measure on.

A picture alone makes a pair with itself, bent by a smooth random map of the plane: a known motion.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from lfdm_models.lfae import Lfae
from lfdm_models.pictures.errors import PictureError
from lfdm_models.pictures.formats import PICTURE_ENDINGS
from lfdm_models.pictures.raster import read_picture
from lfdm_models.training.data import ColorJitter, Pair
from lfdm_models.training.drawing import UInt8Array
from lfdm_models.training.draws import Draws
from lfdm_models.training.equivariance import PlaneMap
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.pictures import ClipError, DiskClip, Framing, is_clip

#: Most frames of all pictures and clips, which are kept in memory.
MOST_FRAMES = 10_000
# Streams of draws: of examples to learn from, and of bends to measure on.
_EXAMPLES, _MEASURED = 2**53, 2**54
# Bends of each picture that is measured.
_BENDS = 4
# Frames per run of the network when measuring.
_BATCH = 8


@dataclass(frozen=True)
class Person:
    """Pictures and clips in the size of the model.

    Attributes:
        pictures: single pictures, each (H, W, 3) uint8.
        clips: clips, each (T, H, W, 3) uint8 of 2 or more frames.
    """

    pictures: tuple[UInt8Array, ...]
    clips: tuple[UInt8Array, ...]

    def describe(self) -> str:
        """Numbers of pictures and frames, for messages and facts."""
        frames = sum(len(clip) for clip in self.clips)
        return f"{len(self.pictures)} pictures, {len(self.clips)} clips of {frames} frames"


def read_person(root: Path, framing: Framing, size: int) -> Person:
    """Read the pictures in a folder, and the clips in it and below it: videos, GIFs, and folders of pictures.

    Args:
        root: the folder.
        framing: the rule of the model's data set.
        size: pixels per side of the model.

    Raises:
        TrainingError: the folder is missing or has nothing of the kind, a file cannot be read, or there is too much.
    """
    if not root.is_dir():
        raise TrainingError(f"there is no folder {root}; give a folder of pictures and clips of one person")
    pictures: list[UInt8Array] = []
    clips: list[UInt8Array] = []
    for path in sorted(path for path in root.rglob("*") if not path.name.startswith(".")):
        try:
            if is_clip(path):
                clip = DiskClip(path, framing, size)
                if len(clip) < 2:
                    raise ClipError(f"it has {len(clip)} frames, expected at least 2")
                clips.append(clip.read(range(len(clip))))
            elif path.parent == root and path.is_file() and path.suffix.lower() in PICTURE_ENDINGS:
                pictures.append(framing.prepare(Image.fromarray(read_picture(path, path.name).array()), size))
        except (ClipError, PictureError) as error:
            raise TrainingError(f"{path} cannot be used: {error}; repair it, or remove it from the folder") from error
        if len(pictures) + sum(map(len, clips)) > MOST_FRAMES:
            raise TrainingError(f"{root} has more than {MOST_FRAMES} frames, which do not fit; a handful is enough")
    if not pictures and not clips:
        raise TrainingError(f"{root} holds no pictures, videos or folders of pictures; put those of one person there")
    return Person(tuple(pictures), tuple(clips))


@dataclass(frozen=True)
class Measured:
    """Pairs to measure on.

    Attributes:
        pictures: pictures, which are rebuilt under `_BENDS` fixed bends each.
        clips: first frame and frames that are rebuilt from it, of each clip.
        held_out: whether nothing of it is learned from, except the first frames of clips, which are their sources.
    """

    pictures: tuple[UInt8Array, ...]
    clips: tuple[tuple[UInt8Array, UInt8Array], ...]
    held_out: bool

    def pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Sources and driving frames, each (B, 3, H, W) float32 in [0, 1]."""
        for number, picture in enumerate(self.pictures):
            source = to_batch(picture[None]).expand(_BENDS, -1, -1, -1)
            yield source, bent(source, Draws(number, _MEASURED))
        for first, others in self.clips:
            for start in range(0, len(others), _BATCH):
                driving = to_batch(others[start : start + _BATCH])
                yield to_batch(first[None]).expand_as(driving), driving


def divide(person: Person, share: float) -> tuple[Person, Measured]:
    """Divide into what is learned from and what is measured.

    The last pictures are held out, and the last frames of each clip, whose first frame is their source.

    Args:
        person: everything.
        share: share that is held out; 0 learns from everything, and measures pictures under other bends.

    Raises:
        TrainingError: the share is out of range, or there is too little to hold out a part.
    """
    if not 0 <= share <= 0.5:
        raise TrainingError(f"the share that is held out is {share}, expected 0 to 0.5")
    if not share:
        return person, Measured(person.pictures, tuple((clip[0], clip[1:]) for clip in person.clips), False)
    count = math.ceil(share * len(person.pictures)) if len(person.pictures) > 1 else 0
    ends = [math.ceil(share * len(clip)) if len(clip) > 3 else 0 for clip in person.clips]
    if not count and not any(ends):
        raise TrainingError(
            f"nothing can be held out of {person.describe()}: it takes 2 pictures, or a clip of 4 frames; give more, "
            "or hold out 0, which measures on what is learned from"
        )
    kept = len(person.pictures) - count
    learned = tuple(clip[: len(clip) - end] for clip, end in zip(person.clips, ends, strict=True))
    held = tuple((clip[0], clip[len(clip) - end :]) for clip, end in zip(person.clips, ends, strict=True) if end)
    return Person(person.pictures[:kept], learned), Measured(person.pictures[kept:], held, True)


@dataclass(frozen=True)
class PersonPairs(Dataset[Pair]):
    """Examples by number: a picture and itself bent, or two frames of a clip; frames are equally likely.

    Attributes:
        person: what is learned from.
        seed: seed of the choice of frames, bends and colors.
        jitter: change of colors; None for none.
    """

    person: Person
    seed: int
    jitter: ColorJitter | None = None

    def __getitem__(self, number: int) -> Pair:
        draws = Draws(self.seed, _EXAMPLES + number)
        source, driving = self._frames(draws)
        if self.jitter is not None:
            both = self.jitter.apply(torch.stack([source, driving]).permute(0, 2, 3, 1).numpy(), draws)
            source, driving = torch.from_numpy(both).permute(0, 3, 1, 2).contiguous()
        return {"source": source, "driving": driving}

    def _frames(self, draws: Draws) -> tuple[Tensor, Tensor]:
        place = draws.integer(len(self.person.pictures) + sum(map(len, self.person.clips)))
        if place < len(self.person.pictures):
            picture = to_batch(self.person.pictures[place][None])
            pair = picture[0], bent(picture, draws)[0]
            # Bending blurs; where it is the source that is bent, the goal is the picture itself.
            return pair if draws.chance(0.5) else (pair[1], pair[0])
        place -= len(self.person.pictures)
        for clip in self.person.clips:
            if place < len(clip):
                other = (place + 1 + draws.integer(len(clip) - 1)) % len(clip)
                source, driving = to_batch(clip[[place, other]])
                return source, driving
            place -= len(clip)
        raise AssertionError("a frame beyond the last clip")


def to_batch(frames: UInt8Array) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 3, 1, 2))).float() / 255


def bent(images: Tensor, draws: Draws) -> Tensor:
    """Images (B, 3, H, W), each bent by a random map of the plane near the identity."""
    generator = torch.Generator().manual_seed(draws.integer(2**31))
    return PlaneMap.random(len(images), generator).bend(images)


@dataclass(frozen=True)
class Quality:
    """How well an LFAE rebuilds frames.

    Attributes:
        frames: number of frames.
        l1: mean absolute difference of colors in [0, 1].
        psnr: mean of the frames' peak signal-to-noise ratios, in dB.
    """

    frames: int
    l1: float
    psnr: float


@torch.no_grad()
def rebuilt_quality(lfae: Lfae, measured: Measured) -> Quality:
    """Measure how well an LFAE, which is put into eval mode, rebuilds frames from their sources."""
    lfae.eval()
    device = next(lfae.parameters()).device
    absolute, squared = [], []
    for source, driving in measured.pairs():
        rebuilt = lfae(source.to(device).contiguous(), driving.to(device)).frame.clamp(0, 1).cpu()
        absolute.append((rebuilt - driving).abs().double().mean(dim=(1, 2, 3)))
        squared.append((rebuilt - driving).square().double().mean(dim=(1, 2, 3)))
    errors = torch.cat(squared).clamp_min(1e-10)  # at most 100 dB
    return Quality(len(errors), float(torch.cat(absolute).mean()), float((-10 * torch.log10(errors)).mean()))
