"""The first stage: the LFAE learns to rebuild one frame of a clip from another.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfdm_models.config import HourglassConfig, LfaeConfig
from lfdm_models.lfae import Lfae
from lfdm_models.training.equivariance import PlaneMap, affine_loss, shift_loss
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.files import load
from lfdm_models.training.losses import PerceptualLoss, PyramidLoss
from lfdm_models.training.previews import save_gif
from lfdm_models.training.settings import Precision

#: Top-level entries of a checkpoint that hold weights.
PARTS = ("generator", "region_predictor", "bg_predictor")
_HOURGLASSES = ("flow_predictor", "region_predictor", "bg_predictor")


def new_lfae(config: LfaeConfig, seed: int, image_size: int) -> Lfae:
    """An LFAE to be trained from nothing; the global random state is left alone.

    The regions begin broad: as points, their covariances would have no inverse. The background begins still: as
    grids are corner-aligned and yet sampled by pixel centres, a picture stays where it is under a grid of n points
    times (n - 1) / n.

    Args:
        config: its architecture.
        seed: of its weights.
        image_size: pixels a side that it will see.
    """
    still = 1 - config.flow_stride / image_size
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        lfae = Lfae(config)
        lfae.region_predictor.regions.weight.mul_(0.3)
        lfae.bg_predictor.fc.weight.zero_()
        lfae.bg_predictor.fc.bias.copy_(torch.tensor([still, 0.0, 0.0, 0.0, still, 0.0]))
    return lfae


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
        examples: Mapping[str, Any],
        preview_clips: Tensor | None = None,
    ) -> None:
        """Train `lfae`.

        Args:
            lfae: see `new_lfae`.
            similarity: how a rebuilt frame is compared with the real one.
            equivariance: weight of both equivariance losses.
            examples: what the examples are, in plain values: a resumed run must have the same.
            preview_clips: (N, 3, T, H, W) in [0, 1], for previews.
        """
        self.lfae, self.similarity, self.weight = lfae, similarity, equivariance
        self.preview_clips = preview_clips
        self.facts: dict[str, Any] = {
            "stage": self.name,
            "config": plain(lfae.config),
            "loss": type(similarity).__name__,
            "loss weight": similarity.weight,
            "equivariance": equivariance,
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
        lfae, generator_network = self.lfae, self.lfae.generator
        regions = lfae.region_predictor(driving)
        flow = generator_network.pixelwise_flow_predictor(
            source, lfae.region_predictor(source), regions, lfae.bg_predictor(source, driving)
        )
        frame = generator_network.decode(source, generator_network.encode(source), flow).frame
        plane_map = PlaneMap.random(len(driving), generator)
        bent = lfae.region_predictor(plane_map.bend(driving))
        return {
            "similarity": self.similarity(frame, driving),
            "shift": self.weight * shift_loss(regions, bent, plane_map),
            "affine": self.weight * affine_loss(regions, bent, plane_map),
        }

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
