"""Drives TensorRT's Python layer for quickly deployable plugins, without TensorRT's libraries or a GPU.

Runs as a separate program, because it puts stubs into the process: empty versions of the nine functions that the
bindings need to load, a registry, and symbolic dimensions. Everything between the plugin and those is NVIDIA's code: it
checks signatures, combines types and requests kernels.

    python tests/plugin_driver.py FOLDER COMPILER

The stubs' libraries are written to FOLDER; cases are read from FOLDER/cases.json, results are written to
FOLDER/results.json. A case is {"op", "inputs": [{"shape", "type"}], "attributes", "batch"}; a null dimension is
dynamic, and has the value of "batch" for that input when the engine runs. A result has the plugin's outputs for each
combination of types and layouts.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import operator
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip


def load_bindings(folder: Path, compiler: str) -> Any:
    """Import `tensorrt` on libraries with empty versions of the functions that it is linked to."""
    source = folder / "nothing.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS))
    for name in LIBRARIES:
        soname = f"lib{name}.so.11"
        library = folder / soname
        command = [compiler, "-x", "c", str(source), "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(library)]
        subprocess.run(command, check=True)
        ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
    bindings = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = bindings
    return bindings


class Dimension:
    """A symbolic dimension: a constant, or a value known only when the engine runs."""

    def __init__(self, value: int, constant: bool) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value

    def is_size_tensor(self) -> bool:
        return False


class Builder:
    """Builds expressions."""

    def __init__(self, trt: Any) -> None:
        kinds = trt.DimensionOperation
        self._functions: dict[Any, Callable[[int, int], int]] = {
            kinds.SUM: operator.add,
            kinds.SUB: operator.sub,
            kinds.PROD: operator.mul,
            kinds.FLOOR_DIV: operator.floordiv,
            kinds.CEIL_DIV: lambda a, b: -(-a // b),
            kinds.MAX: max,
            kinds.MIN: min,
        }

    def constant(self, value: int) -> Dimension:
        return Dimension(value, True)

    def operation(self, kind: Any, first: Dimension, second: Dimension) -> Dimension:
        both = first.constant and second.constant
        return Dimension(self._functions[kind](first.value, second.value), both)


class Registry:
    """Stores plugin creators."""

    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class SymbolicArgument:
    """Replaces `ISymExpr`, whose expression must be an object of TensorRT."""


class Setter:
    """Collects the scalars."""

    def __init__(self) -> None:
        self.nbSymExprs = 0
        self.values: dict[int, Any] = {}

    def __setitem__(self, index: int, value: Any) -> None:
        self.values[index] = value


def run_case(trt: Any, registry: Registry, case: dict[str, Any]) -> dict[str, Any]:
    """Run a plugin from its creation by the parser to its kernels."""
    creator = registry.get_creator(case["op"], "1", "lfdm")
    fields = creator.field_names
    names = [field.name for field in fields]
    plugin = creator.create_plugin(
        case["op"], "lfdm", parser_fields(trt, names, case["attributes"]), trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.PREFER_AOT,
    )  # fmt: skip
    builder = Builder(trt)
    types = [getattr(trt.DataType, tensor["type"]) for tensor in case["inputs"]]
    shapes = [tensor["shape"] for tensor in case["inputs"]]
    output_types = plugin.get_output_data_types(types, [len(shape) for shape in shapes])
    dimensions = [
        [Dimension(case["batch"][i] if size is None else size, size is not None) for size in shape]
        for i, shape in enumerate(shapes)
    ]
    output_shapes = output_shapes_of(plugin, dimensions, builder)
    concrete = [[-1 if size is None else size for size in shape] for shape in shapes]
    concrete += [[size.value if size.constant else -1 for size in shape] for shape in output_shapes]
    described = [description(trt, shape, None) for shape in concrete]
    supported = plugin.get_supported_format_combinations(described, len(shapes))
    step = len(concrete)
    results = []
    for start in range(0, len(supported), step):
        chosen = supported[start : start + step]
        results.append(run_combination(trt, plugin, concrete, chosen, len(shapes), builder))
    return {
        "fields": names,
        "output_types": [kind.name for kind in output_types],
        "output_shapes": [[size.value for size in shape] for shape in output_shapes],
        "combinations": results,
    }


def output_shapes_of(plugin: Any, dimensions: list[list[Dimension]], builder: Builder) -> list[list[Dimension]]:
    """Return the shapes of the outputs, as the plugin's expressions."""
    return [list(shape) for shape in plugin.get_output_shapes(dimensions, [], builder)]


def parser_fields(trt: Any, names: list[str], attributes: dict[str, Any]) -> Any:
    """Return attributes as the ONNX parser passes them: in the creator's order, INT as int32, FLOAT as float32."""
    import numpy as np

    fields = []
    for name in names:
        value = attributes[name]
        kind = (np.int32, trt.PluginFieldType.INT32) if isinstance(value, int) else (
            np.float32, trt.PluginFieldType.FLOAT32)  # fmt: skip
        fields.append(trt.PluginField(name, np.array([value], kind[0]), kind[1]))
    return trt.PluginFieldCollection(fields)


def description(trt: Any, shape: list[int], chosen: Any) -> Any:
    """Describe a tensor as autotuning and the build do."""
    dynamic = trt.DynamicPluginTensorDesc()
    desc = trt.PluginTensorDesc()
    desc.dims = shape
    desc.type = trt.float32 if chosen is None else chosen.type
    desc.format = trt.TensorFormat.LINEAR if chosen is None else chosen.format
    desc.scale = 1.0
    dynamic.desc = desc
    return dynamic


def run_combination(
    trt: Any, plugin: Any, shapes: list[list[int]], chosen: list[Any], inputs: int, builder: Builder
) -> dict[str, Any]:
    """Return tactics, launch, scalars and kernel of one combination of types and layouts."""
    described = [description(trt, shape, one) for shape, one in zip(shapes, chosen, strict=True)]
    plugin.configure_plugin(described[:inputs], described[inputs:])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(tactics[0])
    launch, setter = SimpleNamespace(), Setter()
    plugin.get_launch_params(None, described, inputs, launch, setter, builder)
    name, text = plugin.get_kernel([d.desc for d in described[:inputs]], [d.desc for d in described[inputs:]])
    assert sorted(setter.values) == list(range(setter.nbSymExprs))
    return {
        "types": [one.type.name for one in chosen],
        "layouts": [one.format.name for one in chosen],
        "tactics": tactics,
        "kernel": name,
        "text": text.decode(),
        "grid": [getattr(launch, f"grid_{axis}").expr.value for axis in "xyz"],
        "block": [getattr(launch, f"block_{axis}").expr.value for axis in "xyz"],
        "shared": launch.shared_mem.expr.value,
        "scalars": [setter.values[i].expr.value for i in range(setter.nbSymExprs)],
        "scalar_types": sorted({setter.values[i].dtype.name for i in range(setter.nbSymExprs)}),
    }


def main() -> int:
    """Run all cases."""
    folder, compiler = Path(sys.argv[1]), sys.argv[2]
    trt = load_bindings(folder, compiler)
    registry = Registry()
    trt.get_plugin_registry = lambda: registry
    trt.IDimensionExpr, trt.ISymExpr = Dimension, SymbolicArgument

    class Shapes(list[Any]):  # replaces DimsExprs, which holds only TensorRT's expressions
        def __init__(self, size: int) -> None:
            super().__init__([None] * size)

    trt.DimsExprs = Shapes
    from lfdm_export.ops.plugins import register_plugins

    registered = register_plugins()
    assert register_plugins() == registered
    results = [
        run_case(trt, registry, case) for case in json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    ]
    (folder / "results.json").write_text(json.dumps({"registered": registered, "results": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
