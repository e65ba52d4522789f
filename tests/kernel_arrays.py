"""Shared by the tests of kernels: arrays of 16-bit floats as bits, and the list of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from lfdm_export.ops.cuda.source import Kernel, Storage
from lfdm_export.ops.final_conv.kernels import final_kernel
from lfdm_export.ops.group_norm_silu import kernels as norm
from lfdm_export.ops.linear_attention.kernels import linear_kernel
from lfdm_export.ops.pictures.kernels import not_finite_kernel, pictures_kernel
from lfdm_export.ops.temporal_attention.kernels import core_kernel
from lfdm_export.ops.thresholded_step.kernels import (
    PASSES,
    STORAGES,
    count_kernel,
    noise_kernel,
    step_kernel,
    update_kernel,
)
from lfdm_export.ops.warp.kernels import Layout, warp_kernel

LAYOUTS: tuple[Layout, ...] = get_args(Layout)
TORCH: dict[Storage, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
KERNELS: tuple[Kernel, ...] = (
    *(warp_kernel(storage, layout, blend=blend) for storage in TORCH for layout in LAYOUTS for blend in (False, True)),
    *(step_kernel(*storages) for storages in STORAGES),
    *(count_kernel(*storages, number) for storages in STORAGES for number in range(PASSES)),
    *(update_kernel(*storages) for storages in STORAGES),
    noise_kernel(),
    pictures_kernel(),
    not_finite_kernel(),
    # Sizes of the published network, of the small one, and others.
    *(core_kernel("float16", *sizes) for sizes in ((32, 40), (16, 8), (32, 16), (32, 64), (64, 40))),
    *(core_kernel("bfloat16", *sizes) for sizes in ((32, 40), (16, 8))),
    *(linear_kernel(storage, channels, 16) for storage in ("float16", "bfloat16") for channels in (32, 64)),
    *(final_kernel(storage, 16) for storage in ("float16", "bfloat16")),
    *(norm.statistics_kernel(storage) for storage in TORCH),
    *(norm.apply_kernel(*storages) for storages in norm.STORAGES),
)


def random(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal values, float32, from a seed."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def stored(tensor: torch.Tensor, storage: Storage, layout: Layout = "planar") -> NDArray[Any]:
    """Convert a tensor to the array that a kernel reads; 16-bit floats as bits."""
    values = tensor.to(TORCH[storage])
    if layout == "channels_last":
        values = values.permute(0, 2, 3, 1)
    values = values.contiguous()
    return values.numpy() if storage == "float32" else values.view(torch.uint16).numpy()


def empty(shape: tuple[int, ...], storage: Storage, layout: Layout = "planar") -> NDArray[Any]:
    """Allocate memory for a result, filled with NaN to reveal unwritten elements."""
    return stored(torch.full(shape, torch.nan), storage, layout)


def values_of(array: NDArray[Any], storage: Storage, layout: Layout = "planar") -> torch.Tensor:
    """Convert a kernel's output to planar float64."""
    tensor = torch.from_numpy(array)
    if storage != "float32":
        tensor = tensor.view(TORCH[storage])
    if layout == "channels_last":
        tensor = tensor.permute(0, 3, 1, 2)
    return tensor.double()


def addresses(arrays: Sequence[NDArray[Any]]) -> list[int]:
    """Return the memory addresses of arrays in C order."""
    assert all(array.flags.c_contiguous for array in arrays)
    return [array.ctypes.data for array in arrays]
