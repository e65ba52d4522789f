"""Training examples by number: the n-th example is a function of the seed and n alone.

So a run that is resumed at example n goes on with the bits that it would have had, whatever the number
of worker processes.
"""

from __future__ import annotations

import functools
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lfdm_models.training import procedural
from lfdm_models.training.drawing import Float32Array, UInt8Array
from lfdm_models.training.draws import Draws
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.layouts import DiskSet, FrameChoice
from lfdm_models.training.pictures import ClipError, DiskClip

logger = logging.getLogger(__name__)

#: Label number of a clip without one.
NO_LABEL = -1
# Purposes of streams of draws. A stream a clip is below; examples begin here.
_EXAMPLES = 2**32
_SHUFFLE = 2**48
# After so many unreadable clips in a row there is something else wrong.
_PATIENCE = 100


class Pair(TypedDict):
    """Two frames of a clip: `source` and `driving`, (3, H, W) float32 in [0, 1] ((B, 3, H, W) in a batch)."""

    source: Tensor
    driving: Tensor


class LabelledClip(TypedDict):
    """`frames` (3, T, H, W) float32 in [0, 1] and the number of the `label`, int64; a batch adds B in front."""

    frames: Tensor
    label: Tensor


#: (frames of the clip) -> frames that are taken.
Choose = Callable[[int], Sequence[int]]


class ClipSource(Protocol):
    """Clips by example number."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of their embeddings."""
        ...

    @property
    def choice(self) -> FrameChoice:
        """How T frames are chosen."""
        ...

    def read(self, number: int, choose: Choose) -> tuple[UInt8Array, int]:
        """Chosen frames (n, H, W, 3) uint8 of the clip for example `number`, and its label's number."""
        ...


@dataclass(frozen=True)
class ProceduralClips:
    """Drawn characters without end.

    Attributes:
        size: pixels a side.
        frames: of every clip.
        seed: of the order; clips come from `procedural.TRAINING_SEEDS`.
    """

    size: int
    frames: int
    seed: int

    @property
    def labels(self) -> tuple[str, ...]:
        """See `ClipSource`."""
        return procedural.LABELS

    @property
    def choice(self) -> FrameChoice:
        """See `ClipSource`."""
        return "spread"

    def read(self, number: int, choose: Choose) -> tuple[UInt8Array, int]:
        """See `ClipSource`; only the chosen frames are drawn."""
        seeds = procedural.TRAINING_SEEDS
        character, motion = procedural.clip_parts(seeds[Draws(self.seed, number).integer(len(seeds))])
        moments = np.asarray(choose(self.frames)) / (self.frames - 1)
        return procedural.render(character, motion, moments, self.size), self.labels.index(motion.label)


class DiskClips:
    """Clips of a folder, shuffled anew in every epoch; those that cannot be used are reported once and skipped."""

    def __init__(self, clips: DiskSet, size: int, seed: int) -> None:
        """Serve clips of `clips` with `size` pixels a side, in an order that `seed` decides."""
        self.clips, self.size, self.seed = clips, size, seed
        self._reported: set[int] = set()

    @property
    def labels(self) -> tuple[str, ...]:
        """See `ClipSource`."""
        return self.clips.labels

    @property
    def choice(self) -> FrameChoice:
        """See `ClipSource`."""
        return self.clips.choice

    def read(self, number: int, choose: Choose) -> tuple[UInt8Array, int]:
        """See `ClipSource`; in place of a clip that cannot be used comes the one after it on the list.

        Raises:
            TrainingError: many clips in a row cannot be used.
        """
        epoch, place = divmod(number, len(self.clips.entries))
        index = int(_permutation(len(self.clips.entries), self.seed, epoch)[place])
        for attempt in range(min(len(self.clips.entries), _PATIENCE)):
            at = (index + attempt) % len(self.clips.entries)
            entry = self.clips.entries[at]
            try:
                clip = DiskClip(entry.path, self.clips.framing, self.size)
                if len(clip) < 2:
                    raise ClipError(f"it has {len(clip)} frames, expected at least 2")
                frames = clip.read(choose(len(clip)))
            except ClipError as error:
                if at not in self._reported:
                    self._reported.add(at)
                    logger.warning("skipping %s: %s", entry.path, error)
                continue
            return frames, self.labels.index(entry.label) if entry.label in self.labels else NO_LABEL
        raise TrainingError(
            f"none of {attempt + 1} clips in a row can be used, the last one being {entry.path}; "
            "look at the warnings above, and at the folder"
        )


@functools.lru_cache(maxsize=2)
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    draws = Draws(seed, _SHUFFLE + epoch)
    order: np.ndarray[tuple[int], np.dtype[np.int64]] = np.argsort(
        np.array([draws.uniform() for _ in range(count)]), kind="stable"
    )
    return order


def choose_frames(count: int, frames: int, choice: FrameChoice, draws: Draws) -> list[int]:
    """Which of a clip's frames are taken: sorted, and the last repeated where the clip is too short.

    Args:
        count: frames of the clip.
        frames: T.
        choice: "random": the first, then any others; "spread": one from each of T equal spans.
        draws: what decides.
    """
    if count <= frames:
        return [min(index, count - 1) for index in range(frames)]
    if choice == "random":
        others = sorted(range(1, count), key=lambda _: draws.uniform())[: frames - 1]
        return [0, *sorted(others)]
    span = count / frames
    return [min(int((index + draws.uniform()) * span), count - 1) for index in range(frames)]


@dataclass(frozen=True)
class ColourJitter:
    """The largest changes of colour; one change serves a whole clip.

    Attributes:
        brightness, contrast, saturation: factors are drawn from 1 - value … 1 + value.
        hue: turn of the hue, as a share of the circle, drawn from -value … value.
    """

    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.05

    def apply(self, frames: Float32Array, draws: Draws) -> Float32Array:
        """(n, H, W, 3) float32 in [0, 1] -> the same, all frames changed alike."""
        factors = [draws.uniform(1 - v, 1 + v) for v in (self.brightness, self.contrast, self.saturation)]
        brightness, contrast, saturation = (np.float32(factor) for factor in factors)
        angle = 2 * np.pi * draws.uniform(-self.hue, self.hue)
        frames = np.clip(frames * brightness, 0, 1)
        mean = (frames @ _LUMA).mean()
        frames = np.clip((frames - mean) * contrast + mean, 0, 1)
        chroma = frames @ _TO_YIQ.T
        cos, sin = np.float32(np.cos(angle)) * saturation, np.float32(np.sin(angle)) * saturation
        turned = np.stack(
            [chroma[..., 0], chroma[..., 1] * cos - chroma[..., 2] * sin, chroma[..., 1] * sin + chroma[..., 2] * cos],
            axis=-1,
        )
        return np.clip(turned @ _FROM_YIQ.T, 0, 1).astype(np.float32)


_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32)
_FROM_YIQ = np.linalg.inv(_TO_YIQ.astype(np.float64)).astype(np.float32)


@dataclass(frozen=True)
class FramePairs(Dataset[Pair]):
    """Examples for the LFAE: two different frames of a clip.

    Attributes:
        source: the clips.
        seed: of the choice of frames and colours.
        jitter: change of colours; None leaves them.
    """

    source: ClipSource
    seed: int
    jitter: ColourJitter | None = None

    def __getitem__(self, number: int) -> Pair:
        draws = Draws(self.seed, _EXAMPLES + number)

        def choose(count: int) -> Sequence[int]:
            first = draws.integer(count)
            return first, (first + 1 + draws.integer(count - 1)) % count

        frames, _ = self.source.read(number, choose)
        tensor = _to_tensor(frames, self.jitter, draws)
        return {"source": tensor[:, 0].contiguous(), "driving": tensor[:, 1].contiguous()}


@dataclass(frozen=True)
class TrainingClips(Dataset[LabelledClip]):
    """Examples for the DM: T frames of a clip, and its label.

    Attributes:
        source: the clips.
        frames: T.
        seed: of the choice of frames and colours.
        jitter: change of colours; None leaves them.
    """

    source: ClipSource
    frames: int
    seed: int
    jitter: ColourJitter | None = None

    def __getitem__(self, number: int) -> LabelledClip:
        draws = Draws(self.seed, _EXAMPLES + number)
        choice = self.source.choice
        frames, label = self.source.read(number, lambda count: choose_frames(count, self.frames, choice, draws))
        return {"frames": _to_tensor(frames, self.jitter, draws), "label": torch.tensor(label)}


def _to_tensor(frames: UInt8Array, jitter: ColourJitter | None, draws: Draws) -> Tensor:
    """(n, H, W, 3) uint8 -> (3, n, H, W) float32 in [0, 1]."""
    values = frames.astype(np.float32) / np.float32(255)
    if jitter is not None:
        values = jitter.apply(values, draws)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(3, 0, 1, 2)))


class _From(Sampler[int]):
    """Example numbers from `start` on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1


def _leave_interrupts(_: int) -> None:
    """Ctrl-C reaches all processes of a terminal; the one that trains decides when to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def batches(
    examples: FramePairs | TrainingClips, batch_size: int, *, start: int, workers: int, pin_memory: bool = False
) -> Iterator[dict[str, Tensor]]:
    """Batches of examples without end.

    Args:
        examples: where they come from.
        batch_size: examples in a batch.
        start: number of the first example.
        workers: processes that make them; 0: this one. It does not change what comes.
        pin_memory: for copies to a GPU.
    """
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        examples,  # type: ignore[arg-type]  # a TypedDict of tensors is a dict of tensors
        batch_size,
        sampler=_From(start),
        num_workers=workers,
        pin_memory=pin_memory,
        # Nothing in the examples draws from torch's global state; the loader itself shall not either.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_interrupts,
    )
    return iter(loader)
