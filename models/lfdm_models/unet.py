"""The 3-D UNet of the diffusion model.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.3. Attribute names are those of the released state dicts.
"""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_models.attention import AlongAxis, Attention, PreNorm, RelativePositionBias, Residual, SpatialLinearAttention
from lfdm_models.config import DmConfig

LATENT_CHANNELS = 3


class SinusoidalEmbedding(nn.Module):
    """Sines, then cosines, of the timestep at frequencies exp(-i ln(10000) / (width / 2 - 1))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timestep: Tensor) -> Tensor:
        """(B,) -> (B, width), in the default float dtype of the timestep's device."""
        half = self.width // 2
        frequency = torch.exp(torch.arange(half, device=timestep.device) * -(math.log(10000) / (half - 1)))
        angle = timestep[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)


class ConvBlock(nn.Module):
    """conv (1, 3, 3) -> group norm -> optional scale and shift -> SiLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, out_channels, (1, 3, 3), padding=(0, 1, 1))
        self.norm = nn.GroupNorm(8, out_channels)

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B, in, T, H, W) and two (B, out) -> (B, out, T, H, W)."""
        out = self.norm(self.proj(x))
        if scale_shift is not None:
            scale, shift = (t[:, :, None, None, None] for t in scale_shift)
            out = out * (scale + 1) + shift
        return F.silu(out)


class ResBlock(nn.Module):
    """Two conv blocks in parallel with a (projected) identity; a condition modulates the first, if there is one."""

    def __init__(self, in_channels: int, out_channels: int, condition_width: int | None = None) -> None:
        super().__init__()
        if condition_width is not None:
            self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(condition_width, 2 * out_channels))
        self.block1 = ConvBlock(in_channels, out_channels)
        self.block2 = ConvBlock(out_channels, out_channels)
        self.res_conv = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """(B, in, T, H, W) and (B, condition_width) -> (B, out, T, H, W)."""
        scale_shift = None
        if condition is not None:
            scale, shift = self.mlp(condition).chunk(2, dim=1)
            scale_shift = (scale, shift)
        out: Tensor = self.block2(self.block1(x, scale_shift)) + self.res_conv(x)
        return out


class Level(nn.ModuleList):
    """One resolution: two ResBlocks, spatial linear attention, temporal attention, and the resampling."""

    def __init__(
        self, block1: ResBlock, block2: ResBlock, spatial: Residual, temporal: Residual, resample: nn.Module
    ) -> None:
        super().__init__([block1, block2, spatial, temporal, resample])

    @property
    def blocks(self) -> tuple[ResBlock, ResBlock]:
        """Both ResBlocks, in order."""
        return cast(ResBlock, self[0]), cast(ResBlock, self[1])

    @property
    def spatial(self) -> Residual:
        """The linear attention."""
        return cast(Residual, self[2])

    @property
    def temporal(self) -> Residual:
        """The temporal attention."""
        return cast(Residual, self[3])

    @property
    def resample(self) -> nn.Module:
        """Down- or up-sampling; the identity at the coarsest, or last, level."""
        return self[4]

    def forward(self, x: Tensor, condition: Tensor, bias: Tensor) -> Tensor:
        """All except resampling: (B, in, T, H, W), (B, condition_width), (heads, T, T) -> (B, out, T, H, W)."""
        for block in self.blocks:
            x = block(x, condition)
        return cast(Tensor, self.temporal(self.spatial(x), bias))


class Head(nn.Sequential):
    """A ResBlock without condition, then a 1x1x1 conv."""

    def __init__(self, in_channels: int, width: int, out_channels: int) -> None:
        super().__init__(ResBlock(in_channels, width), nn.Conv3d(width, out_channels, 1))

    @property
    def block(self) -> ResBlock:
        """The ResBlock."""
        return cast(ResBlock, self[0])

    @property
    def conv(self) -> nn.Conv3d:
        """The last conv."""
        return cast(nn.Conv3d, self[1])


class Unet3D(nn.Module):
    """Noisy latent, feature, timestep and text embedding -> predicted noise."""

    null_cond_emb: Tensor

    def __init__(self, config: DmConfig) -> None:
        super().__init__()
        self.config = config
        width, widths = config.width, config.level_widths
        time_width = 4 * width
        condition = time_width + config.text_width
        levels = list(zip((width, *widths[:-1]), widths, strict=True))

        def temporal(channels: int) -> Residual:
            attention = Attention(channels, config.heads, config.head_width, config.rotary_width)
            return Residual(PreNorm(channels, AlongAxis(attention, "time")))

        def linear(channels: int) -> Residual:
            return Residual(PreNorm(channels, SpatialLinearAttention(channels, config.heads, config.head_width)))

        def level(in_channels: int, channels: int, resample: nn.Module) -> Level:
            blocks = ResBlock(in_channels, channels, condition), ResBlock(channels, channels, condition)
            return Level(*blocks, linear(channels), temporal(channels), resample)

        self.time_rel_pos_bias = RelativePositionBias(config.position_buckets, config.heads)
        self.init_conv = nn.Conv3d(LATENT_CHANNELS + config.feature_channels, width, (1, 7, 7), padding=(0, 3, 3))
        self.init_temporal_attn = temporal(width)
        self.time_mlp = nn.Sequential(
            SinusoidalEmbedding(width), nn.Linear(width, time_width), nn.GELU(), nn.Linear(time_width, time_width)
        )
        if config.learned_null:
            self.null_cond_emb = nn.Parameter(torch.randn(1, config.text_width))
        else:
            self.register_buffer("null_cond_emb", torch.zeros(1, config.text_width), persistent=False)

        deepest = len(levels) - 1
        self.downs = nn.ModuleList(
            level(a, b, nn.Identity() if i == deepest else _downsample(b)) for i, (a, b) in enumerate(levels)
        )
        middle = widths[-1]
        self.mid_block1 = ResBlock(middle, middle, condition)
        spatial = Attention(middle, config.heads, config.head_width, None)
        self.mid_spatial_attn = Residual(PreNorm(middle, AlongAxis(spatial, "space")))
        self.mid_temporal_attn = temporal(middle)
        self.mid_block2 = ResBlock(middle, middle, condition)
        self.ups = nn.ModuleList(
            level(2 * b, a, nn.Identity() if i == deepest else _upsample(a, config.upsample))
            for i, (a, b) in enumerate(reversed(levels))
        )
        self.final_conv = Head(2 * width, width, 2)
        self.occlusion_map = Head(2 * width, width, 1)

    @property
    def down_levels(self) -> list[Level]:
        """Levels, finest first."""
        return cast(list[Level], list(self.downs))

    @property
    def up_levels(self) -> list[Level]:
        """Levels, coarsest first."""
        return cast(list[Level], list(self.ups))

    def forward(self, noisy_latent: Tensor, feature: Tensor, text_embedding: Tensor, timestep: Tensor) -> Tensor:
        """One evaluation.

        Args:
            noisy_latent: (B, 3, T, h, w).
            feature: the LFAE's (B, feature_channels, h, w).
            text_embedding: (B, text_width), or the null embedding.
            timestep: (B,) in 0 .. training_steps - 1.

        Returns:
            The predicted noise, (B, 3, T, h, w).
        """
        frames = noisy_latent.shape[2]
        bias = self.time_rel_pos_bias(frames)
        repeated = feature[:, :, None].expand(-1, -1, frames, -1, -1)
        x = self.init_conv(torch.cat([noisy_latent, repeated], dim=1))
        first = x
        x = self.init_temporal_attn(x, bias)
        condition = torch.cat([self.time_mlp(timestep.to(noisy_latent.dtype)), text_embedding], dim=1)

        kept = []
        for level in self.down_levels:
            x = level(x, condition, bias)
            kept.append(x)
            x = level.resample(x)
        x = self.mid_block1(x, condition)
        x = self.mid_temporal_attn(self.mid_spatial_attn(x), bias)
        x = self.mid_block2(x, condition)
        for level in self.up_levels:
            x = level.resample(level(torch.cat([x, kept.pop()], dim=1), condition, bias))
        x = torch.cat([x, first], dim=1)
        return torch.cat([self.final_conv(x), self.occlusion_map(x)], dim=1)

    def guided(
        self, noisy_latent: Tensor, feature: Tensor, text_embedding: Tensor, timestep: Tensor, guidance_scale: float
    ) -> Tensor:
        """Classifier-free guidance: 1 is the conditional prediction alone, 0 is the unconditional one alone."""
        null = self.null_cond_emb.expand_as(text_embedding)
        if guidance_scale == 0:
            unconditional: Tensor = self(noisy_latent, feature, null, timestep)
            return unconditional
        conditional: Tensor = self(noisy_latent, feature, text_embedding, timestep)
        if guidance_scale == 1:
            return conditional
        unconditional = self(noisy_latent, feature, null, timestep)
        return unconditional + guidance_scale * (conditional - unconditional)


def _downsample(channels: int) -> nn.Module:
    return nn.Conv3d(channels, channels, (1, 4, 4), (1, 2, 2), (0, 1, 1))


def _upsample(channels: int, mode: str) -> nn.Module:
    if mode == "deconv":
        return nn.ConvTranspose3d(channels, channels, (1, 4, 4), (1, 2, 2), (0, 1, 1))
    return nn.Sequential(
        nn.Upsample(scale_factor=(1, 2, 2), mode="nearest"),
        nn.Conv3d(channels, channels, (1, 3, 3), padding=(0, 1, 1), padding_mode="reflect"),
    )
