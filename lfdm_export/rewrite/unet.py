"""The 3-D UNet rewritten for inference: 2-D convolutions over (B·T, C, h, w), folded tables, shared branches.

Every convolution of the network has a kernel of 1 in time, so frames are folded into the batch; every backend runs 2-D
convolutions best. Each rewrite is exact up to rounding, and is tested against the untouched network in float64.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_export.ops.cuda.dispatch import on_gpu
from lfdm_export.ops.group_norm_silu.reference import group_norm_silu
from lfdm_export.ops.small_conv.reference import small_conv, suits_small_conv
from lfdm_export.ops.temporal_attention.reference import goes_by_frame
from lfdm_export.rewrite.attention import FoldedLinearAttention, FoldedSpatialAttention, FoldedTemporalAttention
from lfdm_export.rewrite.convolution import (
    fixed_conv,
    fold_time,
    interleave,
    phase_convs,
    phase_kernels,
    transposed_phase_kernels,
)
from lfdm_models.unet import LATENT_CHANNELS, ConvBlock, Level, ResBlock, Unet3D


class DoublingConv(nn.Module):
    """Doubles a map by four 2x2 convolutions at its own resolution, one for each phase of the result.

    It replaces nearest x2 with a reflect-padded 3x3 convolution: a reflected border pixel of the upsampled map is a
    copy of the border pixel of the low-resolution map, so its padding becomes replication. It also replaces a
    transposed 4x4 convolution of stride 2, with zero padding. (Transposed convolutions have no bfloat16 kernel in
    TensorRT for RTX 1.7, and int8 kernels in few backends.)
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: nn.Conv3d | nn.ConvTranspose3d) -> None:
        super().__init__()
        assert conv.bias is not None
        weight = conv.weight.detach()[:, :, 0]
        transposed = isinstance(conv, nn.ConvTranspose3d)
        self.register_buffer("weight", transposed_phase_kernels(weight) if transposed else phase_kernels(weight))
        self.register_buffer("bias", conv.bias.detach())
        self.padding_mode = "constant" if transposed else "replicate"

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C', 2h, 2w)."""
        return interleave(phase_convs(x, self.weight, self.bias, padding_mode=self.padding_mode))


class FoldedConvBlock(nn.Module):
    """conv -> group norm over the clip -> scale and shift -> SiLU; norm, scale and shift are one affine map."""

    gamma: Tensor
    beta: Tensor

    def __init__(self, block: ConvBlock, frames: int) -> None:
        super().__init__()
        self.conv = fold_time(block.proj)
        self.frames, self.groups = frames, block.norm.num_groups
        self.register_buffer("gamma", block.norm.weight.detach())
        self.register_buffer("beta", block.norm.bias.detach())

    def forward(
        self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """(B·T, in, h, w), two (B, out) and a residual of the result's shape -> (B·T, out, h, w)."""
        if suits_small_conv(x, self.conv.weight):
            assert self.conv.bias is not None
            out = small_conv(x, self.conv.weight, self.conv.bias)
        else:
            out = self.conv(x)
        return group_norm_silu(
            out, self.gamma, self.beta, scale_shift, residual, frames=self.frames, groups=self.groups
        )


class FoldedResBlock(nn.Module):
    """Two conv blocks in parallel with a (projected) identity."""

    def __init__(self, block: ResBlock, frames: int) -> None:
        super().__init__()
        self.block1 = FoldedConvBlock(block.block1, frames)
        self.block2 = FoldedConvBlock(block.block2, frames)
        self.res_conv = fold_time(block.res_conv) if isinstance(block.res_conv, nn.Conv3d) else None
        self.channels = block.block2.proj.out_channels

    def forward(self, x: Tensor, scale_shift: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """(B·T, in, h, w) and two (B, out) -> (B·T, out, h, w)."""
        if on_gpu(x):  # where the norm's kernel also adds
            residual = x if self.res_conv is None else self.res_conv(x)
            fused: Tensor = self.block2(self.block1(x, scale_shift), residual=residual)
            return fused
        out: Tensor = self.block2(self.block1(x, scale_shift))
        return out + (x if self.res_conv is None else self.res_conv(x))


class FoldedLevel(nn.Module):
    """One level: two ResBlocks, linear attention, temporal attention."""

    def __init__(self, level: Level, bias: Tensor) -> None:
        super().__init__()
        frames = bias.shape[-1]
        self.block1, self.block2 = (FoldedResBlock(block, frames) for block in level.blocks)
        self.spatial = FoldedLinearAttention(level.spatial)
        self.temporal = FoldedTemporalAttention(level.temporal, bias)
        self.frames = frames

    def forward(self, x: Tensor, modulation: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(B·T, in, h, w) -> (B·T, out, h, w); removes two entries from the modulation."""
        x = self.block2(self.block1(x, modulation.pop(0)), modulation.pop(0))
        height, width = x.shape[2:]
        tokens = self.spatial(x.flatten(2).transpose(1, 2))
        return _over_time(self.temporal, tokens, self.frames, height, width)


def _over_time(temporal: FoldedTemporalAttention, tokens: Tensor, frames: int, height: int, width: int) -> Tensor:
    """Run temporal attention on (B·T, P, C) tokens -> (B·T, C, h, w)."""
    pixels, channels = tokens.shape[1:]
    clips = tokens.view(-1, frames, pixels, channels)
    if goes_by_frame(tokens):  # tokens stay in the channels-last layout of convolutions
        return temporal.by_frame(clips).reshape(-1, height, width, channels).permute(0, 3, 1, 2)
    out: Tensor = temporal(clips.transpose(1, 2))
    return out.permute(0, 2, 3, 1).reshape(-1, channels, height, width)


class DeployableUnet(nn.Module):
    """The UNet after `context`, with frames folded into the batch.

    Args:
        unet: the faithful network; weights that no rewrite changes are shared, not copied.
        frames: T, fixed by this constructor.
        guided: evaluate with and without the text in one pass. Both branches share everything up to
            `init_temporal_attn`, which does not depend on the text.
    """

    null_embedding: Tensor

    def __init__(self, unet: Unet3D, frames: int, *, guided: bool = False) -> None:
        super().__init__()
        self.frames, self.guided = frames, guided
        bias = unet.time_rel_pos_bias(frames).detach()
        self.latent_conv = latent_half(unet.init_conv)
        self.init_temporal = FoldedTemporalAttention(unet.init_temporal_attn, bias)
        self.time_mlp = unet.time_mlp
        self.register_buffer("null_embedding", unet.null_cond_emb.detach())
        self.downs = nn.ModuleList(FoldedLevel(level, bias) for level in unet.down_levels)
        self.ups = nn.ModuleList(FoldedLevel(level, bias) for level in unet.up_levels)
        self.resample_down = nn.ModuleList(_fold_resample(level.resample) for level in unet.down_levels)
        self.resample_up = nn.ModuleList(_fold_resample(level.resample) for level in unet.up_levels)
        self.mid_block1 = FoldedResBlock(unet.mid_block1, frames)
        self.mid_spatial = FoldedSpatialAttention(unet.mid_spatial_attn)
        self.mid_temporal = FoldedTemporalAttention(unet.mid_temporal_attn, bias)
        self.mid_block2 = FoldedResBlock(unet.mid_block2, frames)
        heads = (unet.final_conv, unet.occlusion_map)
        self.final_blocks = nn.ModuleList(FoldedResBlock(head.block, frames) for head in heads)
        self.final_convs = nn.ModuleList(fold_time(head.conv) for head in heads)
        self.modulation = FoldedModulation(unet)
        self.guidance = Guidance()

    def forward(
        self,
        noisy_latent: Tensor,
        context: Tensor,
        text_embedding: Tensor,
        timestep: Tensor,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """One evaluation.

        Args:
            noisy_latent: (B, 3, T, h, w).
            context: (B, width, h, w), `init_conv`'s response to the feature, from `encode`.
            text_embedding: (B, text_width).
            timestep: (B,) int64.
            guidance_scale: (B,), if `guided`.

        Returns:
            The predicted noise, (B, 3, T, h, w), with the weights' dtype (float32 at least, if `guided`).
        """
        batch, _, frames, height, width = noisy_latent.shape
        dtype = self.latent_conv.weight.dtype
        x = self.latent_conv(noisy_latent.to(dtype).transpose(1, 2).reshape(-1, LATENT_CHANNELS, height, width))
        channels = x.shape[1]
        clip = x.view(batch, frames, channels, height, width) + context[:, None].to(dtype)
        x = clip.view(-1, channels, height, width)
        first = x
        x = _over_time(self.init_temporal, x.flatten(2).transpose(1, 2), frames, height, width)
        # In lower precision these layers stay float32: bfloat16 cannot represent all timesteps.
        time = self.time_mlp(timestep.to(cast(nn.Linear, self.time_mlp[1]).weight.dtype))
        if self.guided:
            first, x, time = first.repeat(2, 1, 1, 1), x.repeat(2, 1, 1, 1), time.repeat(2, 1)
            text_embedding = torch.cat([text_embedding, self.null_embedding.expand(batch, -1)])
        modulation = self.modulation(torch.cat([time, text_embedding], dim=1))

        kept = []
        for level, resample in zip(self.downs, self.resample_down, strict=True):
            x = level(x, modulation)
            kept.append(x)
            x = resample(x)
        x = self.mid_block1(x, modulation.pop(0))
        size = x.shape[2:]
        tokens = self.mid_spatial(x.flatten(2).transpose(1, 2))
        x = _over_time(self.mid_temporal, tokens, frames, *size)
        x = self.mid_block2(x, modulation.pop(0))
        for level, resample in zip(self.ups, self.resample_up, strict=True):
            x = resample(level(torch.cat([x, kept.pop()], dim=1), modulation))
        x = torch.cat([x, first], dim=1)
        outputs = [conv(block(x)) for block, conv in zip(self.final_blocks, self.final_convs, strict=True)]
        noise = torch.cat(outputs, dim=1).view(-1, frames, LATENT_CHANNELS, height, width).transpose(1, 2)
        return noise.contiguous() if guidance_scale is None else self.guidance(noise, guidance_scale)


class Guidance(nn.Module):
    """Classifier-free guidance. A separate module, so that its nodes can be distinguished from the network's."""

    def forward(self, noise: Tensor, scale: Tensor) -> Tensor:
        """Predictions with, then without the text (2·B, 3, T, h, w), and scales (B,) -> (B, 3, T, h, w)."""
        conditional, unconditional = noise.reshape(2, -1, *noise.shape[1:]).unbind()
        return unconditional + scale[:, None, None, None, None] * (conditional - unconditional)


class FoldedModulation(nn.Module):
    """The scales and shifts of all ResBlocks from the condition, in one product."""

    weight: Tensor
    bias: Tensor

    def __init__(self, unet: Unet3D) -> None:
        super().__init__()
        blocks = [block for level in unet.down_levels for block in level.blocks]
        blocks += [unet.mid_block1, unet.mid_block2]
        blocks += [block for level in unet.up_levels for block in level.blocks]
        linears = [cast(nn.Linear, block.mlp[1]) for block in blocks]
        self.register_buffer("weight", torch.cat([linear.weight.detach() for linear in linears]))
        self.register_buffer("bias", torch.cat([linear.bias.detach() for linear in linears]))
        self.widths = [linear.out_features // 2 for linear in linears]

    def forward(self, condition: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, condition_width) -> scale and shift of each block in the order of use, (B, C) each."""
        halves = [width for width in self.widths for _ in range(2)]
        parts = F.linear(F.silu(condition).to(self.weight.dtype), self.weight, self.bias).split(halves, dim=1)
        return list(zip(parts[::2], parts[1::2], strict=True))


def latent_half(init_conv: nn.Conv3d) -> nn.Conv2d:
    """The part of `init_conv` for the noisy latent, without bias (which is in `context`)."""
    padding = cast(tuple[int, int], init_conv.padding[1:])
    return fixed_conv(init_conv.weight.detach()[:, :LATENT_CHANNELS, 0], None, padding=padding)


def context_half(init_conv: nn.Conv3d) -> nn.Conv2d:
    """The part of `init_conv` for the feature, with the bias: the same for every frame and step."""
    padding = cast(tuple[int, int], init_conv.padding[1:])
    assert init_conv.bias is not None
    return fixed_conv(init_conv.weight.detach()[:, LATENT_CHANNELS:, 0], init_conv.bias.detach(), padding=padding)


def _fold_resample(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.Sequential):
        return DoublingConv(cast(nn.Conv3d, module[1]))
    if isinstance(module, nn.ConvTranspose3d):
        return DoublingConv(module)
    return fold_time(module) if isinstance(module, nn.Conv3d) else module
