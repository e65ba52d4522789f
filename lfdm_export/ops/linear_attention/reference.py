"""The weights of linear attention in torch; `gpu.attend_on_gpu` computes them and all that follows in one kernel.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.3; linear attention of Shen et al. (arXiv 1812.01243).
"""

from __future__ import annotations

from torch import Tensor


def head_weights(normed: Tensor, query: Tensor, *, heads: int) -> Tensor:
    """The softmax of the queries over the channels of each head.

    Args:
        normed: (N, P, C).
        query: (C, H·D).
        heads: H.

    Returns:
        (N, P, H·D).
    """
    weights: Tensor = (normed @ query).unflatten(-1, (heads, -1)).softmax(dim=-1).flatten(-2)
    return weights
