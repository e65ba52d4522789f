"""Training examples by number: the n-th example depends only on the seed and n.

A run resumed at example n therefore continues bit for bit as it would have without the interruption, with any number of
worker processes.
"""

from __future__ import annotations

import functools
import itertools
import logging
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lfdm_models.training import procedural
from lfdm_models.training.characters import Character
from lfdm_models.training.drawing import Float32Array, UInt8Array
from lfdm_models.training.draws import Draws
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.landmarks import landmarks
from lfdm_models.training.layouts import DiskSet, FrameChoice
from lfdm_models.training.motions import Motion
from lfdm_models.training.pictures import ClipError, DiskClip

if TYPE_CHECKING:
    from typing_extensions import NotRequired  # typing has it from Python 3.11 on

logger = logging.getLogger(__name__)

#: Label index of a clip without a label.
NO_LABEL = -1
#: Index of a clip that does not repeat.
NO_CLIP = -1
# Purposes of streams of draws. Streams per clip are below; examples begin here.
_EXAMPLES = 2**32
_SHUFFLE = 2**48
# After this many unusable clips in a row, the folder itself is probably wrong.
_PATIENCE = 100


class Pair(TypedDict):
    """Two frames of a clip: `source` and `driving`, (3, H, W) float32 in [0, 1] ((B, 3, H, W) in a batch).

    With landmarks, also theirs, (N, 5) float32, from `lfdm_models.training.landmarks`.
    """

    source: Tensor
    driving: Tensor
    source_landmarks: NotRequired[Tensor]
    driving_landmarks: NotRequired[Tensor]


class LabeledClip(TypedDict):
    """`frames` (3, T, H, W) float32 in [0, 1] and the index of the `label`, int64; a batch adds a leading B.

    `clip` is the index in a pool, int64, where the same frames repeat under the same index; otherwise `NO_CLIP`.
    """

    frames: Tensor
    label: Tensor
    clip: Tensor


#: (frames of the clip) -> indices of the chosen frames.
Choose = Callable[[int], Sequence[int]]


class ClipSource(Protocol):
    """Clips by example number."""

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of their embeddings."""
        ...

    @property
    def choice(self) -> FrameChoice:
        """Method for choosing T frames."""
        ...

    def read(self, number: int, choose: Choose) -> tuple[UInt8Array, int]:
        """Chosen frames (n, H, W, 3) uint8 of the clip for example `number`, and the index of its label."""
        ...


@dataclass(frozen=True)
class ProceduralClips:
    """Drawn characters: unlimited, or a pool of clips in memory that is shuffled in every epoch.

    Attributes:
        size: pixels per side.
        frames: frames per clip.
        seed: seed of the order; clips come from `procedural.TRAINING_SEEDS`.
        pool: number of clips; 0 for unlimited clips. A pool takes frames * size^2 * 3 bytes per clip, and draws each
            clip only once.
    """

    size: int
    frames: int
    seed: int
    pool: int = 0
    _drawn: dict[int, UInt8Array] = field(default_factory=dict, repr=False, compare=False)
    _parts: dict[int, tuple[Character, Motion]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of their embeddings."""
        return procedural.LABELS

    @property
    def choice(self) -> FrameChoice:
        """Method for choosing T frames."""
        return "spread"

    def read(self, number: int, choose: Choose) -> tuple[UInt8Array, int]:
        """Chosen frames and label index of example `number`; without a pool, only the chosen frames are drawn."""
        clip, chosen = self.clip_of(number), list(choose(self.frames))
        who, motion = self._parts_of(clip)
        label = self.labels.index(motion.label)
        if not self.pool:
            return procedural.render(who, motion, self._moments(chosen), self.size), label
        if clip not in self._drawn:
            self._drawn[clip] = procedural.render(who, motion, self._moments(range(self.frames)), self.size)
        return self._drawn[clip][chosen], label

    def landmarks(self, number: int, frames: Sequence[int]) -> Float32Array:
        """Landmarks of frames of example `number`, (n, N, 5), from `lfdm_models.training.landmarks`."""
        who, motion = self._parts_of(self.clip_of(number))
        return landmarks(who, motion.pose(self._moments(frames)))

    def _moments(self, frames: Sequence[int]) -> NDArray[np.float64]:
        return np.asarray(frames) / (self.frames - 1)

    def clip_of(self, number: int) -> int:
        """Index in the pool of the clip for example `number`; `number` itself without a pool."""
        if not self.pool:
            return number
        epoch, place = divmod(number, self.pool)
        return int(permutation(self.pool, self.seed, epoch)[place])

    def _parts_of(self, clip: int) -> tuple[Character, Motion]:
        parts = self._parts.get(clip)
        if parts is None:
            seeds = procedural.TRAINING_SEEDS
            parts = procedural.clip_parts(seeds[Draws(self.seed, clip).integer(len(seeds))])
            if self.pool:
                self._parts[clip] = parts
        return parts


class DiskClips:
    """Clips of a folder, shuffled in every epoch; unusable clips are reported once and skipped."""

    def __init__(self, clips: DiskSet, size: int, seed: int) -> None:
        """Provide clips of `clips` with `size` pixels per side, in an order that depends on `seed`."""
        self.clips, self.size, self.seed = clips, size, seed
        self._reported: set[int] = set()

    @property
    def labels(self) -> tuple[str, ...]:
        """All labels, in the order of their embeddings."""
        return self.clips.labels

    @property
    def choice(self) -> FrameChoice:
        """Method for choosing T frames."""
        return self.clips.choice

    def read(self, number: int, choose: Choose) -> tuple[UInt8Array, int]:
        """Chosen frames and label index of example `number`; an unusable clip is replaced by the next one in the list.

        Raises:
            TrainingError: many clips in a row cannot be used.
        """
        epoch, place = divmod(number, len(self.clips.entries))
        index = int(permutation(len(self.clips.entries), self.seed, epoch)[place])
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
            f"none of {attempt + 1} clips in a row can be used, the last of them {entry.path}; "
            "check the warnings above, and the folder"
        )


@functools.lru_cache(maxsize=2)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The order of `count` examples in an epoch."""
    draws = Draws(seed, _SHUFFLE + epoch)
    order: np.ndarray[tuple[int], np.dtype[np.int64]] = np.argsort(
        np.array([draws.uniform() for _ in range(count)]), kind="stable"
    )
    return order


def choose_frames(count: int, frames: int, choice: FrameChoice, draws: Draws) -> list[int]:
    """The chosen indices of a clip's frames: sorted, with the last one repeated if the clip is too short.

    Args:
        count: frames of the clip.
        frames: T.
        choice: "random": the first, then any others; "spread": one from each of T equal intervals.
        draws: source of randomness.
    """
    if count <= frames:
        return [min(index, count - 1) for index in range(frames)]
    if choice == "random":
        others = sorted(range(1, count), key=lambda _: draws.uniform())[: frames - 1]
        return [0, *sorted(others)]
    span = count / frames
    return [min(int((index + draws.uniform()) * span), count - 1) for index in range(frames)]


@dataclass(frozen=True)
class ColorJitter:
    """The largest changes of color; all frames of a clip change in the same way.

    Attributes:
        brightness, contrast, saturation: factors are drawn from 1 - value … 1 + value.
        hue: rotation of the hue, as a share of the circle, drawn from -value … value.
    """

    brightness: float = 0.1
    contrast: float = 0.1
    saturation: float = 0.1
    hue: float = 0.05

    def apply(self, frames: Float32Array, draws: Draws) -> Float32Array:
        """(n, H, W, 3) float32 in [0, 1] -> the same shape; all frames change in the same way."""
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
        seed: seed of the choice of frames and colors.
        jitter: change of colors; None for none.
        from_first: the source is always the first frame, as in tests and use of the LFAE.
        landmarks: examples include landmarks; for procedural clips only.
    """

    source: ClipSource
    seed: int
    jitter: ColorJitter | None = None
    from_first: bool = False
    landmarks: bool = False

    def __getitem__(self, number: int) -> Pair:
        draws = Draws(self.seed, _EXAMPLES + number)
        chosen: list[int] = []

        def choose(count: int) -> Sequence[int]:
            first = 0 if self.from_first else draws.integer(count)
            chosen[:] = first, (first + 1 + draws.integer(count - 1)) % count
            return chosen

        frames, _ = self.source.read(number, choose)
        tensor = _to_tensor(frames, self.jitter, draws)
        pair: Pair = {"source": tensor[:, 0].contiguous(), "driving": tensor[:, 1].contiguous()}
        if self.landmarks and isinstance(self.source, ProceduralClips):
            source, driving = torch.from_numpy(self.source.landmarks(number, chosen))
            pair["source_landmarks"], pair["driving_landmarks"] = source, driving
        return pair


@dataclass(frozen=True)
class TrainingClips(Dataset[LabeledClip]):
    """Examples for the DM: T frames of a clip, and its label.

    Attributes:
        source: the clips.
        frames: T.
        seed: seed of the choice of frames and colors.
        jitter: change of colors; None for none.
    """

    source: ClipSource
    frames: int
    seed: int
    jitter: ColorJitter | None = None

    def __getitem__(self, number: int) -> LabeledClip:
        draws = Draws(self.seed, _EXAMPLES + number)
        choice = self.source.choice
        frames, label = self.source.read(number, lambda count: choose_frames(count, self.frames, choice, draws))
        clip = NO_CLIP
        if isinstance(self.source, ProceduralClips) and self.source.pool and self.jitter is None:
            clip = self.source.clip_of(number)
        tensor = _to_tensor(frames, self.jitter, draws)
        return {"frames": tensor, "label": torch.tensor(label), "clip": torch.tensor(clip)}


def _to_tensor(frames: UInt8Array, jitter: ColorJitter | None, draws: Draws) -> Tensor:
    """(n, H, W, 3) uint8 -> (3, n, H, W) float32 in [0, 1]."""
    values = frames.astype(np.float32) / np.float32(255)
    if jitter is not None:
        values = jitter.apply(values, draws)
    return torch.from_numpy(np.ascontiguousarray(values.transpose(3, 0, 1, 2)))


class Examples(Protocol):
    """Unlimited examples by number; each has tensors of the same names and shapes."""

    def __getitem__(self, number: int, /) -> Mapping[str, Any]:
        """The tensors of an example, by name."""
        ...


class _From(Sampler[int]):
    """Unlimited example numbers from `start` on: of every `parts` batches, the one with index `part`."""

    def __init__(self, start: int, batch_size: int, part: int, parts: int) -> None:
        self.start, self.batch_size = start + part * batch_size, batch_size
        self.stride = parts * batch_size

    def __iter__(self) -> Iterator[int]:
        for first in itertools.count(self.start, self.stride):
            yield from range(first, first + self.batch_size)


def _leave_interrupts(_: int) -> None:
    """Ignore Ctrl-C and hangup, which reach all processes of a terminal; the training process decides when to stop."""
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # with which the training process ends the workers


def batches(
    examples: Examples,
    batch_size: int,
    *,
    start: int,
    workers: int,
    part: int = 0,
    parts: int = 1,
    pin_memory: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Unlimited batches of examples.

    Args:
        examples: the examples.
        batch_size: examples per batch.
        start: number of the first example of all parts.
        workers: processes that make examples; 0 for this process. The examples do not depend on it.
        part: index, among every `parts` batches, of the one for this process.
        parts: number of processes that share the batches.
        pin_memory: for copies to a GPU.
    """
    loader: DataLoader[dict[str, Tensor]] = DataLoader(
        examples,  # type: ignore[arg-type]  # a TypedDict of tensors is a dict of tensors
        batch_size,
        sampler=_From(start, batch_size, part, parts),
        num_workers=workers,
        pin_memory=pin_memory,
        # The examples do not use torch's global random state; this keeps the loader from using it.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_leave_interrupts,
    )
    return iter(loader)
