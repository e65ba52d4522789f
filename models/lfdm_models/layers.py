"""Building blocks of the LFAE, faithful to the published model.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744). Attribute names are those of the released state dicts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_models.config import HourglassConfig


class SameBlock(nn.Module):
    """conv (k, pad k // 2) -> batch norm -> ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H, W)."""
        return F.relu(self.norm(self.conv(x)))


class DownBlock(nn.Module):
    """conv 3x3 -> batch norm -> ReLU -> average-pool 2x2."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, H // 2, W // 2)."""
        return F.avg_pool2d(F.relu(self.norm(self.conv(x))), 2)


class UpBlock(nn.Module):
    """nearest x2 -> conv 3x3 -> batch norm -> ReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out, 2H, 2W)."""
        return F.relu(self.norm(self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))))


class ResidualBlock(nn.Module):
    """x + conv2(ReLU(norm2(conv1(ReLU(norm1(x))))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(channels)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        out = self.conv1(F.relu(self.norm1(x)))
        residual: Tensor = self.conv2(F.relu(self.norm2(out)))
        return x + residual


class HourglassEncoder(nn.Module):
    """The Down half of an hourglass."""

    def __init__(self, config: HourglassConfig, in_channels: int) -> None:
        super().__init__()
        inputs = [in_channels, *(config.channels(i) for i in range(1, config.blocks))]
        self.down_blocks = nn.ModuleList(
            DownBlock(channels, config.channels(i + 1)) for i, channels in enumerate(inputs)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, in, H, W) -> the input and every block's output, deepest last."""
        outputs = [x]
        for block in self.down_blocks:
            outputs.append(block(outputs[-1]))
        return outputs


class HourglassDecoder(nn.Module):
    """The Up half of an hourglass; each output is concatenated with the activation of its size."""

    def __init__(self, config: HourglassConfig) -> None:
        super().__init__()
        deepest = config.blocks - 1
        self.up_blocks = nn.ModuleList(
            # After the first block, the input is the previous output concatenated with its skip.
            UpBlock(config.channels(i + 1) * (1 if i == deepest else 2), config.channels(i))
            for i in reversed(range(config.blocks))
        )

    def forward(self, activations: list[Tensor]) -> Tensor:
        """The encoder's outputs -> (B, width + in, H, W)."""
        *rest, out = activations
        for block, skip in zip(self.up_blocks, reversed(rest), strict=True):
            out = torch.cat([block(out), skip], dim=1)
        return out


class Hourglass(nn.Module):
    """Encoder and decoder; `out_channels` = width + in_channels."""

    def __init__(self, config: HourglassConfig, in_channels: int) -> None:
        super().__init__()
        self.encoder = HourglassEncoder(config, in_channels)
        self.decoder = HourglassDecoder(config)
        self.out_channels = config.channels(0) + in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, out_channels, H, W)."""
        features: Tensor = self.decoder(self.encoder(x))
        return features


class AntiAliasDownsample(nn.Module):
    """Depth-wise Gaussian blur, zero-padded, then every `stride`-th pixel."""

    weight: Tensor

    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        sigma = (stride - 1) / 2
        offset = torch.arange(kernel_size, dtype=torch.float32) - (kernel_size - 1) / 2
        line = torch.exp(-(offset**2) / (2 * sigma**2)) if sigma else torch.ones(1)
        kernel = line[:, None] * line[None, :]
        kernel = kernel / kernel.sum()
        self.register_buffer("weight", kernel.expand(channels, 1, -1, -1).clone())

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / stride, W / stride).

        Only the kept pixels are computed: a strided convolution combines blur and subsampling.
        """
        channels, _, size, _ = self.weight.shape
        return F.conv2d(x, self.weight, stride=self.stride, padding=size // 2, groups=channels)


def coordinate_grid(height: int, width: int, like: Tensor) -> Tensor:
    """Corner-aligned pixel coordinates in [-1, 1], (H, W, 2), last axis (x, y), dtype and device of `like`."""
    y, x = (torch.arange(n, dtype=like.dtype, device=like.device) * (2 / (n - 1)) - 1 for n in (height, width))
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)


def sample(feature: Tensor, grid: Tensor) -> Tensor:
    """Bilinear sampling of (B, C, H, W) at (B, h, w, 2) -> (B, C, h, w); zeros outside.

    Parity: grids are corner-aligned, but sampled with align_corners=False. This mismatch is part of the published
    model.
    """
    return F.grid_sample(feature, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear resize of (B, C, h, w) to `size`, align_corners=False; the identity if the sizes are equal."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)
