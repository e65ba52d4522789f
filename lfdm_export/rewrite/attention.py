"""The UNet's attention blocks rewritten for inference; activations are tokens-last, (B, T, P, C) with P = h·w."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_export.ops.cuda.dispatch import on_gpu
from lfdm_export.ops.linear_attention.gpu import attend_on_gpu, suits
from lfdm_export.ops.linear_attention.reference import head_weights
from lfdm_export.ops.spatial_attention.reference import SpatialWeights, spatial_attention
from lfdm_export.ops.symbolic import exporting
from lfdm_export.ops.temporal_attention.kernels import covers
from lfdm_export.ops.temporal_attention.reference import (
    FrameWeights,
    TemporalWeights,
    temporal_attention,
    temporal_attention_by_frame,
)
from lfdm_export.ops.temporal_attention.tables import lay_out_bias, lay_out_turns
from lfdm_models.attention import Attention, Residual, SpatialLinearAttention

_EPSILON = 1e-5
#: Widest vectors that fused attention on a GPU supports.
FUSED_WIDTH = 256


def _gamma(block: Residual) -> Tensor:
    """The scale of the block's channel layer norm, (C,)."""
    return block.fn.norm.gamma.detach().flatten()


class FoldedLinearAttention(nn.Module):
    """x + spatial linear attention, with values and output projection folded around the small context.

    With k softmaxed over the pixels, context = k (x Wv')' = (k x) Wv', so the (C-wide) input replaces the values; and
    out = Wo context' q + b, so `Wo context'` is computed once per frame. Neither the values nor the attention output
    are ever computed, and nothing is permuted by heads. The norm's scale is folded into the projections, and q's factor
    into Wo.

    k x, with k the softmax of Wk x', is an attention itself: the rows of Wk are the queries, x the keys and values. On
    a GPU it is one fused kernel, and k, 4 times as large as x on the largest map, is never written. Nor are the
    queries, which are as large: a kernel forms them, and takes them to the result.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    bias: Tensor

    def __init__(self, block: Residual) -> None:
        super().__init__()
        attention = block.fn.fn
        assert isinstance(attention, SpatialLinearAttention)
        self.heads = attention.heads
        channels = attention.to_out.out_channels
        weight = attention.to_qkv.weight.detach()[:, :, 0, 0] * _gamma(block)
        q, k, v = weight.chunk(3)
        head_width = q.shape[0] // self.heads
        out = attention.to_out.weight.detach()[:, :, 0, 0] * attention.scale
        self.register_buffer("query", q.t().contiguous())
        self.register_buffer("key", k.contiguous())
        self.register_buffer("value", v.view(self.heads, head_width, channels).transpose(1, 2).contiguous())
        self.register_buffer("out", out.t().reshape(self.heads, head_width, channels).contiguous())
        assert attention.to_out.bias is not None
        self.register_buffer("bias", attention.to_out.bias.detach())
        self.width = channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, P, C) -> the same shape; N frames are independent."""
        channels = x.shape[-1]
        head_width = self.query.shape[1] // self.heads
        normed = F.layer_norm(x, (channels,), eps=_EPSILON)
        by_kernel = not exporting() and suits(x, self.query, self.heads)
        weights = None if by_kernel else head_weights(normed, self.query, heads=self.heads)
        if on_gpu(x) and channels <= FUSED_WIDTH:
            rows = self.key.expand(x.shape[0], 1, -1, -1).contiguous()
            mixed = F.scaled_dot_product_attention(rows, normed[:, None], normed[:, None], scale=1.0)[:, 0]
        else:
            mixed = (self.key @ normed.transpose(1, 2)).softmax(dim=-1) @ normed
        context = mixed.unflatten(1, (self.heads, head_width)) @ self.value
        projection = (context @ self.out).flatten(1, 2)
        if weights is None:
            return attend_on_gpu(x, normed, self.query, projection, self.bias, heads=self.heads)
        out: Tensor = x + (weights @ projection + self.bias)
        return out


class FoldedTemporalAttention(nn.Module):
    """x + attention over time for each pixel, with constant rotary and position-bias tables."""

    #: Buffers that stay float32 in every precision.
    FLOAT32 = ("frame_turns", "frame_bias")

    frame_qkv: Tensor

    def __init__(self, block: Residual, bias: Tensor) -> None:
        super().__init__()
        attention = block.fn.fn.fn
        assert isinstance(attention, Attention)
        self.heads = attention.heads
        frames = bias.shape[-1]
        freqs = attention.rotary_emb.freqs.detach()
        angle = torch.arange(frames, dtype=freqs.dtype, device=freqs.device)[:, None] * freqs
        query, key, value = (w.t().contiguous() for w in attention.to_qkv.weight.detach().chunk(3))
        weights = TemporalWeights(
            gamma=_gamma(block),
            query=query,
            key=key,
            value=value,
            out=attention.to_out.weight.detach().t().contiguous(),
            cos=angle.cos(),
            sin=angle.sin(),
            bias=bias.detach()[None].contiguous(),
            position=torch.arange(frames)[None],
        )
        by_frame = FrameWeights(torch.cat([query, key, value], dim=1), torch.empty(0), torch.empty(0))
        head_width = query.shape[1] // self.heads
        if covers(head_width, frames):
            turns = lay_out_turns(weights.cos, weights.sin, head_width)
            by_frame = by_frame._replace(turns=turns, bias=lay_out_bias(bias.detach()))
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor)
        for name, tensor in by_frame._asdict().items():
            self.register_buffer(f"frame_{name}", tensor)

    def forward(self, x: Tensor) -> Tensor:
        """(B, P, T, C) -> the same shape."""
        out = temporal_attention(x.flatten(0, 1), self._weights, heads=self.heads, pixels=x.shape[1])
        return out.view(x.shape)

    def by_frame(self, x: Tensor) -> Tensor:
        """(B, T, P, C) -> the same shape."""
        constants = FrameWeights(*(getattr(self, f"frame_{name}") for name in FrameWeights._fields))
        return temporal_attention_by_frame(x, self._weights, constants, heads=self.heads)

    @property
    def _weights(self) -> TemporalWeights:
        return TemporalWeights(*(getattr(self, name) for name in TemporalWeights._fields))


class FoldedSpatialAttention(nn.Module):
    """x + ordinary attention over the pixels of each frame."""

    def __init__(self, block: Residual) -> None:
        super().__init__()
        attention = block.fn.fn.fn
        assert isinstance(attention, Attention)
        self.heads = attention.heads
        query, key, value = (w.t().contiguous() for w in attention.to_qkv.weight.detach().chunk(3))
        out = attention.to_out.weight.detach().t().contiguous()
        weights = SpatialWeights(_gamma(block), query, key, value, out)
        for name, tensor in weights._asdict().items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor) -> Tensor:
        """(N, P, C) -> the same shape."""
        weights = SpatialWeights(*(getattr(self, name) for name in SpatialWeights._fields))
        return spatial_attention(x, weights, heads=self.heads)
