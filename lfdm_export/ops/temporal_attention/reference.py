"""TemporalAttention in torch; inside an ONNX export it adds a node of domain `lfdm` instead.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.3; rotary embedding of Su et al. (arXiv 2104.09864).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lfdm_export.ops.cuda.dispatch import on_gpu
from lfdm_export.ops.domain import EPSILON
from lfdm_export.ops.symbolic import Attributes, exporting, node
from lfdm_export.ops.temporal_attention import operator_name

#: Tokens (pixels x frames) of one sample whose queries, keys and values are processed together, so that they stay in a
#: core's cache. Measured: 8 to 32 pixels at 40 frames are equally fast.
CHUNK_TOKENS = 1280


class TemporalWeights(NamedTuple):
    """Constants of one block; H heads of D channels, R of which are rotated.

    Attributes:
        gamma: scale of the layer norm, (C,).
        query, key, value: (C, H·D).
        out: (H·D, C).
        cos, sin: rotary tables (T, R / 2), for interleaved pairs.
        bias: relative position bias (1, H, T, T), [query, key].
        position: 0 … T - 1, (1, T) int64.
    """

    gamma: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor
    cos: Tensor
    sin: Tensor
    bias: Tensor
    position: Tensor


class FrameWeights(NamedTuple):
    """The same block's constants for `temporal_attention_by_frame`.

    Attributes:
        qkv: weights of queries, keys and values side by side, (C, 3·H·D).
        turns: cos and sin from `tables.lay_out_turns`, float32; empty where no kernel supports them.
        bias: from `tables.lay_out_bias`, float32; empty in the same cases.
    """

    qkv: Tensor
    turns: Tensor
    bias: Tensor


def goes_by_frame(x: Tensor) -> bool:
    """Whether to use `temporal_attention_by_frame`: on a GPU, except in an export."""
    return on_gpu(x) and not exporting()


def temporal_attention(x: Tensor, weights: TemporalWeights, *, heads: int, pixels: int) -> Tensor:
    """X + attention over the frames of each pixel.

    Args:
        x: (B·P, T, C).
        weights: the block's constants.
        heads: H.
        pixels: P, which determines the number of chunks.

    Returns:
        (B·P, T, C).
    """
    if exporting():
        chunks = min(-(-pixels * x.shape[1] // CHUNK_TOKENS), pixels)
        attributes: Attributes = {"heads": heads, "rotary_width": 2 * weights.cos.shape[-1], "chunks": chunks}
        return node(operator_name(chunks), [x, *weights], attributes, [tuple(x.shape)])[0]
    normed = F.layer_norm(x, x.shape[-1:], weights.gamma, eps=EPSILON)
    q, k, v = (
        (normed @ w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (weights.query, weights.key, weights.value)
    )
    q, k = rotate(q, weights.cos, weights.sin), rotate(k, weights.cos, weights.sin)
    attended = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + weights.bias).softmax(dim=-1) @ v
    out: Tensor = x + attended.transpose(1, 2).flatten(2) @ weights.out
    return out


def temporal_attention_by_frame(x: Tensor, weights: TemporalWeights, by_frame: FrameWeights, *, heads: int) -> Tensor:
    """The same for frames in the layout of channels-last convolutions; with a kernel, nothing is transposed.

    Args:
        x: (B, T, P, C).
        weights: the block's constants.
        by_frame: the same constants in the layout for this function.
        heads: H.

    Returns:
        (B, T, P, C).
    """
    from lfdm_export.ops.temporal_attention.gpu import core_on_gpu, suits_core

    qkv = F.layer_norm(x, x.shape[-1:], weights.gamma, eps=EPSILON) @ by_frame.qkv
    if suits_core(qkv, heads):
        attended = core_on_gpu(qkv, by_frame.turns, by_frame.bias, heads=heads)
    else:
        attended = core_in_torch(qkv, weights.cos, weights.sin, weights.bias, heads=heads)
    return x + attended @ weights.out


def core_in_torch(qkv: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, *, heads: int) -> Tensor:
    """Rotary embedding and attention with torch's own operators, for any type, width and number of frames.

    Args:
        qkv: (B, T, P, 3·H·D): queries, keys and values, each with its heads in order.
        cos: rotary table (T, R / 2), for interleaved pairs.
        sin: rotary table (T, R / 2).
        bias: relative position bias (1, H, T, T), [query, key].
        heads: H.

    Returns:
        (B, T, P, H·D).
    """
    batch, _, pixels, _ = qkv.shape
    q, k, v = (part.unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(0, 1) for part in qkv.chunk(3, dim=-1))
    # For so few tokens, torch's first choice, cuDNN, takes 1.9 times as long (measured on an H200, 40 frames, float16).
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, attn_mask=bias)
    out: Tensor = attended.unflatten(0, (batch, pixels)).permute(0, 3, 1, 2, 4).flatten(3)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs of (…, T, D) by the tables' angles; channels beyond the tables pass unchanged."""
    rotated, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]
    pairs = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
    return torch.cat([pairs.flatten(-2), rest], dim=-1)
