"""SmallConv in torch; inside an ONNX export it adds a node of domain `lfdm` instead."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lfdm_export.ops.symbolic import exporting, node

#: Largest side of a map for which the operator's body is faster than a convolution in ONNX Runtime. Measured on 2 cores
#: of a Xeon with AVX-512: a whole step of the published UNet, whose coarsest maps are 4 x 4, took 737 ms instead of
#: 776; at 8 x 8 it gained nothing. Loading takes 0.5 s longer.
LARGEST_SIDE = 4
# Winograd's F(2, 3) along one axis: a tile of 4 inputs -> 4 values, 3 taps -> 4 values, 4 products -> 2 outputs.
_INPUT = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
_KERNEL = ((1, 0, 0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0, 0, 1))
_OUTPUT = ((1, 1, 1, 0), (0, 1, -1, -1))


def suits_small_conv(x: Tensor, weight: Tensor) -> bool:
    """Whether a same-padded convolution of `x` with `weight` can and should use this operator."""
    height, width = x.shape[2:]
    return weight.shape[2:] == (3, 3) and max(height, width) <= LARGEST_SIDE and height % 2 == width % 2 == 0


def small_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Conv 3x3, padded by 1.

    Args:
        x: (N, in, h, w), h and w even.
        weight: (out, in, 3, 3).
        bias: (out,).

    Returns:
        (N, out, h, w).
    """
    if exporting():
        height, width = x.shape[2:]
        matrices = (matrix.to(x.dtype) for matrix in transforms(height, width))
        shape = (x.shape[0], weight.shape[0], height, width)
        return node("SmallConv", [x, weight, bias, *matrices], {"height": height, "width": width}, [shape])[0]
    return F.conv2d(x, weight, bias, padding=1)


def transforms(height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Winograd's transforms of a whole map, zero padding included, in float64.

    Returns:
        kernel (9, 16): taps -> values; spread (16·tiles, h·w): pixels -> values of all tiles; gather (h·w, 16·tiles):
        products -> pixels. A tile gives 2 x 2 pixels; columns and rows are in the order (value, tile).

    Source: Lavin & Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308), Sec. 4.1.
    """
    taps = torch.tensor(_KERNEL, dtype=torch.float64)
    (rows_in, rows_out), (columns_in, columns_out) = _line_transforms(height), _line_transforms(width)
    spread = torch.einsum("auy,bvx->abuvyx", rows_in, columns_in).reshape(-1, height * width)
    gather = torch.einsum("yau,xbv->yxabuv", rows_out, columns_out).reshape(height * width, -1)
    return torch.kron(taps, taps).t().contiguous(), spread, gather


def _line_transforms(size: int) -> tuple[Tensor, Tensor]:
    """For one axis: (4, tiles, size) from pixels to values of tiles, and (size, 4, tiles) back."""
    tiles = size // 2
    forward = torch.zeros(4, tiles, size, dtype=torch.float64)
    backward = torch.zeros(size, 4, tiles, dtype=torch.float64)
    for tile in range(tiles):
        for tap in range(4):
            pixel = 2 * tile + tap - 1
            if 0 <= pixel < size:
                forward[:, tile, pixel] = torch.tensor(_INPUT, dtype=torch.float64)[:, tap]
        backward[2 * tile : 2 * tile + 2, :, tile] = torch.tensor(_OUTPUT, dtype=torch.float64)
    return forward, backward
