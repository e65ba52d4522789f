"""A prototype: the core of temporal attention as one Triton kernel; not part of the product.

Rotation, relative position bias, softmax and the product with the values, on queries, keys and values as one matrix
product gives them, (B, T, P, 3·H·D): nothing is transposed and nothing between is written. Needs triton; with
TRITON_INTERPRET=1 it runs on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _core(  # type: ignore[no-untyped-def]
    QKV, COS, SIN, BIAS, OUT, P, scale,
    T: tl.constexpr, H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per pixel, head and sample; BLOCK is a power of two that holds T frames."""
    pixel, head, sample = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    t, d = tl.arange(0, BLOCK), tl.arange(0, D)
    known, column = (t < T)[:, None], (t < T)[None, :]
    row = ((sample * T + t) * P + pixel) * (3 * H * D)
    own = row[:, None] + head * D + d[None, :]
    partner = row[:, None] + head * D + (d ^ 1)[None, :]
    angle = t[:, None] * (D // 2) + (d // 2)[None, :]
    c = tl.load(COS + angle, mask=known, other=0.0).to(tl.float32)
    s = tl.load(SIN + angle, mask=known, other=0.0).to(tl.float32)
    s = tl.where((d % 2 == 0)[None, :], -s, s)
    q = tl.load(QKV + own, mask=known, other=0.0).to(tl.float32) * c
    q += tl.load(QKV + partner, mask=known, other=0.0).to(tl.float32) * s
    k = tl.load(QKV + own + H * D, mask=known, other=0.0).to(tl.float32) * c
    k += tl.load(QKV + partner + H * D, mask=known, other=0.0).to(tl.float32) * s
    v = tl.load(QKV + own + 2 * H * D, mask=known, other=0.0)
    bias = tl.load(BIAS + (head * T + t[:, None]) * T + t[None, :], mask=known & column, other=float("-inf"))
    # Rows beyond T are not stored; zeros keep them finite.
    bias = tl.where(known, bias.to(tl.float32), tl.where(column, 0.0, float("-inf")))
    weights = tl.dot(q.to(v.dtype), tl.trans(k.to(v.dtype))) * scale + bias
    weights = tl.exp(weights - tl.max(weights, 1)[:, None])
    weights = weights / tl.sum(weights, 1)[:, None]
    attended = tl.dot(weights.to(v.dtype), v)
    target = ((sample * T + t) * P + pixel)[:, None] * (H * D) + head * D + d[None, :]
    tl.store(OUT + target, attended.to(v.dtype), mask=known)


def temporal_core(qkv: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Attention over the frames of each pixel, between the projections.

    Args:
        qkv: (B, T, P, 3·H·D), dense: queries, keys and values, of each the heads in order.
        cos: rotary table (T, D / 2) float32, for interleaved pairs.
        sin: likewise.
        bias: (1, H, T, T), [query, key].
        heads: H.

    Returns:
        (B, T, P, H·D) of the dtype of `qkv`.
    """
    batch, frames, pixels, width = qkv.shape
    size = width // (3 * heads)
    result = torch.empty(batch, frames, pixels, heads * size, dtype=qkv.dtype, device=qkv.device)
    _core[(pixels, heads, batch)](
        qkv, cos, sin, bias, result, pixels, size**-0.5,
        T=frames, H=heads, D=size, BLOCK=max(16, triton.next_power_of_2(frames)),
    )  # fmt: skip
    return result
