"""The kernels of `kernel.cuh`, and their launches."""

from __future__ import annotations

from lfdm_export.ops.cuda.source import Kernel, Launch

_HEADER = "pictures/kernel.cuh"
_THREADS = 256  # as in kernel.cuh


def pictures_kernel() -> Kernel:
    """Images (B, 3, F, H, W) float32 into pictures (B, F, H, W, 3) uint8, and a flag as that of `not_finite_kernel`.

    Source: the rule of `lfdm_export.pictures.preprocess.to_uint8`.
    """
    return Kernel("lfdm_pictures", _HEADER, "LFDM_PICTURES_KERNEL(lfdm_pictures)", _THREADS, (1, 2), 1)


def pictures_launch(pixels: int, batch: int) -> Launch[int]:
    """The launch of `pictures_kernel`; `pixels` is F·H·W."""
    return Launch((-(-pixels // _THREADS), batch, 1), (pixels,))


def not_finite_kernel() -> Kernel:
    """Values float32 into one uint32, which becomes 1 if a value is not finite, and must be 0 before."""
    return Kernel("lfdm_not_finite", _HEADER, "LFDM_NOT_FINITE_KERNEL(lfdm_not_finite)", _THREADS, (1, 1), 1)


def not_finite_launch(count: int) -> Launch[int]:
    """The launch of `not_finite_kernel` for that many values."""
    return Launch((-(-count // _THREADS), 1, 1), (count,))
