"""Warp and WarpBlend in torch; inside an ONNX export they add a node of domain `lfdm` instead.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.2: out = warp(f)·o + out·(1 - o).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lfdm_export.ops.cuda.dispatch import has_kernel
from lfdm_export.ops.symbolic import Attributes, exporting, node
from lfdm_models.layers import resize, sample

#: A coordinate in the zero padding outside of any picture, like all coordinates of larger magnitude.
_OUTSIDE = 100.0


def warp(source: Tensor, motion: Tensor) -> Tensor:
    """Sample each source along its frames' flows.

    On a GPU this is the kernel of `kernel.cuh`.

    Args:
        source: (B, C, H, W).
        motion: (B·F, 3, h, w): sampling grid x and y in [-1, 1], occlusion in [0, 1]; frames of one
            source are neighbors. A coordinate that is not finite is outside the picture.

    Returns:
        (B·F, C, H, W), with the dtype of `source`; coordinates and sums are float32 or wider.
    """
    if exporting():
        shape = (motion.shape[0], source.shape[1], source.shape[2], source.shape[3])
        return node("Warp", [source, motion], {}, [shape])[0]
    if has_kernel(source):
        from lfdm_export.ops.warp.gpu import warp_on_gpu

        return warp_on_gpu(source, motion)
    return warp_in_torch(source, motion)


def warp_blend(
    source: Tensor, motion: Tensor, previous: Tensor, *, stride: int = 1, phase: tuple[int, int] = (0, 0)
) -> Tensor:
    """warp(source)·o + previous·(1 - o), at every `stride`-th pixel from `phase` on.

    On a GPU this is the kernel of `kernel.cuh`.

    Args:
        source: (B, C, H, W).
        motion: (B·F, 3, h, w), as for `warp`.
        previous: (B·F, C, H / stride, W / stride), with the dtype of `source`.
        stride: 1, or 2 for one of the four phases of a de-interleaved activation.
        phase: first row and column.

    Returns:
        A tensor like `previous`.
    """
    if exporting():
        attributes: Attributes = {"stride": stride, "phase_y": phase[0], "phase_x": phase[1]}
        return node("WarpBlend", [source, motion, previous], attributes, [tuple(previous.shape)])[0]
    if has_kernel(source):
        from lfdm_export.ops.warp.gpu import warp_blend_on_gpu

        return warp_blend_on_gpu(source, motion, previous, stride=stride, phase=phase)
    return warp_blend_in_torch(source, motion, previous, stride=stride, phase=phase)


def warp_in_torch(source: Tensor, motion: Tensor) -> Tensor:
    """`warp` with torch's own operators, on any device."""
    resized = resize(_wide(motion), (source.shape[2], source.shape[3]))
    return _sample_frames(source, resized[:, :2]).to(source.dtype)


def warp_blend_in_torch(
    source: Tensor, motion: Tensor, previous: Tensor, *, stride: int = 1, phase: tuple[int, int] = (0, 0)
) -> Tensor:
    """`warp_blend` with torch's own operators, on any device."""
    resized = resize(_wide(motion), (source.shape[2], source.shape[3]))[:, :, phase[0] :: stride, phase[1] :: stride]
    occlusion = resized[:, 2:3]
    blended = _sample_frames(source, resized[:, :2]) * occlusion + previous * (1 - occlusion)
    return blended.to(previous.dtype)


def _wide(motion: Tensor) -> Tensor:
    return motion.to(torch.promote_types(motion.dtype, torch.float32))


def _sample_frames(source: Tensor, grid: Tensor) -> Tensor:
    frames = grid.shape[0] // source.shape[0]
    repeated = source.to(grid.dtype)[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    # Where coordinates are not finite, torch samples NaN on a CPU and zeros on a GPU.
    within = torch.where(grid.abs() < _OUTSIDE, grid, _OUTSIDE)
    return sample(repeated, within.permute(0, 2, 3, 1))
