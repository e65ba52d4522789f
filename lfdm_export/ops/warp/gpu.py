"""Warp and WarpBlend on GPU tensors: torch operators around the kernels, eager, compiled or captured."""
# An operator's shape function takes the same arguments as the operator.
# ruff: noqa: ARG001

from __future__ import annotations

import torch
from torch import Tensor

from lfdm_export.ops.cuda.launcher import STORAGES, dense, launch
from lfdm_export.ops.warp.kernels import Layout, warp_kernel, warp_launch


def warp_on_gpu(source: Tensor, motion: Tensor) -> Tensor:
    """`reference.warp` on a GPU; the result has the memory format of `source`."""
    warped: Tensor = _warp(source, motion)
    return warped


def warp_blend_on_gpu(
    source: Tensor, motion: Tensor, previous: Tensor, *, stride: int, phase: tuple[int, int]
) -> Tensor:
    """`reference.warp_blend` on a GPU; the result has the memory format of `previous`."""
    blended: Tensor = _warp_blend(source, motion, previous.to(source.dtype), stride, *phase)
    return blended.to(previous.dtype)


@torch.library.custom_op("lfdm::warp", mutates_args=(), schema="(Tensor source, Tensor motion) -> Tensor")
def _warp(source: Tensor, motion: Tensor) -> Tensor:
    result: Tensor = _warp_result(source, motion)
    _run(source, motion, None, result, 1, (0, 0))
    return result


@_warp.register_fake
def _warp_result(source: Tensor, motion: Tensor) -> Tensor:
    shape = (motion.shape[0], *source.shape[1:])
    return torch.empty(shape, dtype=source.dtype, device=source.device, memory_format=_memory_format(source))


@torch.library.custom_op(
    "lfdm::warp_blend",
    mutates_args=(),
    schema="(Tensor source, Tensor motion, Tensor previous, int stride, int phase_y, int phase_x) -> Tensor",
)
def _warp_blend(source: Tensor, motion: Tensor, previous: Tensor, stride: int, phase_y: int, phase_x: int) -> Tensor:
    result: Tensor = _warp_blend_result(source, motion, previous, stride, phase_y, phase_x)
    _run(source, motion, previous, result, stride, (phase_y, phase_x))
    return result


@_warp_blend.register_fake
def _warp_blend_result(
    source: Tensor, motion: Tensor, previous: Tensor, stride: int, phase_y: int, phase_x: int
) -> Tensor:
    return torch.empty_like(previous, memory_format=_memory_format(previous))


def _run(
    source: Tensor, motion: Tensor, previous: Tensor | None, result: Tensor, stride: int, phase: tuple[int, int]
) -> None:
    memory_format = _memory_format(result)
    layout: Layout = "channels_last" if memory_format == torch.channels_last else "planar"
    storage = STORAGES[source.dtype]
    inputs = [dense(source, memory_format), dense(motion.to(torch.float32), torch.contiguous_format)]
    if previous is not None:
        inputs.append(dense(previous, memory_format))
    channels, height, width = source.shape[1:]
    plan = warp_launch(
        storage, layout, (channels, height, width), (motion.shape[2], motion.shape[3]),
        motion.shape[0], motion.shape[0] // source.shape[0], stride=stride, phase=phase,
    )  # fmt: skip
    launch(warp_kernel(storage, layout, blend=previous is not None), plan, inputs, [result])


def _memory_format(tensor: Tensor) -> torch.memory_format:
    last = tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format
