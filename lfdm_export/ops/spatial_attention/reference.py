"""SpatialAttention in torch; inside an ONNX export it adds a node of domain `lfdm` instead.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.3; attention of Vaswani et al. (arXiv 1706.03762).
"""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from lfdm_export.ops.cuda.dispatch import on_gpu
from lfdm_export.ops.domain import EPSILON
from lfdm_export.ops.symbolic import exporting, node


class SpatialWeights(NamedTuple):
    """Constants of the block; H heads of D channels.

    Attributes:
        gamma: scale of the layer norm, (C,).
        query, key, value: (C, H·D).
        out: (H·D, C).
    """

    gamma: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    out: Tensor


def spatial_attention(x: Tensor, weights: SpatialWeights, *, heads: int) -> Tensor:
    """X + attention over the pixels of each frame.

    Args:
        x: (N, P, C); frames are independent.
        weights: the block's constants.
        heads: H.

    Returns:
        (N, P, C).
    """
    if exporting():
        return node("SpatialAttention", [x, *weights], {"heads": heads}, [tuple(x.shape)])[0]
    normed = F.layer_norm(x, x.shape[-1:], weights.gamma, eps=EPSILON)
    q, k, v = (
        (normed @ w).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (weights.query, weights.key, weights.value)
    )
    if on_gpu(x):  # one fused kernel
        attended = F.scaled_dot_product_attention(q, k, v)
    else:
        attended = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(dim=-1) @ v
    return x + attended.transpose(1, 2).flatten(2) @ weights.out
