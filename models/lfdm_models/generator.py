"""The generator of the LFAE: encoder, pixelwise flow predictor, warping decoder.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_models.config import LfaeConfig
from lfdm_models.layers import (
    AntiAliasDownsample,
    DownBlock,
    Hourglass,
    ResidualBlock,
    SameBlock,
    UpBlock,
    coordinate_grid,
    resize,
    sample,
)
from lfdm_models.regions import Regions


class Flow(NamedTuple):
    """The motion from the source to a driving frame.

    Attributes:
        grid: backward sampling grid (B, h, w, 2), x then y, in [-1, 1].
        occlusion: occlusion map (B, 1, h, w) in [0, 1].
    """

    grid: Tensor
    occlusion: Tensor


class Candidates(NamedTuple):
    """The motions that a flow is a mixture of, and its weights: first the background's, then one per region.

    Attributes:
        logits: logits of the mixture at each pixel (B, K + 1, h, w).
        motions: backward sampling grids (B, K + 1, h, w, 2).
        deformed: the source at the flow's size, moved by each motion (B, K + 1, 3, h, w).
        visible: logits of the occlusion map (B, 1, h, w).
    """

    logits: Tensor
    motions: Tensor
    deformed: Tensor
    visible: Tensor

    def flow(self) -> Flow:
        """The mixture."""
        mask = F.softmax(self.logits, dim=1)
        return Flow((mask[..., None] * self.motions).sum(dim=1), torch.sigmoid(self.visible))


class PixelwiseFlowPredictor(nn.Module):
    """Source image and two sets of regions -> dense flow and occlusion."""

    def __init__(self, config: LfaeConfig) -> None:
        super().__init__()
        maps = config.regions + 1
        self.down = AntiAliasDownsample(config.image_channels, config.antialias_size, config.flow_stride)
        self.hourglass = Hourglass(config.flow_predictor, maps * (1 + config.image_channels))
        self.mask = nn.Conv2d(self.hourglass.out_channels, maps, 7, padding=3)
        self.occlusion = nn.Conv2d(self.hourglass.out_channels, 1, 7, padding=3)

    def forward(self, image: Tensor, source: Regions, driving: Regions, background: Tensor) -> Flow:
        """(B, 3, H, W), two Regions and (B, 3, 3) -> Flow at the flow's size."""
        return self.candidates(image, source, driving, background).flow()

    def candidates(self, image: Tensor, source: Regions, driving: Regions, background: Tensor) -> Candidates:
        """(B, 3, H, W), two Regions and (B, 3, 3) -> the motions of the mixture."""
        return self.mixture(*self.motions(image, source, driving, background))

    def motions(
        self, image: Tensor, source: Regions, driving: Regions, background: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The part without weights: (B, 3, H, W), two Regions and (B, 3, 3) -> heatmaps, motions, deformed.

        Heatmaps are differences, (B, K + 1, h, w), zero for the background; the others are those of `Candidates`.
        """
        small = self.down(image)
        batch, channels, height, width = small.shape
        grid = coordinate_grid(height, width, small)
        heatmaps = gaussian_heatmaps(driving, grid) - gaussian_heatmaps(source, grid)
        heatmaps = torch.cat([torch.zeros_like(heatmaps[:, :1]), heatmaps], dim=1)
        motions = sparse_motions(source, driving, background, grid)
        maps = motions.shape[1]
        repeated = small[:, None].expand(-1, maps, -1, -1, -1).reshape(batch * maps, channels, height, width)
        deformed = sample(repeated, motions.view(batch * maps, height, width, 2))
        return heatmaps, motions, deformed.view(batch, maps, channels, height, width)

    def mixture(self, heatmaps: Tensor, motions: Tensor, deformed: Tensor) -> Candidates:
        """Outputs of `motions` -> the motions and weights of the mixture."""
        joined = torch.cat([heatmaps[:, :, None], deformed], dim=2)
        prediction = self.hourglass(joined.flatten(1, 2))
        return Candidates(self.mask(prediction), motions, deformed, self.occlusion(prediction))


def inverse_2x2(matrix: Tensor) -> Tensor:
    """Closed-form inverse of (..., 2, 2)."""
    a, b, c, d = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]
    adjugate = torch.stack([torch.stack([d, -b], -1), torch.stack([-c, a], -1)], -2)
    return adjugate / (a * d - b * c)[..., None, None]


def gaussian_heatmaps(regions: Regions, grid: Tensor) -> Tensor:
    """exp(-d' covar^-1 d / 2) around each center: K regions on (h, w, 2) -> (B, K, h, w)."""
    offset = grid - regions.shift[:, :, None, None]
    scaled = offset @ inverse_2x2(regions.covar)[:, :, None]
    return torch.exp(-0.5 * (offset * scaled).sum(dim=-1))


def sparse_motions(source: Regions, driving: Regions, background: Tensor, grid: Tensor) -> Tensor:
    """Backward motion of the background and of each region: (B, K + 1, h, w, 2), background first."""
    height, width, _ = grid.shape
    homogeneous = torch.cat([grid, torch.ones_like(grid[..., :1])], dim=-1).view(1, height * width, 3)
    moved = homogeneous @ background.transpose(1, 2)
    behind = (moved[..., :2] / moved[..., 2:]).view(-1, 1, height, width, 2)
    affine = source.affine @ inverse_2x2(driving.affine)
    # Parity: a region's axes are known up to a sign; the one with a positive first entry is used.
    affine = affine * torch.sign(affine[..., :1, :1])
    offset = grid - driving.shift[:, :, None, None]
    regions = offset @ affine.transpose(2, 3)[:, :, None] + source.shift[:, :, None, None]
    return torch.cat([behind, regions], dim=1)


class Decoded(NamedTuple):
    """One decoded frame.

    Attributes:
        frame: (B, 3, H, W) in [0, 1].
        warped: the source image after warping alone, (B, 3, H, W).
    """

    frame: Tensor
    warped: Tensor


class Generator(nn.Module):
    """Encodes an image once, and decodes its frames along flows."""

    def __init__(self, config: LfaeConfig) -> None:
        super().__init__()
        levels = range(config.down_blocks)
        widths = [config.generator_channels(level) for level in range(config.down_blocks + 1)]
        self.pixelwise_flow_predictor = PixelwiseFlowPredictor(config)
        self.first = SameBlock(config.image_channels, widths[0], 7)
        self.down_blocks = nn.ModuleList(DownBlock(widths[i], widths[i + 1]) for i in levels)
        self.up_blocks = nn.ModuleList(UpBlock(widths[i + 1], widths[i]) for i in reversed(levels))
        self.bottleneck = nn.Sequential()
        for i in range(config.bottleneck_blocks):
            self.bottleneck.add_module(f"r{i}", ResidualBlock(widths[-1]))
        self.final = nn.Conv2d(widths[0], config.image_channels, 7, padding=3)

    def encode(self, image: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> encoder outputs, full size first; the last is the `feature`."""
        outputs = [self.first(image)]
        for block in self.down_blocks:
            outputs.append(block(outputs[-1]))
        return outputs

    def decode(self, image: Tensor, skips: list[Tensor], flow: Flow) -> Decoded:
        """Warp the source's encoder outputs along one flow and decode a frame.

        Args:
            image: (B, 3, H, W) in [0, 1].
            skips: from `encode`.
            flow: grid (B, h, w, 2) and occlusion (B, 1, h, w).
        """
        out = warp(skips[-1], flow) * occlusion_at(skips[-1], flow)
        out = self.bottleneck(out)
        for skip, block in zip(reversed(skips[1:]), self.up_blocks, strict=True):
            out = block(blend(skip, out, flow))
        out = blend(skips[0], out, flow)
        out = torch.sigmoid(self.final(out))
        return Decoded(blend(image, out, flow), warp(image, flow))


def warp(feature: Tensor, flow: Flow) -> Tensor:
    """Sample (B, C, H, W) along the flow, which is resized to its size."""
    grid = resize(flow.grid.permute(0, 3, 1, 2), (feature.shape[2], feature.shape[3]))
    return sample(feature, grid.permute(0, 2, 3, 1))


def occlusion_at(feature: Tensor, flow: Flow) -> Tensor:
    """The occlusion map, resized to the feature's size."""
    return resize(flow.occlusion, (feature.shape[2], feature.shape[3]))


def blend(feature: Tensor, out: Tensor, flow: Flow) -> Tensor:
    """The warped feature where the source is visible, `out` elsewhere."""
    occlusion = occlusion_at(feature, flow)
    return warp(feature, flow) * occlusion + out * (1 - occlusion)
