"""The decoder's last convolution on GPU tensors: a torch operator around the kernel, eager, compiled or captured."""
# An operator's shape function takes the same arguments as the operator.
# ruff: noqa: ARG001

from __future__ import annotations

import torch
from torch import Tensor

from lfdm_export.ops.cuda.dispatch import has_kernel
from lfdm_export.ops.cuda.launcher import STORAGES, dense, launch
from lfdm_export.ops.final_conv import kernels
from lfdm_export.ops.final_conv.kernels import LAID_OUT, final_kernel, final_launch

#: Major number of the oldest compute capability that has the kernel's instructions.
_FIRST_CAPABILITY = 8


def suits(phase: Tensor, kernel: Tensor) -> bool:
    """Whether a kernel for `final_conv_on_gpu` supports this map.

    Args:
        phase: one of the map's phases, (N, C, h, w).
        kernel: from `reference.lay_out_kernel`.
    """
    return (
        has_kernel(phase)
        and kernel.dtype == phase.dtype
        and STORAGES[phase.dtype] in kernels.STORAGES
        and kernel.shape[-1] in kernels.CHANNELS
        and tuple(kernel.shape[:-1]) == LAID_OUT
        # Compilation takes properties as constants, but not `get_device_capability`.
        and (not phase.is_cuda or torch.cuda.get_device_properties(phase.device).major >= _FIRST_CAPABILITY)
    )


def final_conv_on_gpu(phases: list[Tensor], kernel: Tensor, bias: Tensor) -> Tensor:
    """`reference.final_conv_in_torch` with a kernel of 7x7 pixels and three outputs.

    Args:
        phases: four (N, C, h, w) of 16-bit floats, fastest in channels-last format.
        kernel: from `reference.lay_out_kernel`, (7, 24, C) of the same type.
        bias: (3,), of the same type.

    Returns:
        (N, 3, 2h, 2w) float32, planar; all sums are float32.
    """
    pictures: Tensor = _final_conv(phases, kernel, bias)
    return pictures


@torch.library.custom_op(
    "lfdm::final_conv", mutates_args=(), schema="(Tensor[] phases, Tensor kernel, Tensor bias) -> Tensor"
)
def _final_conv(phases: list[Tensor], kernel: Tensor, bias: Tensor) -> Tensor:
    result: Tensor = _final_conv_result(phases, kernel, bias)
    frames, _, height, width = result.shape
    inputs = [*(dense(phase, torch.channels_last) for phase in phases), dense(kernel), dense(bias)]
    launch(
        final_kernel(STORAGES[kernel.dtype], kernel.shape[-1]), final_launch(frames, height, width), inputs, [result]
    )
    return result


@_final_conv.register_fake
def _final_conv_result(phases: list[Tensor], kernel: Tensor, bias: Tensor) -> Tensor:
    frames, _, rows, columns = phases[0].shape
    return phases[0].new_empty((frames, len(bias), 2 * rows, 2 * columns), dtype=torch.float32)
