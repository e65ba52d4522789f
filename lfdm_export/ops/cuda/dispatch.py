"""Where operators take the GPU's way: on a GPU, or anywhere while the host build stands in for one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lfdm_export.ops.cuda.host import HostKernels

_stand_in: HostKernels | None = None


def on_gpu(tensor: Tensor) -> bool:
    """Whether an operator on this tensor should be what is fastest on a GPU."""
    return tensor.is_cuda or _stand_in is not None


def has_kernel(tensor: Tensor) -> bool:
    """Whether kernels of this project can take it: they store float32, float16 and bfloat16."""
    return on_gpu(tensor) and tensor.dtype in (torch.float32, torch.float16, torch.bfloat16)


def stand_in() -> HostKernels | None:
    """What runs kernels on tensors of the host; None outside of `standing_in`."""
    return _stand_in


@contextmanager
def standing_in(kernels: HostKernels) -> Iterator[None]:
    """Let the host build run the kernels meanwhile, on tensors of the host: slowly, and by the same arithmetic.

    For tests and trials of the GPU's way on machines without one; not for several threads.
    """
    global _stand_in
    before, _stand_in = _stand_in, kernels
    try:
        yield
    finally:
        _stand_in = before
