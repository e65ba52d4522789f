"""A stage's graph as stored, checked before it is processed."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from lfdm_export.errors import EngineError
from lfdm_export.graphs.file import check_graph
from lfdm_export.stages import StageSpec
from lfdm_export.wording import one_line


def load_stage(path: Path, spec: StageSpec) -> onnx.ModelProto:
    """Load a graph without its large weights, if it is valid ONNX and the expected stage.

    Args:
        path: the .onnx file, with external data beside it.
        spec: the stage.

    Raises:
        EngineError: the file cannot be read, is not valid, is another stage, or reads other files than those beside it.
    """
    check_graph(path, spec)
    try:
        stored = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(_without_data(stored))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise EngineError(
            f"cannot load {path}, which is not valid ONNX: {one_line(error, 300)}; export again"
        ) from error
    return stored


def _without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with external weights as inputs: the checker rejects symbolic links, which the hub's cache uses."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    external = [tensor for tensor in bare.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        bare.graph.initializer.remove(tensor)
    return bare
