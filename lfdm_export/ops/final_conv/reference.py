"""The decoder's last convolution in torch, and its kernel's values as `gpu.final_conv_on_gpu` takes them.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), the generator of the latent flow autoencoder; its last layer.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

#: Columns of a product are whole tiles of that many.
_TILE = 8


def final_conv_in_torch(phases: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """Sigmoid of a same-padded convolution of a de-interleaved map.

    Args:
        phases: pixels (2i + py, 2j + px) of the map, for (py, px) = (0, 0), (0, 1), (1, 0), (1, 1); each (N, C, h, w).
        weight: (out, C, k, k), k odd.
        bias: (out,).

    Returns:
        (N, out, 2h, 2w).
    """
    whole = F.pixel_shuffle(torch.stack(phases, dim=2).flatten(1, 2), 2)
    return F.conv2d(whole, weight, bias, padding=weight.shape[-1] // 2).sigmoid()


def lay_out_kernel(weight: Tensor) -> Tensor:
    """The kernel (out, C, k, k) as (k, n, C): by row, then by column and output together, padded with zeros."""
    outputs, channels, size, _ = weight.shape
    columns = weight.permute(2, 3, 0, 1).reshape(size, size * outputs, channels)
    return F.pad(columns, (0, 0, 0, -columns.shape[1] % _TILE)).contiguous()
