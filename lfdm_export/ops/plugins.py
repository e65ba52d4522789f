"""The operators that have TensorRT plugins."""

from __future__ import annotations

import importlib

from lfdm_export.errors import MissingDependencyError

#: Operators of domain `lfdm` that a plugin can take over.
PLUGINS = ("Warp", "WarpBlend", "ThresholdedStep")

_MODULES = ("lfdm_export.ops.warp.plugin", "lfdm_export.ops.thresholded_step.plugin")


def register_plugins() -> tuple[str, ...]:
    """Make TensorRT's parser take the plugins in place of the operators' ONNX functions, in this process.

    Nothing is compiled yet: a kernel is when an engine that uses it is built.

    Returns:
        `PLUGINS`.

    Raises:
        MissingDependencyError: TensorRT's Python package is not installed (TensorRT for RTX has no such plugins).
        EngineError: at build: NVRTC, which compiles the kernels, is not there.
    """
    try:
        for module in _MODULES:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "tensorrt":
            raise
        raise MissingDependencyError("tensorrt", "running kernels as TensorRT plugins", "tensorrt") from error
    return PLUGINS
