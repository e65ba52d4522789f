"""The first stage: the LFAE learns to reconstruct one frame of a clip from another.

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
from lfdm_models.training.files import load, load_weights
from lfdm_models.training.losses import PerceptualLoss, PyramidLoss
from lfdm_models.training.previews import save_gif
from lfdm_models.training.settings import Learn, Precision

#: Top-level entries of a checkpoint that hold weights.
PARTS = ("generator", "region_predictor", "bg_predictor")
#: What decodes: the parts of the generator behind the warped encoder outputs.
DECODER = ("bottleneck", "up_blocks", "final")
# Initial logits of a new LFAE: of occlusion; of a region's motion where its heatmap rises by 1; of the background's,
# relative to all regions together.
_VISIBLE, _HEATMAP_TAP, _STILL = 3.0, 8.0, 2.0
_TINY = 1e-8
# Typical color error where a motion is right.
_MIXTURE_SPREAD = 0.02
# Assumed error of decoded content.
_DECODED_ERROR = 0.04
_HOURGLASSES = ("flow_predictor", "region_predictor", "bg_predictor")


def new_lfae(config: LfaeConfig, seed: int, image_size: int) -> Lfae:
    """A new LFAE for training from scratch; the global random state does not change.

    Regions are initially broad, because points have singular covariances. The background is initially static: grids
    are corner-aligned, but sampled by pixel centers, so a picture stays in place under a grid of n points times
    (n - 1) / n. The flow is initially the background's, except where a region has arrived, and everything is visible.
    The first output is thus a copy of the source, and no pixel is so certain of the background that it could not
    learn a region.

    Args:
        config: its architecture.
        seed: seed of its weights.
        image_size: pixels per side of its inputs.
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
    """Make the background exactly static, with the grid factor that `new_lfae` describes.

    Args:
        lfae: the LFAE, which is changed.
        image_size: pixels per side of its inputs.
    """
    still = 1 - lfae.config.flow_stride / image_size
    with torch.no_grad():
        lfae.bg_predictor.fc.weight.zero_()
        lfae.bg_predictor.fc.bias.copy_(torch.tensor([still, 0.0, 0.0, 0.0, still, 0.0]))


class LfaeStage:
    """Training of an LFAE, as a `lfdm_models.training.loop.Stage`."""

    name = "lfae"
    #: Regions come from a softmax of logits times 10, for which bfloat16's 8 bits are too few.
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
            lfae: the LFAE, such as from `new_lfae`.
            similarity: loss between a reconstructed frame and the real one.
            equivariance: weight of both equivariance losses.
            landmarks: weight of the loss that pulls the first regions to the examples' landmarks, if they have any.
            mixture: weight of `mixture_loss`.
            learn: "motion" compares the warped source and does not train the decoding, which takes most of the time and
                is not needed to learn motion. "regions" trains only these. A run that trains more can start from the
                result. "decoder" trains `DECODER` alone, by the similarity: motion, encoder and all statistics keep
                their bits, so the result goes with the same DM.
            freeze_norm: normalize with the networks' stored statistics, as in inference, and do not update them;
                "decoder" always does.
            examples: description of the examples in plain values, which must be the same for a resumed run.
            preview_clips: (N, 3, T, H, W) in [0, 1], for previews.
        """
        self.lfae, self.similarity, self.weight = lfae, similarity, equivariance
        self.landmarks, self.mixture, self.learn = landmarks, mixture, learn
        self.freeze_norm = freeze_norm or learn == "decoder"
        if learn == "decoder":
            lfae.requires_grad_(False)
            for part in DECODER:
                lfae.generator.get_submodule(part).requires_grad_(True)
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
            "freeze norm": self.freeze_norm,
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
        """Losses of reconstructing `driving` from `source`, and of the regions' equivariance."""
        source, driving = batch["source"], batch["driving"]
        lfae, network = self.lfae, self.lfae.generator
        if self.freeze_norm:
            lfae.eval()  # only batch norm differs between training and inference
        if self.learn == "decoder":
            with torch.no_grad():
                with torch.autocast(driving.device.type, enabled=False):
                    flow = lfae.estimate_motion(source, driving)
                skips = network.encode(source)
            return {"similarity": self.similarity(network.decode(source, skips, flow).frame.float(), driving)}
        plane_map = PlaneMap.random(len(driving), generator)
        # Cheap, but needs full precision: regions come from a softmax of logits times 10.
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
        # With 8 bits, a coordinate's error is an eighth of a pixel at this size.
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
        """The released layout, and the training's facts under "training"."""
        parts = {
            part: {key[len(part) + 1 :]: value for key, value in weights.items() if key.startswith(f"{part}.")}
            for part in PARTS
        }
        return {**parts, "training": self.facts}

    @torch.no_grad()
    def preview(self, weights: Mapping[str, Tensor], folder: Path, step: int) -> None:
        """Rows of real clip, reconstructed clip and warped first frame."""
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

    In training, common statistics normalize all of them, as in inference. If each batch were normalized separately, the
    network would see neutral poses differently from moving ones, and the learned motion between them would not hold in
    inference.

    Args:
        predictor: the region predictor.
        images: each (B, 3, H, W) in [0, 1].
    """
    together = predictor(torch.cat(images))
    parts = zip(*(field.split([len(image) for image in images]) for field in together), strict=True)
    return [Regions(*part) for part in parts]


def landmark_loss(regions: Regions, landmarks: Tensor) -> Tensor:
    """Mean divergence of heatmaps from a Gaussian around each landmark, with the landmark's rotation.

    Smaller regions count more.

    Args:
        regions: at least as many as landmarks; the first of them are compared.
        landmarks: (B, N, 5): x, y, angle, two sizes, from `lfdm_models.training.landmarks`.
    """
    heatmap = regions.heatmap[:, : landmarks.shape[1]]
    height, width = heatmap.shape[2:]
    # Heatmap coordinates are relative to corner pixels, those of a picture to its edges.
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
    """How badly the motions explain the driving frame, with each motion as likely as its weight in the flow.

    Minus the logarithm of a sum over motions of probability times exp(-error / 0.02), and over occlusion, where the
    decoder paints with its own error. Unlike the error of the reconstructed frame, this loss has a gradient wherever
    another motion, or none, explains a pixel better, however certain the flow is. Otherwise the flow would stay at the
    background, and occlusion at fully visible, because both are better initially than untrained alternatives.

    Args:
        candidates: the motions of the flow.
        driving: the driving frame at the flow's size (B, 3, h, w).
    """
    error = (candidates.deformed.float() - driving[:, None]).abs().mean(dim=2)
    share = F.log_softmax(candidates.logits.float(), dim=1) - error / _MIXTURE_SPREAD
    visible = candidates.visible.float().squeeze(1)
    explained = F.logsigmoid(visible) + torch.logsumexp(share, dim=1)
    return -torch.logaddexp(explained, F.logsigmoid(-visible) - _DECODED_ERROR / _MIXTURE_SPREAD).mean()


def load_lfae(path: Path, config: LfaeConfig | None = None) -> tuple[Lfae, dict[str, Any]]:
    """Load an LFAE checkpoint, in eval mode, with its training's facts.

    Args:
        path: written by this stage, or released.
        config: its architecture, if the checkpoint does not store it (a released one does not).

    Raises:
        TrainingError: the file cannot be read, does not store its architecture, or has another one.
    """
    content = load(path, "an LFAE checkpoint")
    training = content.get("training") or {}
    if config is None:
        if "config" not in training:
            raise TrainingError(f"{path} does not store its architecture; for a released one, give --released-lfae")
        config = lfae_config(training["config"])
    lfae = Lfae(config)
    weights = {
        f"{part}.{key.removeprefix('module.')}": value for part in PARTS for key, value in content.get(part, {}).items()
    }
    load_weights(lfae, weights, path, "an LFAE")
    return lfae.eval().requires_grad_(False), training


def plain(config: Any) -> dict[str, Any]:
    """A configuration as plain values, for a checkpoint."""
    values = dataclasses.asdict(config)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def lfae_config(values: Mapping[str, Any]) -> LfaeConfig:
    """The inverse of `plain`."""
    hourglasses = {name: HourglassConfig(**values[name]) for name in _HOURGLASSES}
    return LfaeConfig(**{**values, **hourglasses})
