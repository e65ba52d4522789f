"""Training runs of `lfdm-train`: each combines data, networks and settings."""

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
from lfdm_models.training.layouts import DiskSet, Split
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
    """The training clips.

    Attributes:
        name: name of the data set.
        root: its folder; None for the procedural data set.
        image_size: pixels per side.
        frames: frames per clip.
        subjects: subjects of the split; None for the default ones. Only for MHAD and NATOPS.
        jitter: whether colors are jittered; never for the procedural data set, whose colors vary already.
        pool: number of clips of the procedural data set, all kept in memory; 0 for unlimited new clips.
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
            TrainingError: the folder is missing, has no clips, or an option does not apply to the data set.
        """
        if self.name == "procedural":
            if self.root is not None:
                raise TrainingError(f"the procedural data set needs no folder, but {self.root} is given; leave it out")
            return ProceduralClips(self.image_size, self.frames, seed, self.pool)
        return DiskClips(self.disk_set("train"), self.image_size, seed)

    def disk_set(self, split: Split) -> DiskSet:
        """Find the clips of a split; not for the procedural data set.

        Raises:
            TrainingError: the folder is missing, has no clips, or an option does not apply to the data set.
        """
        if self.pool:
            raise TrainingError(f"a pool is for procedural clips, but the data set is {self.name!r}; leave it out")
        if self.root is None:
            raise TrainingError(f"the data set {self.name!r} needs its folder; give it with --root")
        if self.subjects is not None and self.name not in ("mhad", "natops"):
            raise TrainingError(f"the data set {self.name!r} does not support a choice of subjects; leave it out")
        if self.name == "mug":
            return layouts.mug(self.root, split)
        if self.name == "plain":
            return layouts.plain(self.root, split)
        find = layouts.mhad if self.name == "mhad" else layouts.natops
        return find(self.root, split, self.subjects)

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
    """The architecture: the small one, or the published one for a data set."""
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
    """Train an LFAE until all steps are done, or a signal ends the run after the current step.

    Args:
        config: architecture of the LFAE.
        data: the training clips.
        optimizer: settings of the optimizer.
        run: number of steps, batch size, device, precision, and what is saved when.
        folder: folder of the run: its state, checkpoints, log and previews.
        vgg: weights of VGG-19 for the perceptual loss; None for the pyramid loss.
        start: an LFAE checkpoint of that architecture to start from; None for new weights.
        learn: "all"; "motion", which compares the warped source and trains nothing that decodes; or "regions", which
            trains only the region predictor.
        equivariance: weight of both equivariance losses.
        landmarks: weight of the loss that pulls the first regions to the landmarks of the procedural data set.
        mixture: weight of `mixture_loss`.
        from_first: use the first frame as the source of every pair, as in testing and use; else any frame.
        camera_still: fix the background's motion to zero. A learned motion has an error of some hundredths of a pixel,
            which blurs every edge.
        freeze_norm: normalize with the statistics of `start`, as in inference, and keep them.
        resume: continue from the state in `folder`, if there is one.
        progress: called after every step.

    Raises:
        TrainingError: the data or weights are not available; the folder has a run and `resume` is False, or
            the run cannot be resumed; an option does not apply; or the loss is not finite.
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
        preview_clips=preview_clips(source, data) if run.preview_every else None,
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
    """Train a DM on the flow that an LFAE finds in the clips.

    The run ends when all steps are done, or after the current step at a signal.

    Args:
        config: architecture of the DM. The LFAE's part is replaced by that of its checkpoint, and the width of the text
            embedding by that of the embeddings.
        lfae: checkpoint of the trained LFAE.
        data: the training clips.
        optimizer: settings of the optimizer.
        run: number of steps, batch size, device, precision, and what is saved when.
        folder: folder of the run: its state, checkpoints, log and previews.
        lfae_tells_config: whether the LFAE's checkpoint stores its architecture, as those of `train_lfae` do; else
            it is that of `config`.
        text_encoder: folder or name of a BERT that embeds the labels; None for fixed vectors.
        start: a DM checkpoint of that architecture to start from; None for new weights.
        signal_std: standard deviation of the latents, for `noise_weight`; 0 weights all errors equally, as published.
        resume: continue from the state in `folder`, if there is one.
        progress: called after every step.

    Raises:
        TrainingError: the data or weights are not available or do not fit each other; the folder has a run and
            `resume` is False, or the run cannot be resumed; or the loss is not finite.
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
        examples={**data.facts(source), "lfae": fingerprint(network.state_dict())},
        preview_clips=preview_clips(source, data) if run.preview_every else None,
    )
    examples = TrainingClips(source, data.frames, run.seed, data.colors)
    return train(stage, examples, optimizer, run, folder, resume=resume, progress=progress)


def label_embeddings(labels: Sequence[str], text_encoder: str | None) -> dict[str, Float32Array]:
    """Embedding (text_width,) of each label, from a text encoder or else from `label_table`."""
    if text_encoder is not None:
        from lfdm_models.text import BertTextEncoder

        return dict(zip(labels, BertTextEncoder.load(text_encoder).embed(labels), strict=True))
    width = _OWN_TEXT_WIDTH
    while width <= len(labels):
        width *= 2
    return label_table(labels, width)


def preview_clips(source: ClipSource, data: DataSettings) -> Tensor:
    """(N, 3, T, H, W) in [0, 1]: held-out characters, or the first clips of the training data."""
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
