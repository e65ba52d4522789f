"""The latent flow autoencoder (LFAE).

Source: Ni et al., CVPR 2023 (arXiv 2303.13744).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfdm_models.config import LfaeConfig
from lfdm_models.generator import Decoded, Flow, Generator
from lfdm_models.layers import coordinate_grid
from lfdm_models.regions import BackgroundPredictor, RegionPredictor


class Lfae(nn.Module):
    """Generator, region predictor and background predictor under the released names."""

    def __init__(self, config: LfaeConfig) -> None:
        super().__init__()
        self.config = config
        self.generator = Generator(config)
        self.region_predictor = RegionPredictor(config)
        self.bg_predictor = BackgroundPredictor(config.bg_predictor, config.image_channels)

    def estimate_motion(self, source: Tensor, driving: Tensor) -> Flow:
        """Two images (B, 3, H, W) in [0, 1] -> the flow from `source` to `driving`."""
        flow: Flow = self.generator.pixelwise_flow_predictor(
            source,
            self.region_predictor(source),
            self.region_predictor(driving),
            self.bg_predictor(source, driving),
        )
        return flow

    def forward(self, source: Tensor, driving: Tensor) -> Decoded:
        """Reconstruct `driving` from `source`; both (B, 3, H, W) in [0, 1]."""
        flow = self.estimate_motion(source, driving)
        return self.generator.decode(source, self.generator.encode(source), flow)


def flow_to_latent(flow: Flow, *, residual_flow: bool) -> Tensor:
    """Flow -> latent (B, 3, h, w): grid (or its offset from the identity), then 2 * occlusion - 1.

    Source: Sec. 3.3 of the paper; the identity is linspace(-1, 1) along each axis.
    """
    grid = flow.grid
    if residual_flow:
        grid = grid - coordinate_grid(grid.shape[1], grid.shape[2], grid)
    return torch.cat([grid.permute(0, 3, 1, 2), 2 * flow.occlusion - 1], dim=1)


def latent_to_flow(latent: Tensor, *, residual_flow: bool) -> Flow:
    """Latent (B, 3, h, w) of one frame -> flow; the inverse of `flow_to_latent`."""
    grid = latent[:, :2].permute(0, 2, 3, 1)
    if residual_flow:
        grid = grid + coordinate_grid(grid.shape[1], grid.shape[2], grid)
    return Flow(grid, (latent[:, 2:3] + 1) / 2)
