"""The core of temporal attention on GPU tensors: a torch operator around the kernel, eager, compiled or captured."""
# An operator's shape function takes the same arguments as the operator.
# ruff: noqa: ARG001

from __future__ import annotations

import torch
from torch import Tensor

from lfdm_export.ops.cuda.dispatch import has_kernel
from lfdm_export.ops.cuda.launcher import STORAGES, dense, launch
from lfdm_export.ops.temporal_attention import kernels
from lfdm_export.ops.temporal_attention.kernels import core_kernel, core_launch, covers

#: Major number of the oldest compute capability that has the kernel's instructions.
_FIRST_CAPABILITY = 8


def suits_core(qkv: Tensor, heads: int) -> bool:
    """Whether a kernel for `core_on_gpu` supports this tensor.

    Args:
        qkv: (B, T, P, 3·H·D).
        heads: H.
    """
    frames, width = qkv.shape[1], qkv.shape[-1] // (3 * heads)
    return (
        has_kernel(qkv)
        and STORAGES[qkv.dtype] in kernels.STORAGES
        and covers(width, frames)
        # Compilation takes properties as constants, but not `get_device_capability`.
        and (not qkv.is_cuda or torch.cuda.get_device_properties(qkv.device).major >= _FIRST_CAPABILITY)
    )


def core_on_gpu(qkv: Tensor, turns: Tensor, bias: Tensor, *, heads: int) -> Tensor:
    """Rotary embedding, softmax attention over the frames of each pixel, and the product with the values.

    Args:
        qkv: (B, T, P, 3·H·D) of 16-bit floats: queries, keys and values, each with its heads in order.
        turns: from `tables.lay_out_turns`.
        bias: from `tables.lay_out_bias`.
        heads: H.

    Returns:
        (B, T, P, H·D), with the dtype of `qkv`; logits, softmax and sums are float32.
    """
    mixed: Tensor = _core(qkv, turns, bias, heads)
    return mixed


@torch.library.custom_op(
    "lfdm::temporal_core", mutates_args=(), schema="(Tensor qkv, Tensor turns, Tensor bias, int heads) -> Tensor"
)
def _core(qkv: Tensor, turns: Tensor, bias: Tensor, heads: int) -> Tensor:
    batch, frames, pixels, width = qkv.shape
    result: Tensor = _core_result(qkv, turns, bias, heads)
    tables = (dense(table.to(torch.float32)) for table in (turns, bias))
    kernel = core_kernel(STORAGES[qkv.dtype], width // (3 * heads), frames)
    launch(kernel, core_launch(frames, pixels, heads, batch), [dense(qkv), *tables], [result])
    return result


@_core.register_fake
def _core_result(qkv: Tensor, turns: Tensor, bias: Tensor, heads: int) -> Tensor:
    return qkv.new_empty((*qkv.shape[:3], qkv.shape[3] // 3))
