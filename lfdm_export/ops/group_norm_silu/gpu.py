"""GroupNormSilu on GPU tensors in channels-last format: a torch operator around the kernels."""
# An operator's shape function takes the same arguments as the operator.
# ruff: noqa: ARG001

from __future__ import annotations

import torch
from torch import Tensor

from lfdm_export.ops.cuda.launcher import STORAGES, dense, is_aligned, launch
from lfdm_export.ops.group_norm_silu import kernels
from lfdm_export.ops.group_norm_silu.kernels import NormPlan


def group_norm_silu_on_gpu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale_shift: tuple[Tensor, Tensor] | None,
    residual: Tensor | None,
    *,
    frames: int,
    groups: int,
) -> Tensor:
    """`reference.group_norm_silu` on a GPU; `x` must be channels last, and so is the result."""
    parameters = [gamma, beta, *(scale_shift or ())]
    if (STORAGES[x.dtype], STORAGES.get(gamma.dtype)) not in kernels.STORAGES or len({p.dtype for p in parameters}) > 1:
        parameters = [parameter.to(torch.float32) for parameter in parameters]
    if residual is not None:
        residual = residual.to(x.dtype)
    gamma, beta, *modulation = parameters
    scale, shift = modulation or (None, None)
    result: Tensor = _group_norm_silu(x, gamma, beta, scale, shift, residual, frames, groups)
    return result


@torch.library.custom_op(
    "lfdm::group_norm_silu",
    mutates_args=(),
    schema="(Tensor x, Tensor gamma, Tensor beta, Tensor? scale, Tensor? shift, Tensor? residual, int frames, "
    "int groups) -> Tensor",
)
def _group_norm_silu(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    frames: int,
    groups: int,
) -> Tensor:
    result: Tensor = _group_norm_silu_result(x, gamma, beta, scale, shift, residual, frames, groups)
    storage, narrow = STORAGES[x.dtype], STORAGES[gamma.dtype]
    count, channels, height, width = x.shape
    plan = NormPlan.of(storage, count // frames, frames * height * width, channels, groups)
    x, gamma, beta = dense(x, torch.channels_last), dense(gamma), dense(beta)
    partials = x.new_empty((plan.clips, plan.slabs, groups, 2), dtype=torch.float32)
    launch(kernels.statistics_kernel(storage), plan.statistics(), [x], [partials])
    # The kernel does not read through pointers of absent inputs.
    row_stride, rows = 0, [gamma, gamma]
    if scale is not None and shift is not None:
        row_stride, rows = _rows_alike(scale, shift)
    added = x if residual is None else dense(residual, torch.channels_last)
    launch(
        kernels.apply_kernel(storage, narrow),
        plan.apply(row_stride=row_stride, modulated=scale is not None, added=residual is not None),
        [x, partials, gamma, beta, *rows, added],
        [result],
    )
    return result


@_group_norm_silu.register_fake
def _group_norm_silu_result(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    residual: Tensor | None,
    frames: int,
    groups: int,
) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _rows_alike(scale: Tensor, shift: Tensor) -> tuple[int, list[Tensor]]:
    """Scale and shift (B, C), and the elements from row to row; views of one product are used without a copy."""
    alike = scale.stride() == shift.stride() and scale.stride(1) == 1
    step = scale.stride(0) * scale.element_size()
    if alike and (len(scale) == 1 or step % 16 == 0) and is_aligned(scale) and is_aligned(shift):
        return int(scale.stride(0)), [scale, shift]
    return int(scale.shape[1]), [dense(scale), dense(shift)]
