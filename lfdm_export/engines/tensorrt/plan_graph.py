"""The graph of a stage for a builder, and the part of it that does not depend on the values of the weights."""

from __future__ import annotations

import hashlib

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import spec_of
from lfdm_export.engines.tensorrt.grid_samples import require_grid_sampling
from lfdm_export.errors import MissingDependencyError


def builder_graph(bundle: Bundle, stage: str, target: Target) -> tuple[bytes, str, tuple[str, ...]]:
    """The graph of a stage with the operator bodies for a target.

    Returns:
        The serialized model, whose large weights are external; SHA-256 of the model without the values of
        its floating-point weights; names of the files that hold its large weights.

    Raises:
        EngineError: the graph is that of another stage, is damaged, reads files outside its folder, or samples pictures
            differently from plans.
        MissingDependencyError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("onnx", "making plans", "export") from error
    from lfdm_export.graphs.bodies import with_bodies
    from lfdm_export.graphs.stored import load_stage

    model = with_bodies(load_stage(bundle.stage_path(stage), bundle.stages[stage]), spec_of(target).bodies)
    require_grid_sampling(model)
    graph = model.SerializeToString(deterministic=True)
    data_files: set[str] = set()
    integers = {onnx.TensorProto.INT32, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}
    for tensor in model.graph.initializer:
        data_files.update(entry.value for entry in tensor.external_data if entry.key == "location")
        if tensor.data_type not in integers:
            del tensor.external_data[:]
            tensor.ClearField("raw_data")
            del tensor.float_data[:]
            del tensor.int32_data[:]
    structure = hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()
    return graph, structure, tuple(sorted(data_files))
