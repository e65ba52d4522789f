"""Linear attention's second half on GPU tensors: a torch operator around the kernel, eager, compiled or captured."""
# An operator's shape function takes the same arguments as the operator.
# ruff: noqa: ARG001

from __future__ import annotations

import torch
from torch import Tensor

from lfdm_export.ops.cuda.dispatch import has_kernel
from lfdm_export.ops.cuda.launcher import STORAGES, dense, launch
from lfdm_export.ops.linear_attention import kernels
from lfdm_export.ops.linear_attention.kernels import covers, linear_kernel, linear_launch

#: Major number of the oldest compute capability that has the kernel's instructions.
_FIRST_CAPABILITY = 8


def suits(x: Tensor, query: Tensor, heads: int) -> bool:
    """Whether a kernel for `attend_on_gpu` supports this map.

    Args:
        x: (N, P, C).
        query: (C, H·D).
        heads: H.
    """
    return (
        has_kernel(x)
        and query.dtype == x.dtype
        and STORAGES[x.dtype] in kernels.STORAGES
        and covers(x.shape[-1], query.shape[1] // heads)
        # Compilation takes properties as constants, but not `get_device_capability`.
        and (not x.is_cuda or torch.cuda.get_device_properties(x.device).major >= _FIRST_CAPABILITY)
    )


def attend_on_gpu(x: Tensor, normed: Tensor, query: Tensor, projection: Tensor, bias: Tensor, *, heads: int) -> Tensor:
    """X + softmax(normed · query) · projection + bias, with the softmax over the channels of each head.

    Args:
        x: (N, P, C) of 16-bit floats; N frames are independent.
        normed: x after the layer norm, likewise.
        query: (C, H·D), of the same type, like the following ones.
        projection: (N, H·D, C).
        bias: (C,).
        heads: H.

    Returns:
        (N, P, C), of the same type; queries, softmax and sums are float32.
    """
    result: Tensor = _attend(x, normed, query, projection, bias, heads)
    return result


@torch.library.custom_op(
    "lfdm::linear_attention",
    mutates_args=(),
    schema="(Tensor x, Tensor normed, Tensor query, Tensor projection, Tensor bias, int heads) -> Tensor",
)
def _attend(x: Tensor, normed: Tensor, query: Tensor, projection: Tensor, bias: Tensor, heads: int) -> Tensor:
    frames, pixels, channels = x.shape
    result: Tensor = _attend_result(x, normed, query, projection, bias, heads)
    kernel = linear_kernel(STORAGES[x.dtype], channels, query.shape[1] // heads)
    plan = linear_launch(frames, pixels, channels, heads)
    launch(kernel, plan, [dense(tensor) for tensor in (x, normed, query, projection, bias)], [result])
    return result


@_attend.register_fake
def _attend_result(x: Tensor, normed: Tensor, query: Tensor, projection: Tensor, bias: Tensor, heads: int) -> Tensor:
    return x.new_empty(x.shape)
