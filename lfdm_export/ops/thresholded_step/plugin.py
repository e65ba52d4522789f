"""ThresholdedStep as a TensorRT plugin, whose kernel is part of the engine as PTX. Importing this registers it.

Register it through `lfdm_export.ops.plugins`.

Source: TensorRT documentation, Quickly Deployable Plugins; contract in `tensorrt.plugin` of 10.9 and newer.
"""
# TensorRT reads the annotations as types: `from __future__ import annotations` breaks this, and none may be missing.
# All functions of an operator take the same arguments.
# ruff: noqa: ARG001

import math

import tensorrt.plugin as trtp

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.nvrtc import compile_ptx
from lfdm_export.ops.cuda.plugin import STORAGES, TYPE_NAMES, Implementation, extra_arguments, launch_parameters
from lfdm_export.ops.thresholded_step import kernels


@trtp.register("lfdm::ThresholdedStep")
def thresholded_step(
    latent: trtp.TensorDesc,
    predicted_noise: trtp.TensorDesc,
    history: trtp.TensorDesc,
    noise: trtp.TensorDesc,
    coefficients: trtp.TensorDesc,
    lower_rank: int,
    weight: float,
) -> tuple[trtp.TensorDesc, trtp.TensorDesc]:
    """Outputs of `reference.thresholded_step`."""
    return latent.like(), history.like()


@trtp.autotune("lfdm::ThresholdedStep")
def thresholded_step_combinations(
    latent: trtp.TensorDesc,
    predicted_noise: trtp.TensorDesc,
    history: trtp.TensorDesc,
    noise: trtp.TensorDesc,
    coefficients: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Types of the inputs, then of both results."""
    found = []
    for state, predicted in kernels.STORAGES:
        s, p = TYPE_NAMES[state], TYPE_NAMES[predicted]
        found.append(trtp.AutoTuneCombination(f"{s}, {p}, {s}, {s}, FP32, {s}, {s}", "LINEAR", [1]))
    return found


@trtp.aot_impl("lfdm::ThresholdedStep")
def thresholded_step_kernel_of(
    latent: trtp.TensorDesc,
    predicted_noise: trtp.TensorDesc,
    history: trtp.TensorDesc,
    noise: trtp.TensorDesc,
    coefficients: trtp.TensorDesc,
    lower_rank: int,
    weight: float,
    outputs: tuple[trtp.TensorDesc, trtp.TensorDesc],
    tactic: int,
) -> Implementation:
    """The kernel for the chosen types."""
    sizes = tuple(latent.shape)[1:]
    if min(sizes) < 1:
        raise EngineError(
            f"the plugin ThresholdedStep found the latent {tuple(latent.shape)}, expected that only its first axis "
            "is dynamic; export with fixed sizes"
        )
    plan = kernels.step_launch(math.prod(sizes), lower_rank, weight, latent.shape_expr[0])
    kernel = kernels.step_kernel(STORAGES[latent.dtype], STORAGES[predicted_noise.dtype])
    return kernel.name, compile_ptx(kernel), launch_parameters(kernel, plan), extra_arguments(plan)
