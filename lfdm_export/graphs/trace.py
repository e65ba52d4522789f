"""Stage modules -> ONNX graphs with the names of the StageSpecs, and large weights in a file beside them."""

from __future__ import annotations

import ast
import hashlib
import inspect
import logging
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from torch import Tensor, nn

from lfdm_export.errors import ExportError
from lfdm_export.graphs.matching import quick_matching
from lfdm_export.graphs.policy import node_name
from lfdm_export.machine import torch_threads
from lfdm_export.ops.domain import DOMAIN, OPSET, VERSION
from lfdm_export.ops.operator import Nodes
from lfdm_export.ops.operators import find_operator
from lfdm_export.stages import BATCH, TOKENS, StageSpec, TensorSpec

logger = logging.getLogger(__name__)

#: Weights of at least this many bytes go into the external data file.
EXTERNAL_BYTES = 4096
# Alignment of external weights, so that they can be mapped and read with wide accesses.
_ALIGNMENT = 64
# Sizes of the dynamic axes while tracing: any but 0 and 1, which torch.export would treat as constants.
_TRACED_SIZES = {BATCH: 2, TOKENS: 7}
# Metadata in which the exporter stores a node's modules.
_SCOPES = "pkg.torch.onnx.name_scopes"
# Maximum size of each dynamic axis in the traced graph; BERT has 512 positions.
_LARGEST = {BATCH: 4096, TOKENS: 512}


def trace(module: nn.Module, inputs: Iterable[TensorSpec], outputs: Iterable[TensorSpec]) -> ir.Model:
    """Export one module with a dynamic batch.

    Args:
        module: takes `inputs` and returns `outputs`, both in order.
        inputs: specifications of its inputs.
        outputs: specifications of its outputs.

    Returns:
        The graph in memory; it shares its weights with the module.

    Raises:
        ExportError: a dynamic size became fixed in the graph.
    """
    inputs, outputs = tuple(inputs), tuple(outputs)
    examples = tuple(example(spec, _TRACED_SIZES) for spec in inputs)
    axes = {name: torch.export.Dim(name, min=1, max=maximum) for name, maximum in _LARGEST.items()}
    shapes: tuple[object, ...] = tuple(
        {index: axes[axis] for index, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in inputs
    )
    if module.forward.__code__.co_flags & inspect.CO_VARARGS:
        named = module.forward.__code__.co_argcount - 1
        shapes = (*shapes[:named], shapes[named:])
    # The exporter logs internal warnings, and warns if torchvision is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), torch_threads(), quick_matching(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            examples,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    model = program.model
    for value, spec in zip(model.graph.inputs, inputs, strict=True):
        # If one way of tracing fails, the exporter uses others, and some lose the dynamic axes.
        if value.shape is None or any(
            isinstance(n, int) != isinstance(m, int) for n, m in zip(value.shape, spec.shape, strict=True)
        ):
            raise ExportError(
                f"the exported graph has lost a dynamic axis: {spec.name} is {value.shape}, expected {spec.shape}"
            )
    _add_functions(model)
    _name_nodes(model)
    _strip_metadata(model)
    model.producer_name, model.producer_version = "lfdm-export", None
    return model


def example(spec: TensorSpec, sizes: Mapping[str, int], generator: torch.Generator | None = None) -> Tensor:
    """A random input for a specification: uniform in its range, or normal without a range.

    Args:
        spec: the tensor.
        sizes: sizes of the dynamic axes, by name.
        generator: source of randomness.
    """
    shape = spec.concrete(**sizes)
    if spec.dtype == "int64":
        assert spec.low is not None
        assert spec.high is not None
        return torch.randint(int(spec.low), int(spec.high) + 1, shape, generator=generator)
    if spec.low is None or spec.high is None:
        return torch.randn(shape, generator=generator)
    return spec.low + (spec.high - spec.low) * torch.rand(shape, generator=generator)


def select(model: ir.Model, spec: StageSpec) -> ir.Model:
    """The part of a graph that computes a stage's outputs, with the stage's inputs.

    Args:
        model: has all of the stage's inputs and outputs, and others; it is not changed.
        spec: the stage.
    """
    part = model.clone()
    graph = part.graph
    by_name = {value.name: value for value in graph.outputs}
    outputs = [by_name[output.name] for output in spec.outputs]
    graph.outputs.clear()
    graph.outputs.extend(outputs)
    passes.RemoveUnusedNodesPass()(part)
    wanted = {tensor.name for tensor in spec.inputs}
    kept = [value for value in graph.inputs if value.name in wanted]
    graph.inputs.clear()
    graph.inputs.extend(kept)
    passes.RemoveUnusedFunctionsPass()(part)
    graph.name = spec.name
    return part


def save(models: Mapping[str, ir.Model], folder: Path, data_name: str) -> None:
    """Write graphs that share one file of large weights; equal weights are stored once.

    Args:
        models: by stage name; written to `folder`/NAME.onnx.
        folder: an existing folder.
        data_name: name of the weights' file in it.
    """
    offsets: dict[bytes, int] = {}
    with (folder / data_name).open("wb") as data:
        for name, model in models.items():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                assert tensor is not None
                if tensor.nbytes < EXTERNAL_BYTES:
                    continue
                raw = np.ascontiguousarray(tensor.numpy()).tobytes()
                key = hashlib.sha256(raw).digest()
                if key not in offsets:
                    data.write(b"\0" * (-data.tell() % _ALIGNMENT))
                    offsets[key] = data.tell()
                    data.write(raw)
                value.const_value = ir.ExternalTensor(
                    data_name,
                    offsets[key],
                    len(raw),
                    tensor.dtype,
                    shape=ir.Shape(tensor.shape.numpy()),
                    name=value.name or "",
                    base_dir=folder,
                )
            logger.debug("writing %s", name)
            proto = ir.to_proto(model)
            (folder / f"{name}.onnx").write_bytes(proto.SerializeToString(deterministic=True))


def _add_functions(model: ir.Model) -> None:
    """Add the bodies of the domain's operators in the graph, and the domain itself."""
    nodes: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph:
        if node.domain == DOMAIN:
            nodes.setdefault(node.op_type, []).append(ir.to_proto(node))
    for name, same in nodes.items():
        model.functions[DOMAIN, name, ""] = ir.serde.deserialize_function(find_operator(name).body(Nodes(name, same)))
    if nodes:
        model.graph.opset_imports[DOMAIN] = VERSION


def _name_nodes(model: ir.Model) -> None:
    """Name each node by its module and its first output, as `graphs.policy` expects."""
    for node in model.graph:
        # The path from the root, module by module; the last entry is the operation.
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        module = scopes[-2] if len(scopes) > 1 and scopes[0] == "" else ""
        node.name = node_name(module, node.outputs[0].name or "")


def _strip_metadata(model: ir.Model) -> None:
    """Remove the metadata about the program that each node came from."""
    for holder in (model, model.graph, *model.graph, *model.graph.inputs, *model.graph.initializers.values()):
        holder.metadata_props.clear()
        holder.doc_string = None
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()


def check(folder: Path, specs: Mapping[str, StageSpec]) -> None:
    """Check every stage's file with `onnx.checker`, shape inference included.

    Raises:
        ExportError: a graph is not valid.
    """
    for name in specs:
        path = folder / f"{name}.onnx"
        try:
            onnx.checker.check_model(str(path), full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise ExportError(f"the exported graph {path.name} is not valid ONNX: {error}") from error
