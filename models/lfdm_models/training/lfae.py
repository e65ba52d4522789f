"""The first stage: the LFAE learns to rebuild one frame of a clip from another.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.2.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_models.config import HourglassConfig, LfaeConfig
from lfdm_models.generator import Candidates, warp
from lfdm_models.layers import coordinate_grid
from lfdm_models.lfae import Lfae
from lfdm_models.regions import RegionPredictor, Regions
from lfdm_models.training.equivariance import PlaneMap, affine_loss, shift_loss
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.files import load
from lfdm_models.training.losses import PerceptualLoss, PyramidLoss
from lfdm_models.training.previews import save_gif
from lfdm_models.training.settings import Learn, Precision

#: Top-level entries of a checkpoint that hold weights.
PARTS = ("generator", "region_predictor", "bg_predictor")
# Logits of a new LFAE: of occlusion; of a region's motion where its heatmap has risen by 1; of the background's,
# above all regions together.
_VISIBLE, _HEATMAP_TAP, _STILL = 3.0, 8.0, 2.0
_TINY = 1e-8
# How far colours may be off where a motion is right.
_MIXTURE_SPREAD = 0.02
# How far what is decoded is taken to be.
_DECODED_ERROR = 0.04
_HOURGLASSES = ("flow_predictor", "region_predictor", "bg_predictor")


def new_lfae(config: LfaeConfig, seed: int, image_size: int) -> Lfae:
    """An LFAE to be trained from nothing; the global random state is left alone.

    The regions begin broad: as points, their covariances would have no inverse. The background begins still: as
    grids are corner-aligned and yet sampled by pixel centres, a picture stays where it is under a grid of n points
    times (n - 1) / n. A flow begins as the background's but where a region has come to, and everything as visible: the
    start is a copy of the source, and no pixel is so sure of the background that it could not learn of a region.

    Args:
        config: its architecture.
        seed: of its weights.
        image_size: pixels a side that it will see.
    """
    maps = config.regions + 1
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        lfae = Lfae(config)
        lfae.region_predictor.regions.weight.mul_(0.3)
        still_background(lfae, image_size)
        flow = lfae.generator.pixelwise_flow_predictor
        flow.occlusion.weight.mul_(0.1)
        nn.init.constant_(flow.occlusion.bias, _VISIBLE)  # type: ignore[arg-type]
        flow.mask.weight.zero_()
        for region in range(1, maps):
            heatmap = config.flow_predictor.channels(0) + region * (1 + config.image_channels)
            flow.mask.weight[(region, heatmap, *(side // 2 for side in flow.mask.kernel_size))] = _HEATMAP_TAP
        flow.mask.bias.zero_()  # type: ignore[union-attr]
        flow.mask.bias[0] = math.log(config.regions) + _STILL  # type: ignore[index]
    return lfae


def still_background(lfae: Lfae, image_size: int) -> None:
    """Have the background stay exactly where it is; see `new_lfae`.

    Args:
        lfae: what is changed.
        image_size: pixels a side that it sees.
    """
    still = 1 - lfae.config.flow_stride / image_size
    with torch.no_grad():
        lfae.bg_predictor.fc.weight.zero_()
        lfae.bg_predictor.fc.bias.copy_(torch.tensor([still, 0.0, 0.0, 0.0, still, 0.0]))


class LfaeStage:
    """Training of an LFAE; see `lfdm_models.training.loop.Stage`."""

    name = "lfae"
    #: Regions are found by a softmax of logits times 10: bfloat16's 8 bits are too few for them.
    gpu_precision: Precision = "tf32"

    def __init__(
        self,
        lfae: Lfae,
        similarity: PerceptualLoss | PyramidLoss,
        *,
        equivariance: float = 10.0,
        landmarks: float = 0.0,
        mixture: float = 0.0,
        learn: Learn = "all",
        freeze_norm: bool = False,
        examples: Mapping[str, Any],
        preview_clips: Tensor | None = None,
    ) -> None:
        """Train `lfae`.

        Args:
            lfae: see `new_lfae`.
            similarity: how a rebuilt frame is compared with the real one.
            equivariance: weight of both equivariance losses.
            landmarks: weight of the loss that draws the first regions to the examples' landmarks, if they have any.
            mixture: weight of `mixture_loss`.
            learn: "motion" compares the warped source and trains nothing that decodes: most of the work is there, and
                motion is found without it. "regions" trains these alone. A run that trains more can start from the
                result.
            freeze_norm: normalise with the statistics that the networks have, as inference does, and keep them.
            examples: what the examples are, in plain values: a resumed run must have the same.
            preview_clips: (N, 3, T, H, W) in [0, 1], for previews.
        """
        self.lfae, self.similarity, self.weight = lfae, similarity, equivariance
        self.landmarks, self.mixture, self.learn, self.freeze_norm = landmarks, mixture, learn, freeze_norm
        self.preview_clips = preview_clips
        self.facts: dict[str, Any] = {
            "stage": self.name,
            "config": plain(lfae.config),
            "loss": type(similarity).__name__,
            "loss weight": similarity.weight,
            "equivariance": equivariance,
            "landmarks": landmarks,
            "mixture": mixture,
            "learn": learn,
            "freeze norm": freeze_norm,
            "examples": dict(examples),
        }

    @property
    def network(self) -> nn.Module:
        """The whole LFAE."""
        return self.lfae

    def to(self, device: torch.device) -> None:
        """Move network and loss."""
        self.lfae.to(device)
        self.similarity.to(device)

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Of rebuilding `driving` from `source`, and of regions that do not follow a bent image."""
        source, driving = batch["source"], batch["driving"]
        lfae, network = self.lfae, self.lfae.generator
        if self.freeze_norm:
            lfae.eval()  # of all that is in it, batch norm alone behaves otherwise in training
        plane_map = PlaneMap.random(len(driving), generator)
        # Cheap, and in need of all bits: regions are found by a softmax of logits times 10.
        with torch.autocast(driving.device.type, enabled=False):
            before, after, bent = regions_of(lfae.region_predictor, source, driving, plane_map.bend(driving))
        losses = {
            "shift": self.weight * shift_loss(after, bent, plane_map),
            "affine": self.weight * affine_loss(after, bent, plane_map),
        }
        if self.landmarks:
            parts = (before, batch["source_landmarks"]), (after, batch["driving_landmarks"])
            total = torch.stack([landmark_loss(regions, points) for regions, points in parts]).mean()
            losses["landmarks"] = self.landmarks * total
        if self.learn == "regions":
            return losses
        # 8 bits of a coordinate are an eighth of a pixel at this size.
        with torch.autocast(driving.device.type, enabled=False):
            background = lfae.bg_predictor(source, driving)
            motions = network.pixelwise_flow_predictor.motions(source, before, after, background)
        candidates = network.pixelwise_flow_predictor.mixture(*motions)
        candidates = candidates._replace(logits=candidates.logits.float(), visible=candidates.visible.float())
        flow = candidates.flow()
        if self.mixture:
            losses["mixture"] = self.mixture * mixture_loss(candidates, network.pixelwise_flow_predictor.down(driving))
        if self.learn == "motion":
            return {"similarity": self.similarity(warp(source, flow), driving), **losses}
        frame = network.decode(source, network.encode(source), flow).frame
        return {"similarity": self.similarity(frame.float(), driving), **losses}

    def checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The released layout, and what it was trained with under "training"."""
        parts = {
            part: {key[len(part) + 1 :]: value for key, value in weights.items() if key.startswith(f"{part}.")}
            for part in PARTS
        }
        return {**parts, "training": self.facts}

    @torch.no_grad()
    def preview(self, weights: Mapping[str, Tensor], folder: Path, step: int) -> None:
        """Rows of real clip, rebuilt clip and warped first frame."""
        if self.preview_clips is None:
            return
        device = next(self.lfae.parameters()).device
        lfae = Lfae(self.lfae.config).to(device).eval()
        lfae.load_state_dict(weights)
        rows = []
        for clip in self.preview_clips.to(device):
            driving = clip.transpose(0, 1)
            decoded = lfae(driving[:1].expand_as(driving).contiguous(), driving)
            rows.append([clip, decoded.frame.transpose(0, 1), decoded.warped.transpose(0, 1)])
        save_gif(folder / f"step_{step:07d}.gif", rows)


def regions_of(predictor: RegionPredictor, *images: Tensor) -> list[Regions]:
    """Regions of several batches of images, found in one pass.

    In training, all are normalised by what they have in common, as all are in inference. Were each batch normalised
    by itself, neutral poses would be seen otherwise than moving ones, and what is learned of the motion between them
    would not hold in inference.

    Args:
        predictor: what finds them.
        images: each (B, 3, H, W) in [0, 1].
    """
    together = predictor(torch.cat(images))
    parts = zip(*(field.split([len(image) for image in images]) for field in together), strict=True)
    return [Regions(*part) for part in parts]


def landmark_loss(regions: Regions, landmarks: Tensor) -> Tensor:
    """How far heatmaps are from a Gaussian about each landmark, which lies as the landmark does: a mean divergence.

    The smaller a region shall be, the more it counts.

    Args:
        regions: at least as many as landmarks; the first of them are compared.
        landmarks: (B, N, 5): x, y, angle, two sizes; see `lfdm_models.training.landmarks`.
    """
    heatmap = regions.heatmap[:, : landmarks.shape[1]]
    height, width = heatmap.shape[2:]
    # Pixels of a heatmap are counted from corner to corner, those of a picture by their centres.
    scale = landmarks.new_tensor([width / (width - 1), height / (height - 1)])
    grid = coordinate_grid(height, width, heatmap).view(1, 1, height * width, 2)
    offset = grid - (landmarks[:, :, :2] * scale)[:, :, None]
    cos, sin = landmarks[:, :, 2:3].cos(), landmarks[:, :, 2:3].sin()
    across = offset[..., 0] * cos + offset[..., 1] * sin
    along = offset[..., 1] * cos - offset[..., 0] * sin
    squared = (across / landmarks[:, :, 3:4]) ** 2 + (along / landmarks[:, :, 4:5]) ** 2
    wanted = F.softmax(-0.5 * squared, dim=2)
    logarithm = torch.log(heatmap.flatten(2) + _TINY)
    divergence = (wanted * (torch.log(wanted + _TINY) - logarithm)).sum(dim=2)
    weight = 1 / (landmarks[:, :, 3] * landmarks[:, :, 4])
    return (divergence * weight).sum() / weight.sum()


def mixture_loss(candidates: Candidates, driving: Tensor) -> Tensor:
    """How badly the motions explain the driving frame, if each of them is as likely as it counts in the flow.

    Minus the logarithm of a sum over motions of probability times exp(-error / 0.02), and of what is occluded: the
    decoder has to make that, at an error of its own. Unlike the error of the rebuilt frame, this has a gradient
    wherever another motion, or none, explains a pixel better, however sure the flow is; else the flow stays with the
    background, and occlusion with what is visible, because both begin better than what has not learned yet.

    Args:
        candidates: of the flow.
        driving: the driving frame at the flow's size (B, 3, h, w).
    """
    error = (candidates.deformed.float() - driving[:, None]).abs().mean(dim=2)
    share = F.log_softmax(candidates.logits.float(), dim=1) - error / _MIXTURE_SPREAD
    visible = candidates.visible.float().squeeze(1)
    explained = F.logsigmoid(visible) + torch.logsumexp(share, dim=1)
    return -torch.logaddexp(explained, F.logsigmoid(-visible) - _DECODED_ERROR / _MIXTURE_SPREAD).mean()


def load_lfae(path: Path, config: LfaeConfig | None = None) -> tuple[Lfae, dict[str, Any]]:
    """An LFAE checkpoint, in eval mode, and what it says of its training.

    Args:
        path: written by this stage, or released.
        config: its architecture, if the checkpoint does not tell (a released one does not).

    Raises:
        TrainingError: it cannot be read, does not tell its architecture, or is not of it.
    """
    content = load(path, "an LFAE checkpoint")
    training = content.get("training") or {}
    if config is None:
        if "config" not in training:
            raise TrainingError(f"{path} does not tell its architecture; was it released? then give --released-lfae")
        config = lfae_config(training["config"])
    lfae = Lfae(config)
    weights = {
        f"{part}.{key.removeprefix('module.')}": value for part in PARTS for key, value in content.get(part, {}).items()
    }
    try:
        lfae.load_state_dict(weights)
    except RuntimeError as error:
        raise TrainingError(f"{path} is no LFAE of that architecture: {str(error).splitlines()[-1].strip()}") from error
    return lfae.eval().requires_grad_(False), training


def plain(config: Any) -> dict[str, Any]:
    """A configuration as plain values, as a checkpoint can hold them."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def lfae_config(values: Mapping[str, Any]) -> LfaeConfig:
    """The inverse of `plain`."""
    hourglasses = {name: HourglassConfig(**values[name]) for name in _HOURGLASSES}
    return LfaeConfig(**{**values, **hourglasses})
