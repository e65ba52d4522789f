"""Losses of the LFAE: similarity of two images at several scales.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.2, after Johnson et al., Perceptual Losses for
Real-Time Style Transfer (arXiv 1603.08155).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_models.layers import AntiAliasDownsample
from lfdm_models.training.vgg import Vgg19

#: Scales 1/n of the original size.
SCALES = (1, 2, 4, 8)


class Pyramid(nn.Module):
    """An image at several scales, each blurred before subsampling."""

    def __init__(self, scales: Sequence[int] = SCALES, channels: int = 3) -> None:
        super().__init__()
        # Kernel size for stride s, as in the networks' own anti-aliasing.
        self.downs = nn.ModuleList(AntiAliasDownsample(channels, 4 * (s - 1) + 1, s) for s in scales)

    def forward(self, image: Tensor) -> list[Tensor]:
        """(B, C, H, W) -> (B, C, H / s, W / s) per scale."""
        return [down(image) for down in self.downs]


class PerceptualLoss(nn.Module):
    """Mean absolute difference of VGG-19's activations, summed over its five blocks and the scales."""

    def __init__(self, vgg: Vgg19, *, weight: float = 10.0, scales: Sequence[int] = SCALES) -> None:
        """Compare with `vgg`; every activation at every scale has the weight `weight`."""
        super().__init__()
        self.vgg, self.weight = vgg, weight
        self.pyramid = Pyramid(scales)

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] -> a number; gradients flow to `found`."""
        with torch.no_grad():
            targets = [self.vgg(image) for image in self.pyramid(wanted.detach())]
        total = found.new_zeros(())
        for image, target in zip(self.pyramid(found), targets, strict=True):
            for activation, expected in zip(self.vgg(image), target, strict=True):
                total = total + (activation - expected).abs().mean()
        return self.weight * total


class PyramidLoss(nn.Module):
    """A loss without a trained network: absolute differences of colors and of their gradients, at several scales.

    It replaces the perceptual loss if VGG-19's weights are not available. Coarse scales carry the gradient where
    objects moved further than their own size; differences between neighbors keep edges sharp, which colors alone would
    blur.
    """

    def __init__(self, *, weight: float = 25.0, edge: float = 1.0, scales: Sequence[int] = SCALES) -> None:
        """Every scale has the weight `weight`; differences between neighbors count `edge` times as much as colors."""
        super().__init__()
        self.weight, self.edge = weight, edge
        self.pyramid = Pyramid(scales)

    def forward(self, found: Tensor, wanted: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [0, 1] -> a number."""
        total = found.new_zeros(())
        for image, target in zip(self.pyramid(found), self.pyramid(wanted.detach()), strict=True):
            difference = image - target
            total = total + difference.abs().mean() + self.edge * _edges(difference)
        return self.weight * total


def _edges(difference: Tensor) -> Tensor:
    """Mean absolute difference between neighbors along both axes of (B, C, H, W)."""
    down = F.l1_loss(difference[..., 1:, :], difference[..., :-1, :])
    across = F.l1_loss(difference[..., 1:], difference[..., :-1])
    return (down + across) / 2
