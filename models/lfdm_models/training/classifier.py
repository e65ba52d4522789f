"""A small network that recognizes the labeled motions of the procedural characters, to judge generated clips.

Its input is the difference of eight moments of a clip from its first frame, at 32x32 pixels, so it sees of the
character only what moves. It is shipped (see `shipped_classifier`) and can be trained by ``lfdm-train classifier``.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lfdm_models.training.drawing import UInt8Array
from lfdm_models.training.draws import Draws
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.files import write_whole
from lfdm_models.training.procedural import LABELS, TRAINING_SEEDS, sample_clip
from lfdm_models.wording import first_line

SIZE, MOMENTS, FEATURES = 32, 8, 32
SHIPPED = Path(__file__).parents[1] / "weights" / "motion_classifier.safetensors"
# Stream of draws that separates its clips from those of other trainings.
_CLIPS = 2**50
_BATCH = 32
_MIRRORED = {"look left": "look right", "look right": "look left"}


def differences(frames: UInt8Array | NDArray[np.float32]) -> Tensor:
    """The classifier's input for clips.

    Args:
        frames: (B, T, H, W, 3) uint8, or float32 in [0, 1]; T at least 2.

    Returns:
        (B, 3 * 8, 32, 32) float32: each moment minus the first frame, moments on the slowest axis.
    """
    count = frames.shape[1]
    moments = np.rint(np.linspace(1, count - 1, MOMENTS)).astype(np.int64)
    chosen = torch.from_numpy(np.ascontiguousarray(frames[:, [0, *moments]])).float()
    if frames.dtype == np.uint8:
        chosen = chosen / 255
    batch, _, height, width, channels = chosen.shape
    pictures = chosen.permute(0, 1, 4, 2, 3).reshape(-1, channels, height, width)
    small = F.interpolate(pictures, size=(SIZE, SIZE), mode="area").view(batch, 1 + MOMENTS, channels, SIZE, SIZE)
    return (small[:, 1:] - small[:, :1]).flatten(1, 2)


class MotionClassifier(nn.Module):
    """Differences of frames -> logits of labels, and the features before them."""

    def __init__(self, labels: tuple[str, ...] = LABELS) -> None:
        super().__init__()
        self.labels = labels
        widths = (3 * MOMENTS, 32, 48, 64)
        self.blocks = nn.Sequential()
        for inner, outer in itertools.pairwise(widths):
            self.blocks.extend([nn.Conv2d(inner, outer, 3, stride=2, padding=1), nn.GroupNorm(8, outer), nn.ReLU()])
        self.features = nn.Linear(widths[-1] * (SIZE // 8) ** 2, FEATURES)
        self.head = nn.Linear(FEATURES, len(labels))

    def forward(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 24, 32, 32) -> features (B, 32) and logits (B, labels)."""
        features = torch.tanh(self.features(self.blocks(10 * seen).flatten(1)))
        return features, self.head(features)

    @torch.no_grad()
    def judge(self, frames: UInt8Array | NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Clips (B, T, H, W, 3), as for `differences` -> features (B, 32) float32, and the best labels' indices."""
        features, logits = self(differences(frames))
        return features.numpy(), logits.argmax(dim=1).numpy()


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings for training a classifier.

    Attributes:
        clips: clips of the training split, not counting mirrored ones.
        steps: steps of the optimizer, with 32 clips each.
        seed: seed of the whole training.
        image_size, frames: size of the clips.
    """

    clips: int = 1600
    steps: int = 1500
    seed: int = 0
    image_size: int = 64
    frames: int = 16

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a number is out of range.
        """
        if min(self.clips, self.steps) < 1 or not 0 <= self.seed < 2**63:
            raise ValueError(f"clips and steps must be 1 or more, and seed 0 to 2^63 - 1: {self}")


def train_classifier(
    settings: ClassifierSettings, progress: Callable[[int, int], None] | None = None
) -> MotionClassifier:
    """Train from scratch, on the CPU; the result is bit-identical for the same seed and number of threads.

    Args:
        settings: settings of the training.
        progress: called with the finished clips and steps, and the total of both.
    """
    total = settings.clips + settings.steps
    parts, labels = [], []
    for number in range(settings.clips):
        draw = Draws(settings.seed, _CLIPS + number).integer(len(TRAINING_SEEDS))
        clip = sample_clip(TRAINING_SEEDS[draw], size=settings.image_size, frames=settings.frames)
        parts.append(differences(clip.frames[None]))
        labels.append(LABELS.index(clip.label))
        _report(progress, number + 1, total)
    seen, wanted = torch.cat(parts), torch.tensor(labels)
    mirrored = torch.tensor([LABELS.index(_MIRRORED.get(label, label)) for label in LABELS])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        network = MotionClassifier()
        adam = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.02)
        for step in range(settings.steps):
            adam.param_groups[0]["lr"] = 1e-3 * (1 + np.cos(np.pi * step / settings.steps)) / 2
            index = torch.randint(len(seen), (_BATCH,))
            batch, label = seen[index], wanted[index]
            flip = torch.rand(_BATCH) < 0.5
            batch = torch.where(flip[:, None, None, None], batch.flip(3), batch)
            label = torch.where(flip, mirrored[label], label)
            loss = F.cross_entropy(network(_worsen(batch))[1], label)
            adam.zero_grad()
            loss.backward()
            adam.step()
            _report(progress, settings.clips + step + 1, total)
    return network.eval().requires_grad_(False)


def _report(progress: Callable[[int, int], None] | None, done: int, total: int) -> None:
    if progress is not None:
        progress(done, total)


def _worsen(seen: Tensor) -> Tensor:
    """Blur some, add noise to all and weaken some, so that typical errors of a generator are not new to the network."""
    count = len(seen)
    blurred = F.avg_pool2d(seen, 3, 1, 1, count_include_pad=False)
    seen = torch.where(torch.rand(count, 1, 1, 1) < 0.5, blurred, seen)
    return seen * (0.7 + 0.5 * torch.rand(count, 1, 1, 1)) + 0.02 * torch.rand(count, 1, 1, 1) * torch.randn(seen.shape)


def save_classifier(network: MotionClassifier, path: Path) -> None:
    """Write weights and labels as safetensors.

    Raises:
        TrainingError: the file cannot be written.
    """
    weights = {key: value.contiguous() for key, value in network.state_dict().items()}
    metadata = {"labels": json.dumps(network.labels)}
    write_whole(path, lambda part: safetensors.torch.save_file(weights, part, metadata))


def load_classifier(path: Path) -> MotionClassifier:
    """Read the result of `save_classifier`.

    Raises:
        TrainingError: the file cannot be read, or holds something else.
    """
    try:
        with safe_open(path, "pt") as file:
            labels = tuple(json.loads((file.metadata() or {}).get("labels", "[]")))
            network = MotionClassifier(labels)
            network.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError, RuntimeError, ValueError) as error:
        reason = first_line(error)
        raise TrainingError(f"{path} cannot be read as a classifier of motions ({reason}); make one") from error
    return network.eval().requires_grad_(False)


def shipped_classifier() -> MotionClassifier:
    """The classifier in this package, made by ``lfdm-train classifier --seed 0``."""
    return load_classifier(SHIPPED)
