"""Graphs for the GPU providers of ONNX Runtime: bodies for a GPU, and a check that the GPU runs all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfdm_export.errors import EngineError, MissingDependencyError
from lfdm_export.files.names import require_utf8

# ONNX Runtime deliberately computes shapes on the CPU: the host needs them to start kernels. For float inputs,
# the GPU providers have kernels for all of these operators.
# fmt: off
_OF_SHAPES = frozenset({
    "Add", "Cast", "Concat", "ConstantOfShape", "Div", "Equal", "Expand", "Gather", "Identity", "Max", "Min", "Mod",
    "Mul", "Range", "ReduceProd", "Reshape", "Shape", "Size", "Slice", "Squeeze", "Sub", "Unsqueeze", "Where",
})
# fmt: on
_PLACEMENT = "get_provider_graph_assignment_info"
_CPU = "CPUExecutionProvider"


def gpu_graph(path: Path, options: Any) -> bytes:
    """Load a stored graph with operator bodies for a GPU, which need fewer kernels than those for a CPU.

    Args:
        path: the checked .onnx file; external data is in the same folder.
        options: `onnxruntime.SessionOptions`, changed in place: they get that folder, and record where nodes run.

    Returns:
        The serialized model.

    Raises:
        EngineError: the file is not a graph.
        MissingDependencyError: onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("onnx", "running graphs on a GPU", "gpu") from error
    from google.protobuf.message import DecodeError

    from lfdm_export.graphs.bodies import with_bodies

    try:
        stored = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise EngineError(f"ONNX Runtime cannot load {path}: {error}; export again") from error
    folder = require_utf8(path.parent.resolve(), "ONNX Runtime")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    serialized: bytes = with_bodies(stored, "tensorrt").SerializeToString(deterministic=True)
    return serialized


def require_on_gpu(session: Any, path: Path) -> None:
    """Reject a loaded session that would run part of its graph on the CPU.

    Raises:
        EngineError: some nodes would run there; or this ONNX Runtime cannot report it.
    """
    if not hasattr(session, _PLACEMENT):
        raise EngineError(
            "this onnxruntime cannot say which nodes it places on a GPU, and may run some on the CPU; "
            "install a newer one (tried with 1.32): pip install --upgrade onnxruntime-gpu"
        )
    left = Counter(node.op_type for node in _on_cpu(session) if node.domain or node.op_type not in _OF_SHAPES)
    if left:
        named = ", ".join(f"{count} {name}" for name, count in left.most_common(5))
        raise EngineError(
            f"ONNX Runtime would run {sum(left.values())} nodes of {path} on the CPU ({named}), for which its GPU "
            "provider has no kernels; take another version of onnxruntime-gpu, another --target, or the device 'cpu'"
        )


def _on_cpu(session: Any) -> Iterator[Any]:
    for part in getattr(session, _PLACEMENT)():
        if part.ep_name == _CPU:
            yield from part.get_nodes()
