"""Device and precision of a training run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lfdm_models.training.errors import TrainingError
from lfdm_models.training.settings import Precision


def choose_device(device: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda".

    Raises:
        TrainingError: a GPU is requested and none is available.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise TrainingError("a GPU is requested, but torch finds none; use --device cpu, or install torch for CUDA")
    return torch.device("cuda" if available and device != "cpu" else "cpu")


def choose_precision(precision: Precision, gpu_default: Precision, device: torch.device) -> Precision:
    """The precision for "auto" on a device; other values are kept.

    Raises:
        TrainingError: the device does not support the requested precision.
    """
    if precision == "auto":
        return gpu_default if device.type == "cuda" else "fp32"
    if precision == "tf32" and device.type != "cuda":
        raise TrainingError("tf32 needs a GPU, and this run is on a CPU; use fp32")
    return precision


def generator(seed: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A source of randomness on a device that depends only on the run's seed and a number."""
    return torch.Generator(device).manual_seed((seed * 0x9E3779B97F4A7C15 + number) % 2**63)


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """Use TF32 for products and convolutions inside the context if, and only if, requested."""
    before = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
        torch.backends.cudnn.allow_tf32 = cudnn
