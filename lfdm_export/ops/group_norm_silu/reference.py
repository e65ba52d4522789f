"""GroupNormSilu in torch; inside an ONNX export it adds a node of domain `lfdm` instead.

Source: Wu & He (arXiv 1803.08494); its modulation as in Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lfdm_export.ops.cuda.dispatch import has_kernel, on_gpu
from lfdm_export.ops.domain import EPSILON
from lfdm_export.ops.symbolic import Attributes, exporting, node


def group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    *,
    frames: int,
    groups: int,
) -> Tensor:
    """SiLU(norm(x)·(scale + 1) + shift) + residual, with statistics over all frames of a clip.

    On a GPU, for channels-last tensors, these are the kernels of `kernel.cuh`.

    Args:
        x: (B·T, C, h, w); frames of one clip are neighbors.
        gamma: scale of the norm, (C,).
        beta: shift of the norm, (C,).
        scale_shift: modulation, (B, C) each.
        residual: added to the result, like `x`; not in an export, where it is a separate node.
        frames: T.
        groups: groups of channels that share statistics.

    Returns:
        A tensor like `x`.
    """
    if exporting():
        assert residual is None
        channels, height, width = x.shape[1:]
        attributes: Attributes = {
            "grouped": [-1, frames, groups, channels // groups * height * width],
            "per_group": [1, groups, channels // groups],
            "per_channel": [-1, 1, channels, 1, 1],
            "clip": [-1, frames, channels, height, width],
            "flat": [-1, channels, height, width],
        }
        inputs = [x, gamma, beta, *(scale_shift or ())]
        name = "GroupNormSilu" if scale_shift is None else "ModulatedGroupNormSilu"
        return node(name, inputs, attributes, [tuple(x.shape)])[0]
    if has_kernel(x) and x.is_contiguous(memory_format=torch.channels_last):
        from lfdm_export.ops.group_norm_silu.gpu import group_norm_silu_on_gpu

        return group_norm_silu_on_gpu(x, gamma, beta, scale_shift, residual, frames=frames, groups=groups)
    normed = group_norm_silu_in_torch(x, gamma, beta, scale_shift, frames=frames, groups=groups)
    return normed if residual is None else normed + residual


def group_norm_silu_in_torch(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    *,
    frames: int,
    groups: int,
) -> Tensor:
    """`group_norm_silu` with PyTorch's operators, on any device."""
    if on_gpu(x):
        return folded_group_norm_silu(x, gamma, beta, scale_shift, frames=frames, groups=groups)
    clip = x.unflatten(0, (-1, frames)).transpose(1, 2)
    normed = F.group_norm(clip, groups, gamma, beta, EPSILON)
    if scale_shift is not None:
        scale, shift = (t[:, :, None, None, None] for t in scale_shift)
        normed = normed * (scale + 1) + shift
    return F.silu(normed).transpose(1, 2).flatten(0, 1)


def folded_group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale_shift: tuple[Tensor, Tensor] | None = None,
    *,
    frames: int,
    groups: int,
) -> Tensor:
    """`group_norm_silu` as one product and one sum per value, without permutations, for either memory format.

    A compiler fuses it into two passes, one of them for the statistics. Arithmetic is float32 or wider.
    """
    channels, height, width = x.shape[1:]
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.is_contiguous(memory_format=torch.channels_last):
        grouped = x.permute(0, 2, 3, 1).reshape(-1, frames * height * width, groups, channels // groups)
    else:
        grouped = x.reshape(-1, frames, groups, channels // groups * height * width)
    variance, mean = torch.var_mean(grouped.to(wide), dim=(1, 3), correction=0)
    deviation, mean = (t.repeat_interleave(channels // groups, dim=1) for t in (torch.rsqrt(variance + EPSILON), mean))
    factor = deviation * gamma
    offset = beta - mean * factor
    if scale_shift is not None:
        scale, shift = scale_shift
        factor, offset = factor * (scale + 1), offset * (scale + 1) + shift
    factor, offset = (t[:, None, :, None, None] for t in (factor, offset))
    return F.silu(x.unflatten(0, (-1, frames)) * factor + offset).flatten(0, 1).to(x.dtype)
