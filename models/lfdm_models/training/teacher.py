"""Samples of a teacher, drawn once and stored in files: examples for distillation without a data set.

    RUN/samples-0.pt     latents, and the facts of their sampling; one file per process of the run

Sample n depends only on the seed and n, so interrupted sampling continues where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lfdm_models.lfae import Lfae
from lfdm_models.training.data import permutation
from lfdm_models.training.devices import generator
from lfdm_models.training.dm import DmStage
from lfdm_models.training.drawing import UInt8Array
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.few_steps import long_chain
from lfdm_models.training.files import load, save
from lfdm_models.training.processes import Processes

# Chains that run together; an interruption loses at most one batch.
_BATCH = 16
#: (samples drawn, all samples).
ReportSamples = Callable[[int, int], None]
#: Number of a sample -> its reference picture (H, W, 3) uint8.
Picture = Callable[[int], UInt8Array]


class Sampled(TypedDict):
    """A sample: `latent` (3, T, h, w), `feature` (C, h, w) of its picture, and the index of its `label`."""

    latent: Tensor
    feature: Tensor
    label: Tensor


@dataclass(frozen=True)
class Sampling:
    """Settings of the teacher's sampling.

    Attributes:
        count: number of samples.
        images: folder of the pictures; None for the first frames of the data's clips.
        steps: steps of DDIM with eta 1.
        guidance: scale of classifier-free guidance, which the new DM learns.
        seed: seed of the noise.
    """

    count: int
    images: Path | None = None
    steps: int = 25
    guidance: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a number is out of range.
        """
        if self.count < 1 or self.steps < 1:
            raise ValueError(f"samples and teacher's steps must be 1 or more, not {self.count} and {self.steps}")


@dataclass(frozen=True)
class TeacherSamples(Dataset[Sampled]):
    """Examples for distillation, in a new order in every epoch.

    Attributes:
        latents: (N, 3, T, h, w).
        features: (N, C, h, w).
        labels: (N,).
        seed: seed of the order.
    """

    latents: Tensor
    features: Tensor
    labels: Tensor
    seed: int

    def __getitem__(self, number: int) -> Sampled:
        epoch, place = divmod(number, len(self.latents))
        index = int(permutation(len(self.latents), self.seed, epoch)[place])
        return {"latent": self.latents[index], "feature": self.features[index], "label": self.labels[index]}


@torch.no_grad()
def draw_samples(
    stage: DmStage,
    picture: Picture,
    frames: int,
    sampling: Sampling,
    folder: Path,
    processes: Processes,
    report: ReportSamples,
) -> TeacherSamples:
    """Draw samples for pictures, with each label in turn; continue from the samples in the folder.

    Args:
        stage: the stage with the teacher and the LFAE.
        picture: returns the picture of a sample.
        frames: T.
        sampling: settings of the sampling.
        folder: folder of the run.
        processes: the processes of the run, each of which draws a share.
        report: called with the number of samples drawn so far and their total.

    Raises:
        TrainingError: the folder has samples of another teacher or other settings.
    """
    count, parts, device = sampling.count, processes.count, processes.device
    stage.to(device)
    pictures = torch.stack([_to_tensor(picture(number)) for number in range(count)])
    features = torch.cat([_feature(stage.lfae, pictures[n : n + _BATCH].to(device)) for n in range(0, count, _BATCH)])
    labels = torch.arange(count) % len(stage.labels)
    facts = {**stage.facts, "count": count, "steps": sampling.steps, "guidance": sampling.guidance}
    facts |= {"seed": sampling.seed, "frames": frames, "processes": parts}
    mine = torch.arange(count)[processes.rank :: parts]
    path = folder / f"samples-{processes.rank}.pt"
    drawn = _kept(path, facts)
    unet = stage.diffusion.denoise_fn.eval()
    while len(drawn) < len(mine):
        batch = mine[len(drawn) : len(drawn) + _BATCH]
        shape = (1, 3, frames, *features.shape[2:])
        # Initial noise is drawn per sample; noise of the steps per batch, which always has the same samples.
        starts = [torch.randn(shape, generator=generator(sampling.seed, int(n) << 20)) for n in batch]
        made = long_chain(
            stage.diffusion,
            features[batch],
            stage.table[labels[batch].to(device)],
            torch.cat(starts).to(device),
            sampling.steps,
            sampling.guidance,
            generator(sampling.seed, int(batch[0]) + 1, device),
        )
        drawn = torch.cat([drawn, made.cpu()]) if len(drawn) else made.cpu()
        save(path, {"facts": facts, "latents": drawn})
        report(len(drawn), len(mine))
    unet.train()
    processes.wait()  # until the other processes have written their files
    latents = torch.empty((count, *drawn.shape[1:]))
    for rank in range(parts):
        latents[rank::parts] = _kept(folder / f"samples-{rank}.pt", facts)
    return TeacherSamples(latents, features.cpu(), labels, sampling.seed)


def _to_tensor(picture: UInt8Array) -> Tensor:
    """(H, W, 3) uint8 -> (3, H, W) in [0, 1]."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1).float() / 255


def _feature(lfae: Lfae, images: Tensor) -> Tensor:
    found: Tensor = lfae.generator.encode(images)[-1]
    return found


def _kept(path: Path, facts: dict[str, Any]) -> Tensor:
    """The latents in a file; empty if the file does not exist.

    Raises:
        TrainingError: they are of another teacher or other settings.
    """
    if not path.exists():
        return torch.empty(0)
    content = load(path, "samples of a teacher")
    if content.get("facts") != facts or not isinstance(content.get("latents"), Tensor):
        raise TrainingError(f"{path} has samples of another teacher or other settings; choose another folder")
    latents: Tensor = content["latents"]
    return latents
