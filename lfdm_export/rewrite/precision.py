"""Deployable modules in lower precision, and in the memory format that is fastest on GPUs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from lfdm_export.rewrite.attention import FoldedTemporalAttention
from lfdm_export.rewrite.lfae import Decode, PhasedUp
from lfdm_export.rewrite.unet import DeployableUnet, DoublingConv

Module = TypeVar("Module", bound=nn.Module)


def in_precision(modules: Mapping[str, Module], dtype: torch.dtype) -> dict[str, Module]:
    """Copies with weights of that dtype; they share among each other what the originals share.

    Layers that process timesteps stay float32: bfloat16 cannot represent all timesteps. So do tables for kernels.
    Latents, coordinates and pictures also stay float32 as inputs and outputs of the modules.

    Args:
        modules: from `stage_modules`, in float32.
        dtype: float32, float16 or bfloat16.
    """
    copies = copy.deepcopy(dict(modules))
    for module in copies.values():
        _cast(module, dtype)
    return copies


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    for name, child in module.named_children():
        if not (isinstance(module, DeployableUnet) and name == "time_mlp"):
            _cast(child, dtype)
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(dtype)
    kept = module.FLOAT32 if isinstance(module, FoldedTemporalAttention) else ()
    for name, buffer in module.named_buffers(recurse=False):
        if buffer.is_floating_point() and name not in kept:
            setattr(module, name, buffer.to(dtype))


def channels_last(modules: Mapping[str, nn.Module]) -> None:
    """Convert the convolutions' weights to channels last, in place; the activations then use that format too."""
    for module in modules.values():
        for part in module.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)
            elif isinstance(part, Decode):
                part.final = part.final.contiguous(memory_format=torch.channels_last)
            elif isinstance(part, PhasedUp):
                part.kernels = _each_channels_last(part.kernels)
            elif isinstance(part, DoublingConv):
                part.weight = _each_channels_last(part.weight)


def _each_channels_last(kernels: Tensor) -> Tensor:
    """The four phases' kernels (4, out, in, k, k), each in channels-last format."""
    return kernels.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
