"""What `lfdm-train` does: data, networks and settings put together into a run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfdm_models.config import LfaeConfig, LfdmConfig
from lfdm_models.labels import REGION_PAD
from lfdm_models.training import layouts
from lfdm_models.training.conditions import Float32Array, label_table
from lfdm_models.training.data import (
    ClipSource,
    ColourJitter,
    DiskClips,
    FramePairs,
    ProceduralClips,
    TrainingClips,
)
from lfdm_models.training.dm import DmStage, load_diffusion, new_diffusion
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.landmarks import LANDMARKS
from lfdm_models.training.lfae import LfaeStage, load_lfae, new_lfae, still_background
from lfdm_models.training.loop import Outcome, ReportProgress, no_report, train
from lfdm_models.training.losses import PerceptualLoss, PyramidLoss
from lfdm_models.training.procedural import HELD_OUT_SEEDS, LABELS, sample_clip
from lfdm_models.training.settings import SMALL, DataName, Learn, OptimiserSettings, RunSettings, Size
from lfdm_models.training.vgg import Vgg19

_PREVIEWS = 4
_OWN_TEXT_WIDTH = 64


@dataclass(frozen=True)
class DataSettings:
    """Which clips.

    Attributes:
        name: of the data set.
        root: its folder; None for the procedural one.
        image_size: pixels a side.
        frames: of a clip.
        subjects: of the training split, where it is not the usual one (MHAD, NATOPS).
        pool: of the procedural set: how many clips there are, all kept in memory, or 0 for clips without end.
        jitter: whether colours are changed; they never are for the procedural set, whose colours vary by themselves.
    """

    name: DataName = "procedural"
    root: Path | None = None
    image_size: int = 64
    frames: int = 16
    subjects: tuple[int, ...] | None = None
    jitter: bool = True
    pool: int = 0

    def open(self, seed: int) -> ClipSource:
        """The clips.

        Raises:
            TrainingError: the folder is missing, is not wanted, or has no clips.
        """
        if self.name == "procedural":
            if self.root is not None:
                raise TrainingError(f"the procedural data set needs no folder, but {self.root} is given; name its data")
            return ProceduralClips(self.image_size, self.frames, seed, self.pool)
        if self.pool:
            raise TrainingError(f"a pool is of the procedural clips, but the data set is {self.name!r}; leave it out")
        if self.root is None:
            raise TrainingError(f"the data set {self.name!r} needs its folder; give it with --root")
        if self.subjects is not None and self.name not in ("mhad", "natops"):
            raise TrainingError(f"the data set {self.name!r} takes no choice of subjects; leave it out")
        if self.name == "mug":
            found = layouts.mug(self.root, "train")
        elif self.name == "plain":
            found = layouts.plain(self.root, "train")
        else:
            find = layouts.mhad if self.name == "mhad" else layouts.natops
            found = find(self.root, "train", self.subjects)
        return DiskClips(found, self.image_size, seed)

    @property
    def colours(self) -> ColourJitter | None:
        """The change of colours."""
        return ColourJitter() if self.jitter and self.name != "procedural" else None

    def facts(self, source: ClipSource) -> dict[str, Any]:
        """What a resumed run must have the same."""
        return {
            "data": self.name,
            "image size": self.image_size,
            "frames": self.frames,
            "jitter": self.colours is not None,
            "labels": list(source.labels),
            "clips": len(source.clips.entries) if isinstance(source, DiskClips) else self.pool or None,
        }


def network_config(size: Size, data: DataName) -> LfdmConfig:
    """The architecture: a small one, or the published one as it is for a data set."""
    if size == "small":
        return SMALL
    return LfdmConfig(LfaeConfig(region_pad=REGION_PAD.get(data, LfaeConfig.region_pad)))


def train_lfae(
    config: LfaeConfig,
    data: DataSettings,
    optimiser: OptimiserSettings,
    run: RunSettings,
    folder: Path,
    *,
    vgg: Path | None = None,
    start: Path | None = None,
    learn: Learn = "all",
    equivariance: float = 10.0,
    landmarks: float = 0.0,
    mixture: float = 0.0,
    from_first: bool = False,
    camera_still: bool = False,
    freeze_norm: bool = False,
    resume: bool = False,
    progress: ReportProgress = no_report,
) -> Outcome:
    """Train an LFAE; see `loop.train`.

    Args:
        config: its architecture.
        data: which clips.
        optimiser: see there.
        run: see there.
        folder: see there.
        progress: see there.
        vgg: weights of VGG-19 for the perceptual loss; without them the pyramid loss serves.
        start: an LFAE checkpoint of that architecture to begin with.
        learn: see `LfaeStage`.
        equivariance: see there.
        landmarks: see there.
        mixture: see there.
        from_first: see `FramePairs`.
        camera_still: the background does not move, and its motion is not learned: one that is learned ends some
            hundredths of a pixel off, which blurs every edge.
        freeze_norm: see `LfaeStage`; for a run that goes on from `start`.
        resume: see there.

    Raises:
        TrainingError: see `loop.train`; or data or weights cannot be had.
    """
    if landmarks and (data.name != "procedural" or config.regions < len(LANDMARKS)):
        raise TrainingError(
            f"landmarks are of the procedural data set, for {len(LANDMARKS)} regions or more; "
            f"the data set is {data.name!r} and regions are {config.regions}; set their weight to 0"
        )
    if freeze_norm and start is None:
        raise TrainingError("a new LFAE has no statistics to keep; name the checkpoint to begin with, or let them be")
    source = data.open(run.seed)
    lfae = new_lfae(config, run.seed, data.image_size)
    if start is not None:
        lfae.load_state_dict(load_lfae(start, config)[0].state_dict())
    if camera_still:
        still_background(lfae, data.image_size)
        lfae.bg_predictor.requires_grad_(False)
    stage = LfaeStage(
        lfae,
        PerceptualLoss(Vgg19.load(vgg)) if vgg is not None else PyramidLoss(),
        learn=learn,
        equivariance=equivariance,
        landmarks=landmarks,
        mixture=mixture,
        freeze_norm=freeze_norm,
        examples={**data.facts(source), "from first": from_first, "camera still": camera_still},
        preview_clips=preview_clips(source, data) if run.preview_every else None,
    )
    examples = FramePairs(source, run.seed, data.colours, from_first, landmarks > 0)
    return train(stage, examples, optimiser, run, folder, resume=resume, progress=progress)


def train_dm(
    config: LfdmConfig,
    lfae: Path,
    data: DataSettings,
    optimiser: OptimiserSettings,
    run: RunSettings,
    folder: Path,
    *,
    lfae_tells_config: bool = True,
    text_encoder: str | None = None,
    start: Path | None = None,
    signal_std: float = 0.0,
    resume: bool = False,
    progress: ReportProgress = no_report,
) -> Outcome:
    """Train a DM on flow that an LFAE sees in the clips; see `loop.train`.

    Args:
        config: of the DM; that of the LFAE is replaced by what its checkpoint tells, and the width of the text
            embedding by what the embeddings have.
        lfae: its checkpoint.
        data: which clips.
        optimiser: see there.
        run: see there.
        folder: see there.
        progress: see there.
        lfae_tells_config: whether the checkpoint tells its architecture, as those of `train_lfae` do; else it is
            that of `config`.
        text_encoder: folder or name of a BERT that embeds the labels; without one they get fixed vectors.
        start: a DM checkpoint of that architecture to begin with.
        signal_std: see `DmStage`.
        resume: see there.

    Raises:
        TrainingError: see `loop.train`; or data or weights cannot be had, or do not fit each other.
        lfdm_models.text.TextEncoderError: the text encoder cannot be had.
    """
    source = data.open(run.seed)
    network, _ = load_lfae(lfae, None if lfae_tells_config else config.lfae)
    embeddings = label_embeddings(source.labels, text_encoder)
    width = len(next(iter(embeddings.values())))
    features = network.config.feature_channels
    config = LfdmConfig(
        network.config,
        replace(config.dm, feature_channels=features, text_width=width),
        residual_flow=config.residual_flow,
    )
    try:
        config.latent_size(data.image_size)
    except ValueError as error:
        raise TrainingError(str(error)) from error
    diffusion = new_diffusion(config, run.seed)
    if start is not None:
        load_diffusion(diffusion, start)
    stage = DmStage(
        config,
        network,
        diffusion,
        embeddings,
        signal_std=signal_std,
        examples={**data.facts(source), "lfae": fingerprint(network.state_dict())},
        preview_clips=preview_clips(source, data) if run.preview_every else None,
    )
    examples = TrainingClips(source, data.frames, run.seed, data.colours)
    return train(stage, examples, optimiser, run, folder, resume=resume, progress=progress)


def label_embeddings(labels: Sequence[str], text_encoder: str | None) -> dict[str, Float32Array]:
    """Of each label, from a text encoder or else from `label_table`."""
    if text_encoder is not None:
        from lfdm_models.text import BertTextEncoder

        return dict(zip(labels, BertTextEncoder.load(text_encoder).embed(labels), strict=True))
    width = _OWN_TEXT_WIDTH
    while width <= len(labels):
        width *= 2
    return label_table(labels, width)


def preview_clips(source: ClipSource, data: DataSettings) -> Tensor:
    """(N, 3, T, H, W) in [0, 1]: held-out characters, or the first clips that training sees."""
    if data.name == "procedural":
        clips = [
            sample_clip(HELD_OUT_SEEDS[i], size=data.image_size, frames=data.frames, label=LABELS[i]).frames
            for i in range(_PREVIEWS)
        ]
        return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 255
    examples = TrainingClips(source, data.frames, 0)
    return torch.stack([examples[number]["frames"] for number in range(_PREVIEWS)])


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short hash of weights."""
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
