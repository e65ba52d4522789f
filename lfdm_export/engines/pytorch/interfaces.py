"""Modules around the deployable ones, with the inputs and outputs that callers of a stage see."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfdm_export.rewrite.lfae import Decode


class FloatDecode(nn.Module):
    """`Decode` with float32 skips."""

    def __init__(self, decode: Decode) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, image: Tensor, *skips_and_latent: Tensor) -> tuple[Tensor, Tensor]:
        """As `Decode`, all float32."""
        *skips, latent = skips_and_latent
        frames, warped = self.decode(image, *(skip.to(self.decode.final.dtype) for skip in skips), latent)
        return frames, warped


class PictureDecode(nn.Module):
    """`Decode` with 8-bit pictures as outputs: clamped to [0, 1], times 255, truncated.

    Source: the rule of `lfdm_export.pictures.preprocess.to_uint8`.
    """

    def __init__(self, decode: Decode) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, image: Tensor, *skips_and_latent: Tensor) -> tuple[Tensor, Tensor]:
        """As `Decode`; skips have the dtype of the weights. -> frames and warped images (B, F, H, W, 3) uint8."""
        frames, warped = self.decode(image, *skips_and_latent)
        return _pictures(frames), _pictures(warped)


def _pictures(images: Tensor) -> Tensor:
    """(B, 3, F, H, W) -> (B, F, H, W, 3) uint8."""
    return (images.permute(0, 2, 3, 4, 1).clamp(0, 1) * 255).to(torch.uint8).contiguous()
