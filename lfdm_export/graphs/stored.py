"""A stage's graph as it is stored, checked before anything takes it apart."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from lfdm_export.errors import EngineError
from lfdm_export.graphs.file import check_graph
from lfdm_export.stages import StageSpec


def load_stage(path: Path, spec: StageSpec) -> onnx.ModelProto:
    """Load a graph without its large weights, if it is valid ONNX and the stage that it is meant to be.

    Args:
        path: the .onnx file; external data lies beside it.
        spec: the stage.

    Raises:
        EngineError: it cannot be read, is not valid, is another stage, or reads something that is not beside it.
    """
    check_graph(path, spec)
    try:
        stored = onnx.load(path, load_external_data=False)
        onnx.checker.check_model(_without_data(stored))
    except (DecodeError, onnx.checker.ValidationError, OSError, ValueError) as error:
        raise EngineError(
            f"cannot load {path}, which is no valid ONNX: {' '.join(str(error).split())[:300]}; export again"
        ) from error
    return stored


def _without_data(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its external weights as inputs: the checker refuses files that are links, as the hub's are."""
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    external = [tensor for tensor in bare.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        bare.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        bare.graph.initializer.remove(tensor)
    return bare
