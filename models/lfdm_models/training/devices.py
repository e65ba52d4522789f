"""Where a training run computes, and with how many bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lfdm_models.training.errors import TrainingError
from lfdm_models.training.settings import Precision


def choose_device(device: str) -> torch.device:
    """The device that "auto", "cpu" or "cuda" means here.

    Raises:
        TrainingError: a GPU is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise TrainingError("a GPU was asked for, but torch sees none; use --device cpu, or install torch for CUDA")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def choose_precision(precision: Precision, gpu_default: Precision, device: torch.device) -> Precision:
    """What "auto" means on a device; anything else is kept.

    Raises:
        TrainingError: the device cannot do what is asked for.
    """
    if precision == "auto":
        return gpu_default if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise TrainingError("tf32 needs a GPU, and this run is on a CPU; use fp32")
    return precision


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """TF32 for products and convolutions where it is wanted, and only there."""
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn
