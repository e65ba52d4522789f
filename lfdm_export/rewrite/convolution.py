"""Convolutions rewritten for inference: 3-D as 2-D, batch norm folded, nearest x2 as low-resolution phases."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_export.ops.cuda.dispatch import on_gpu

#: Phases (row, column) of a de-interleaved map, in the order of `phase_kernels`.
PHASES = ((0, 0), (0, 1), (1, 0), (1, 1))


def fixed_conv(
    weight: Tensor, bias: Tensor | None, *, padding: tuple[int, int], stride: tuple[int, int] = (1, 1)
) -> nn.Conv2d:
    """A convolution with given weights (out, in, k, k), which are not trained."""
    out_channels, in_channels, height, width = weight.shape
    has_bias = bias is not None
    conv = nn.Conv2d(in_channels, out_channels, (height, width), stride, padding, bias=has_bias, device="meta")
    conv.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias, requires_grad=False)
    return conv


def fold_time(conv: nn.Conv3d) -> nn.Conv2d:
    """A 3-D convolution with a kernel of 1 in time, as the equal 2-D convolution on (B·T, C, h, w)."""
    stride, padding = (cast(tuple[int, int], tuple(t)[1:]) for t in (conv.stride, conv.padding))
    assert conv.bias is not None
    return fixed_conv(conv.weight.detach()[:, :, 0], conv.bias.detach(), padding=padding, stride=stride)


def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Conv -> batch norm (running statistics) as one convolution."""
    assert conv.bias is not None
    assert norm.running_mean is not None
    assert norm.running_var is not None
    # In float64, so that folding rounds only once.
    factor = norm.weight.detach().double() / torch.sqrt(norm.running_var.double() + norm.eps)
    weight = conv.weight.detach().double() * factor[:, None, None, None]
    bias = (conv.bias.detach().double() - norm.running_mean.double()) * factor + norm.bias.detach().double()
    dtype = conv.weight.dtype
    return fixed_conv(weight.to(dtype), bias.to(dtype), padding=cast(tuple[int, int], conv.padding))


def phase_kernels(weight: Tensor) -> Tensor:
    """3x3 kernels (out, in, 3, 3) on a nearest-x2 map -> 2x2 kernels (4, out, in, 2, 2) on the map itself.

    Phase 2·py + px gives output pixels (2i + py, 2j + px). Row r of a 3x3 kernel is applied to the upsampled
    row 2i + py + r - 1, which is row i + floor((py + r - 1) / 2) of the map. Only two rows (and columns) occur,
    i + py - 1 and i + py; taps that apply to the same pixel are summed.
    """
    out_channels, in_channels = weight.shape[:2]
    kernels = weight.new_zeros(2, 2, out_channels, in_channels, 2, 2)
    for py in range(2):
        for px in range(2):
            for r in range(3):
                for c in range(3):
                    row, column = (py + r - 1) // 2 + 1 - py, (px + c - 1) // 2 + 1 - px
                    kernels[py, px, :, :, row, column] += weight[:, :, r, c]
    return kernels.flatten(0, 1)


def transposed_phase_kernels(weight: Tensor) -> Tensor:
    """Transposed 4x4 kernels (in, out, 4, 4) of stride 2 and padding 1 -> 2x2 kernels (4, out, in, 2, 2).

    Tap k of a transposed kernel takes input row i to output row 2i - 1 + k. So output row 2i uses tap 3 of row i - 1
    and tap 1 of row i; output row 2i + 1 uses tap 2 of row i and tap 0 of row i + 1.
    """
    taps = ([3, 1], [2, 0])
    phases = [weight[:, :, taps[py]][:, :, :, taps[px]].transpose(0, 1) for py in range(2) for px in range(2)]
    return torch.stack(phases)


def phase_convs(x: Tensor, kernels: Tensor, bias: Tensor, *, padding_mode: str = "constant") -> list[Tensor]:
    """The four phases of an upsampled map of double size.

    Args:
        x: the map, (N, in, h, w).
        kernels: from `phase_kernels` or `transposed_phase_kernels`, (4, out, in, 2, 2).
        bias: (out,).
        padding_mode: padding beyond the map's border: "constant" (zeros) or "replicate".

    Returns:
        Phases (py, px) = (0, 0), (0, 1), (1, 0), (1, 1), each (N, out, h, w).
    """
    if on_gpu(x):
        return _phases_of_one_conv(x, kernels, bias, padding_mode)
    # Padded per phase: ONNX Runtime fuses zero padding into the convolution; slices of one padded map are copies.
    return [
        F.conv2d(F.pad(x, (1 - px, px, 1 - py, py), mode=padding_mode), kernels[2 * py + px], bias)
        for py in range(2)
        for px in range(2)
    ]


def _phases_of_one_conv(x: Tensor, kernels: Tensor, bias: Tensor, padding_mode: str) -> list[Tensor]:
    """`phase_convs` as one convolution for the channels of all phases, so that nothing is padded four times.

    Its output at (i, j) is the output of phase (py, px) at (i - py, j - px).
    """
    out_channels = kernels.shape[1]
    weight, all_biases = kernels.flatten(0, 1), bias.repeat(len(PHASES))
    if padding_mode == "constant":
        whole = F.conv2d(x, weight, all_biases, padding=1)
    else:
        whole = F.conv2d(F.pad(x, (1, 1, 1, 1), mode=padding_mode), weight, all_biases)
    height, width = x.shape[2:]
    return [
        part[:, :, row : row + height, column : column + width]
        for part, (row, column) in zip(whole.split(out_channels, dim=1), PHASES, strict=True)
    ]


def interleave(phases: list[Tensor]) -> Tensor:
    """Four phases (N, C, h, w) from `phase_convs` -> the whole map (N, C, 2h, 2w)."""
    first = phases[0]
    if not on_gpu(first):
        return F.pixel_shuffle(torch.stack(phases, dim=2).flatten(1, 2), 2)
    # One pass over memory; a channels-last layout is kept.
    batch, channels, height, width = first.shape
    # For a part of a larger map, only the strides show the layout.
    layout = torch.channels_last if first.stride(1) == 1 and channels > 1 else torch.contiguous_format
    whole = torch.empty(
        (batch, channels, 2 * height, 2 * width), dtype=first.dtype, device=first.device, memory_format=layout
    )
    for phase, (row, column) in zip(phases, PHASES, strict=True):
        whole[:, :, row::2, column::2] = phase
    return whole
