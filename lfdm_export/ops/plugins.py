"""The operators that have TensorRT plugins."""

from __future__ import annotations

import importlib

from lfdm_export.errors import MissingDependencyError
from lfdm_export.ops.operators import OPERATORS


def register_plugins() -> tuple[str, ...]:
    """Make TensorRT's parser use the plugins instead of the operators' ONNX functions, in this process.

    Kernels are not compiled yet, but when an engine that uses them is built.

    Returns:
        Names of the operators with plugins.

    Raises:
        MissingDependencyError: TensorRT's Python package is not installed (TensorRT for RTX has no such plugins).
        EngineError: at build, if NVRTC, which compiles the kernels, is not available.
    """
    plugins = {operator.name: operator.plugin for operator in OPERATORS if operator.plugin}
    try:
        for module in dict.fromkeys(plugins.values()):
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "tensorrt":
            raise
        raise MissingDependencyError("tensorrt", "running kernels as TensorRT plugins", "tensorrt") from error
    return tuple(plugins)
