"""Selects the GPU implementation of operators: on a GPU, or anywhere while the host build replaces a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lfdm_export.ops.cuda.host import HostKernels

_stand_in: HostKernels | None = None


def on_gpu(tensor: Tensor) -> bool:
    """Whether the operator should use its fastest GPU implementation for this tensor."""
    return tensor.is_cuda or _stand_in is not None


def has_kernel(tensor: Tensor) -> bool:
    """Whether this project's kernels support the tensor: on a GPU, in float32, float16 or bfloat16."""
    return on_gpu(tensor) and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)


def stand_in() -> HostKernels | None:
    """The host build that runs kernels on host tensors; None outside of `standing_in`."""
    return _stand_in


@contextmanager
def standing_in(kernels: HostKernels) -> Iterator[None]:
    """Run kernels with the host build inside the context, on host tensors: slow, but with the same arithmetic.

    For tests of the GPU implementation on machines without a GPU; not thread-safe.
    """
    global _stand_in
    before, _stand_in = _stand_in, kernels
    try:
        yield
    finally:
        _stand_in = before
