"""Warp and WarpBlend in torch; inside an ONNX export they place a node of domain `lfdm` instead.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.2: out = warp(f)·o + out·(1 - o).
"""

from __future__ import annotations

from torch import Tensor

from lfdm_export.ops.symbolic import Attributes, exporting, node
from lfdm_models.layers import resize, sample


def warp(source: Tensor, motion: Tensor) -> Tensor:
    """Sample each source along its frames' flows.

    Args:
        source: (B, C, H, W).
        motion: (B·F, 3, h, w): sampling grid x and y in [-1, 1], occlusion in [0, 1]; frames of one
            source are neighbours.

    Returns:
        (B·F, C, H, W).
    """
    size = (source.shape[2], source.shape[3])
    if exporting():
        return node("Warp", [source, motion], {}, [(motion.shape[0], source.shape[1], *size)])[0]
    return _sample_frames(source, resize(motion, size)[:, :2])


def warp_blend(
    source: Tensor, motion: Tensor, previous: Tensor, *, stride: int = 1, phase: tuple[int, int] = (0, 0)
) -> Tensor:
    """warp(source)·o + previous·(1 - o), at every `stride`-th pixel from `phase` on.

    Args:
        source: (B, C, H, W).
        motion: (B·F, 3, h, w), as for `warp`.
        previous: (B·F, C, H / stride, W / stride).
        stride: 1, or 2 for one of the four phases of an activation that is kept de-interleaved.
        phase: first row and column.

    Returns:
        Like `previous`.
    """
    if exporting():
        attributes: Attributes = {"stride": stride, "phase_y": phase[0], "phase_x": phase[1]}
        return node("WarpBlend", [source, motion, previous], attributes, [tuple(previous.shape)])[0]
    resized = resize(motion, (source.shape[2], source.shape[3]))[:, :, phase[0] :: stride, phase[1] :: stride]
    occlusion = resized[:, 2:3]
    return _sample_frames(source, resized[:, :2]) * occlusion + previous * (1 - occlusion)


def _sample_frames(source: Tensor, grid: Tensor) -> Tensor:
    frames = grid.shape[0] // source.shape[0]
    repeated = source[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    return sample(repeated, grid.permute(0, 2, 3, 1))
