"""Shared by all plugins: types by name, and launches as TensorRT's symbolic expressions."""

from __future__ import annotations

from typing import Any, TypeAlias, Union

import tensorrt as trt
import tensorrt.plugin as trtp

from lfdm_export.ops.cuda.source import Kernel, Launch, Storage

STORAGES: dict[trt.DataType, Storage] = {
    trt.DataType.FLOAT: "float32",
    trt.DataType.HALF: "float16",
    trt.DataType.BF16: "bfloat16",
}
#: Result of a plugin's `aot_impl`, in the spelling that TensorRT checks: kernel's name, PTX, launch, scalars.
Implementation: TypeAlias = tuple[
    Union[str, bytes], Union[str, bytes], trtp.KernelLaunchParams, trtp.SymExprs  # noqa: UP007
]
#: Names of the types in autotuning.
TYPE_NAMES: dict[Storage, str] = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16"}


def launch_parameters(kernel: Kernel, plan: Launch[Any]) -> trtp.KernelLaunchParams:
    """Grid and block; shared memory is static in the kernel."""
    parameters = trtp.KernelLaunchParams()
    parameters.grid_x, parameters.grid_y, parameters.grid_z = plan.grid
    parameters.block_x = kernel.threads
    return parameters


def extra_arguments(plan: Launch[Any]) -> trtp.SymExprs:
    """The int32 scalars, which a kernel takes between its inputs and outputs."""
    arguments = trtp.SymIntExprs(len(plan.scalars))
    for index, value in enumerate(plan.scalars):
        arguments[index] = trtp.SymInt32(value)
    return arguments
