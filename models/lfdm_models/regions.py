"""Region and background predictors of the LFAE: the motion of an image's regions.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), after the motion model of MRAA.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_models.config import HourglassConfig, LfaeConfig
from lfdm_models.layers import AntiAliasDownsample, Hourglass, HourglassEncoder, coordinate_grid


class Regions(NamedTuple):
    """Positions and shapes of the K regions of an image.

    Attributes:
        shift: centers (B, K, 2), x then y, in [-1, 1].
        covar: covariances (B, K, 2, 2).
        affine: their square roots U diag(sqrt S) (B, K, 2, 2).
        heatmap: probabilities over pixels (B, K, h', w').
    """

    shift: Tensor
    covar: Tensor
    affine: Tensor
    heatmap: Tensor


def covariance_root(covar: Tensor) -> Tensor:
    """U diag(sqrt S) of symmetric 2x2 matrices (..., 2, 2), with U a reflection.

    Parity: LAPACK's SVD gives such a U for these matrices. A flipped column in one of two regions would change the
    motion between them, so the signs are fixed here in closed form; the overall sign is arbitrary.
    """
    c00, c01, c11 = covar[..., 0, 0], covar[..., 0, 1], covar[..., 1, 1]
    mean, half_difference = (c00 + c11) / 2, (c00 - c11) / 2
    radius = torch.sqrt(half_difference**2 + c01**2)
    angle = torch.atan2(2 * c01, c00 - c11) / 2
    major = torch.sqrt(mean + radius)
    # The smaller eigenvalue is determinant / larger eigenvalue: mean - radius would lose precision by cancellation.
    minor = torch.sqrt(torch.clamp((c00 * c11 - c01 * c01) / (mean + radius), min=0))
    cos, sin = torch.cos(angle), torch.sin(angle)
    rows = torch.stack([cos * major, sin * minor], -1), torch.stack([sin * major, -cos * minor], -1)
    return torch.stack(rows, dim=-2)


class RegionPredictor(nn.Module):
    """Image -> regions."""

    def __init__(self, config: LfaeConfig) -> None:
        super().__init__()
        self.temperature = config.region_temperature
        self.down = AntiAliasDownsample(config.image_channels, config.antialias_size, config.flow_stride)
        self.predictor = Hourglass(config.region_predictor, config.image_channels)
        self.regions = nn.Conv2d(self.predictor.out_channels, config.regions, 7, padding=config.region_pad)

    def forward(self, image: Tensor) -> Regions:
        """(B, 3, H, W) in [0, 1] -> Regions."""
        logits = self.regions(self.predictor(self.down(image)))
        batch, regions, height, width = logits.shape
        heatmap = F.softmax(logits.flatten(2) / self.temperature, dim=2).view_as(logits)
        grid = coordinate_grid(height, width, logits).view(1, 1, height * width, 2)
        weight = heatmap.view(batch, regions, height * width, 1)
        shift = (weight * grid).sum(dim=2)
        centered = grid - shift[:, :, None]
        covar = (weight * centered).transpose(2, 3) @ centered
        return Regions(shift, covar, covariance_root(covar), heatmap)


class BackgroundPredictor(nn.Module):
    """(source, driving) -> affine motion of the background."""

    def __init__(self, config: HourglassConfig, image_channels: int) -> None:
        super().__init__()
        self.encoder = HourglassEncoder(config, 2 * image_channels)
        self.fc = nn.Linear(config.channels(config.blocks), 6)

    def forward(self, source: Tensor, driving: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] -> (B, 3, 3), last row (0, 0, 1)."""
        deepest = self.encoder(torch.cat([source, driving], dim=1))[-1]
        rows = self.fc(deepest.mean(dim=(2, 3))).view(-1, 2, 3)
        last = torch.tensor([0.0, 0.0, 1.0], dtype=rows.dtype, device=rows.device).expand(rows.shape[0], 1, 3)
        return torch.cat([rows, last], dim=1)
