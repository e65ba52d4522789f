"""The recipes of `lfdm-train`: data, networks and settings combined into a run."""

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
    ColorJitter,
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
from lfdm_models.training.settings import SMALL, DataName, Learn, OptimizerSettings, RunSettings, Size
from lfdm_models.training.vgg import Vgg19

_PREVIEWS = 4
_OWN_TEXT_WIDTH = 64


@dataclass(frozen=True)
class DataSettings:
    """The clips to train on.

    Attributes:
        name: name of the data set.
        root: its folder; None for the procedural one.
        image_size: pixels per side.
        frames: frames per clip.
        subjects: subjects of the training split, instead of the default (MHAD, NATOPS).
        pool: for the procedural set: number of clips, all kept in memory; 0 for unlimited clips.
        jitter: change colors; the procedural set ignores it, because its colors vary by themselves.
    """

    name: DataName = "procedural"
    root: Path | None = None
    image_size: int = 64
    frames: int = 16
    subjects: tuple[int, ...] | None = None
    jitter: bool = True
    pool: int = 0

    def open(self, seed: int) -> ClipSource:
        """Open the clips.

        Raises:
            TrainingError: the folder is missing, is not needed, or has no clips.
        """
        if self.name == "procedural":
            if self.root is not None:
                raise TrainingError(f"the procedural data set needs no folder, but {self.root} is given; name its data")
            return ProceduralClips(self.image_size, self.frames, seed, self.pool)
        if self.pool:
            raise TrainingError(f"a pool is for procedural clips, but the data set is {self.name!r}; leave it out")
        if self.root is None:
            raise TrainingError(f"the data set {self.name!r} needs its folder; give it with --root")
        if self.subjects is not None and self.name not in ("mhad", "natops"):
            raise TrainingError(f"the data set {self.name!r} does not support a choice of subjects; leave it out")
        if self.name == "mug":
            found = layouts.mug(self.root, "train")
        elif self.name == "plain":
            found = layouts.plain(self.root, "train")
        else:
            find = layouts.mhad if self.name == "mhad" else layouts.natops
            found = find(self.root, "train", self.subjects)
        return DiskClips(found, self.image_size, seed)

    @property
    def colors(self) -> ColorJitter | None:
        """The change of colors; None for none."""
        return ColorJitter() if self.jitter and self.name != "procedural" else None

    def facts(self, source: ClipSource) -> dict[str, Any]:
        """Facts that must be the same for a resumed run."""
        return {
            "data": self.name,
            "image size": self.image_size,
            "frames": self.frames,
            "jitter": self.colors is not None,
            "labels": list(source.labels),
            "clips": len(source.clips.entries) if isinstance(source, DiskClips) else self.pool or None,
        }


def network_config(size: Size, data: DataName) -> LfdmConfig:
    """The architecture: a small one, or the published one for a data set."""
    if size == "small":
        return SMALL
    return LfdmConfig(LfaeConfig(region_pad=REGION_PAD.get(data, LfaeConfig.region_pad)))


def train_lfae(
    config: LfaeConfig,
    data: DataSettings,
    optimizer: OptimizerSettings,
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
    """Train an LFAE with `loop.train`.

    Args:
        config: its architecture.
        data: the clips.
        optimizer: settings of the optimizer.
        run: settings of the run.
        folder: folder of the run.
        progress: called after every step.
        vgg: weights of VGG-19 for the perceptual loss; without them, the pyramid loss is used.
        start: initial LFAE checkpoint, with that architecture.
        learn: trained parts, as in `LfaeStage`.
        equivariance: weight of both equivariance losses.
        landmarks: weight of the loss that pulls the first regions to the landmarks.
        mixture: weight of `mixture_loss`.
        from_first: the source is always a clip's first frame.
        camera_still: keep the background static instead of learning its motion: a learned motion is off by some
            hundredths of a pixel, which blurs every edge.
        freeze_norm: do not update the statistics of batch norm; for a run that continues from `start`.
        resume: continue the run in `folder`, if there is one.

    Raises:
        TrainingError: data or weights are not available, or the run fails as in `loop.train`.
    """
    if landmarks and (data.name != "procedural" or config.regions < len(LANDMARKS)):
        raise TrainingError(
            f"landmarks are for the procedural data set, with {len(LANDMARKS)} regions or more; "
            f"the data set is {data.name!r} and regions are {config.regions}; set their weight to 0"
        )
    if freeze_norm and start is None:
        raise TrainingError("a new LFAE has no statistics to keep; give an initial checkpoint, or omit freeze_norm")
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
        preview_clips=_preview_clips(source, data) if run.preview_every else None,
    )
    examples = FramePairs(source, run.seed, data.colors, from_first, landmarks > 0)
    return train(stage, examples, optimizer, run, folder, resume=resume, progress=progress)


def train_dm(
    config: LfdmConfig,
    lfae: Path,
    data: DataSettings,
    optimizer: OptimizerSettings,
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
    """Train a DM with `loop.train`, on the flow that an LFAE estimates in the clips.

    Args:
        config: config of the DM. The LFAE's config is replaced by that of its checkpoint, and the width of the text
            embedding by that of the embeddings.
        lfae: checkpoint of the LFAE.
        data: the clips.
        optimizer: settings of the optimizer.
        run: settings of the run.
        folder: folder of the run.
        progress: called after every step.
        lfae_tells_config: the checkpoint stores its architecture, as those of `train_lfae` do; if False, it is that of
            `config`.
        text_encoder: folder or name of a BERT that embeds the labels; without one, they get fixed vectors.
        start: initial DM checkpoint, with that architecture.
        signal_std: typical standard deviation of the latents, with which errors are weighted; 0 weights all alike.
        resume: continue the run in `folder`, if there is one.

    Raises:
        TrainingError: data or weights are not available or do not fit each other, or the run fails as in `loop.train`.
        lfdm_models.text.TextEncoderError: the text encoder is not available.
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
        examples={**data.facts(source), "lfae": _fingerprint(network.state_dict())},
        preview_clips=_preview_clips(source, data) if run.preview_every else None,
    )
    examples = TrainingClips(source, data.frames, run.seed, data.colors)
    return train(stage, examples, optimizer, run, folder, resume=resume, progress=progress)


def label_embeddings(labels: Sequence[str], text_encoder: str | None) -> dict[str, Float32Array]:
    """The embedding of each label, from a text encoder, or from `label_table` without one."""
    if text_encoder is not None:
        from lfdm_models.text import BertTextEncoder

        return dict(zip(labels, BertTextEncoder.load(text_encoder).embed(labels), strict=True))
    width = _OWN_TEXT_WIDTH
    while width <= len(labels):
        width *= 2
    return label_table(labels, width)


def _preview_clips(source: ClipSource, data: DataSettings) -> Tensor:
    """(N, 3, T, H, W) in [0, 1]: held-out characters, or the first training clips."""
    if data.name == "procedural":
        clips = [
            sample_clip(HELD_OUT_SEEDS[i], size=data.image_size, frames=data.frames, label=LABELS[i]).frames
            for i in range(_PREVIEWS)
        ]
        return torch.from_numpy(np.stack(clips)).permute(0, 4, 1, 2, 3).float() / 255
    examples = TrainingClips(source, data.frames, 0)
    return torch.stack([examples[number]["frames"] for number in range(_PREVIEWS)])


def _fingerprint(weights: Mapping[str, Tensor]) -> str:
    """A short hash of weights."""
    digest = hashlib.sha256()
    for key, value in sorted(weights.items()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
