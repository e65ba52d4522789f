"""Attention blocks of the diffusion model, on activations (B, C, T, H, W).

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.3. Attribute names (nested `fn`) are those of the released
state dicts.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn


class ChannelLayerNorm(nn.Module):
    """Layer norm over the channels of (B, C, T, H, W), with scale, without shift."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(1, channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        variance = torch.var(x, dim=1, unbiased=False, keepdim=True)
        return (x - x.mean(dim=1, keepdim=True)) / torch.sqrt(variance + 1e-5) * self.gamma


class RelativePositionBias(nn.Module):
    """A learned bias per head and bucket of distances between frames."""

    def __init__(self, buckets: int, heads: int) -> None:
        super().__init__()
        self.buckets = buckets
        self.relative_attention_bias = nn.Embedding(buckets, heads)
        half = buckets // 2
        exact = half // 2
        # Parity: in float32, as released; distance 16 is in bucket 12 (of 0 .. 15).
        size = torch.arange(1, 4 * exact + 1, device="cpu")
        share = torch.log(size.float() / exact) / math.log(4) * (half - exact)
        self._far = [int(size[share >= step][0]) for step in range(1, half - exact)]

    def bucket(self, frames: int) -> Tensor:
        """Bucket of each (query, key) pair, (T, T) int64.

        With n = query - key, half of the buckets are for n < 0. Each half has one bucket per distance below a quarter
        of all buckets, then logarithmic buckets up to 4 times that.
        """
        half = self.buckets // 2
        exact = half // 2
        # On the weights' device, with numbers from the host: a CUDA graph cannot record copies from the host.
        position = torch.arange(frames, device=self.relative_attention_bias.weight.device)
        distance = position[:, None] - position[None, :]
        size = distance.abs()
        bucket = size.clamp(max=exact)
        for first in self._far:
            bucket = bucket + (size >= first)
        return torch.where(distance < 0, half, 0) + bucket

    def forward(self, frames: int) -> Tensor:
        """Number of frames -> bias (heads, T, T), indexed [head, query, key]."""
        bias: Tensor = self.relative_attention_bias(self.bucket(frames))
        return bias.permute(2, 0, 1)


class Rotary(nn.Module):
    """Rotary position embedding over frames, on interleaved pairs of channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.freqs = nn.Parameter(10000.0 ** (-torch.arange(0, width, 2).float() / width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., T, head_width) -> the same shape; channels beyond `width` pass unchanged."""
        width = 2 * self.freqs.shape[0]
        position = torch.arange(x.shape[-2], dtype=self.freqs.dtype, device=x.device)
        angle = (position[:, None] * self.freqs).repeat_interleave(2, dim=-1)
        rotated, rest = x[..., :width], x[..., width:]
        even, odd = rotated[..., 0::2], rotated[..., 1::2]
        turned = torch.stack([-odd, even], dim=-1).flatten(-2)
        return torch.cat([rotated * angle.cos() + turned * angle.sin(), rest], dim=-1)


class Attention(nn.Module):
    """Softmax attention over the second-last axis, with optional rotary embedding and bias."""

    def __init__(self, channels: int, heads: int, head_width: int, rotary_width: int | None) -> None:
        super().__init__()
        self.heads = heads
        self.scale = head_width**-0.5
        if rotary_width is not None:
            self.rotary_emb = Rotary(rotary_width)
        self.rotary = rotary_width is not None
        self.to_qkv = nn.Linear(channels, 3 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, channels, bias=False)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., N, C) tokens and bias (heads, N, N) -> (..., N, C)."""
        q, k, v = (rearrange(t, "... n (h d) -> ... h n d", h=self.heads) for t in self.to_qkv(x).chunk(3, dim=-1))
        q = q * self.scale
        if self.rotary:
            q, k = self.rotary_emb(q), self.rotary_emb(k)
        logits = q @ k.transpose(-1, -2)
        if bias is not None:
            logits = logits + bias
        out = logits.softmax(dim=-1) @ v
        result: Tensor = self.to_out(rearrange(out, "... h n d -> ... n (h d)"))
        return result


class SpatialLinearAttention(nn.Module):
    """Linear attention over the pixels of each frame."""

    def __init__(self, channels: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = head_width**-0.5
        self.to_qkv = nn.Conv2d(channels, 3 * heads * head_width, 1, bias=False)
        self.to_out = nn.Conv2d(heads * head_width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        batch, _, _, height, _ = x.shape
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = (rearrange(t, "n (g d) h w -> n g d (h w)", g=self.heads) for t in self.to_qkv(frames).chunk(3, 1))
        q = q.softmax(dim=-2) * self.scale
        k = k.softmax(dim=-1)
        context = k @ v.transpose(-1, -2)
        out: Tensor = context.transpose(-1, -2) @ q
        out = self.to_out(rearrange(out, "n g d (h w) -> n (g d) h w", h=height))
        return rearrange(out, "(b t) c h w -> b c t h w", b=batch)


class AlongAxis(nn.Module):
    """Applies `fn` to tokens along time (per pixel) or over the pixels of a frame."""

    def __init__(self, fn: Attention, axis: str) -> None:
        super().__init__()
        self.fn = fn
        self.axis = axis

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        height = x.shape[3]
        if self.axis == "time":
            out: Tensor = self.fn(rearrange(x, "b c t h w -> b (h w) t c"), bias)
            return rearrange(out, "b (h w) t c -> b c t h w", h=height)
        out = self.fn(rearrange(x, "b c t h w -> b t (h w) c"), bias)
        return rearrange(out, "b t (h w) c -> b c t h w", h=height)


class PreNorm(nn.Module):
    """fn(norm(x))."""

    def __init__(self, channels: int, fn: AlongAxis | SpatialLinearAttention) -> None:
        super().__init__()
        self.norm = ChannelLayerNorm(channels)
        self.fn = fn

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        normed = self.norm(x)
        return cast(Tensor, self.fn(normed) if isinstance(self.fn, SpatialLinearAttention) else self.fn(normed, bias))


class Residual(nn.Module):
    """x + fn(x)."""

    def __init__(self, fn: PreNorm) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(B, C, T, H, W) -> the same shape."""
        out: Tensor = x + self.fn(x, bias)
        return out
