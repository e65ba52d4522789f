"""Floating-point operations of every stage: the faithful networks compared with the exported graphs.

A multiply-add counts as two. Convolutions, matrix products and attention are counted; norms, activations and samplings
are not (they move bytes rather than compute: `GridSample` is listed by its bytes).

    python benchmarks/flops.py BUNDLE [--steps 10] [--json FILE]

The networks are built from the bundle's configuration without weights, so no checkpoint is needed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnx.inliner
import onnx.shape_inference

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_models.config import LfdmConfig

Shape = tuple[int, ...]
#: Operators that compute but cannot be counted here yet.
_UNKNOWN = frozenset(
    {"Einsum", "ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul", "LSTM", "GRU", "RNN", "DeformConv"}
)
_BYTES = 4


@dataclass(frozen=True)
class Count:
    """The cost of one run of a graph or network.

    Attributes:
        flops: floating-point operations, by operator.
        sampled_bytes: bytes that `GridSample` reads and writes, in float32.
    """

    flops: dict[str, int] = field(default_factory=dict)
    sampled_bytes: int = 0

    @property
    def total(self) -> int:
        """FLOPs of all operators."""
        return sum(self.flops.values())

    def times(self, factor: int) -> Count:
        """The cost of `factor` runs."""
        return Count({op: factor * flops for op, flops in self.flops.items()}, factor * self.sampled_bytes)

    def __add__(self, other: Count) -> Count:
        ops = sorted(self.flops.keys() | other.flops.keys())
        flops = {op: self.flops.get(op, 0) + other.flops.get(op, 0) for op in ops}
        return Count(flops, self.sampled_bytes + other.sampled_bytes)


def count_graph(model: onnx.ModelProto, batch: int = 1) -> Count:
    """Count an ONNX graph, including its model-local functions.

    Args:
        model: every dynamic axis of its inputs is the batch; weights need not be loaded.
        batch: size of those axes.

    Raises:
        ValueError: a shape cannot be inferred, or an operator that computes cannot be counted.
    """
    model, shapes = _with_shapes(model, batch)
    flops: dict[str, int] = defaultdict(int)
    sampled = 0
    # Results of weights alone are computed once, when an engine loads the graph.
    constant = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        if all(name in constant for name in node.input if name):
            constant.update(node.output)
            continue
        if node.op_type in _UNKNOWN:
            raise ValueError(f"operator {node.op_type} ({node.name!r}) is not supported; add it to benchmarks/flops.py")
        if node.op_type == "GridSample":
            sampled += _BYTES * sum(math.prod(_shape(shapes, name)) for name in (*node.input, *node.output))
        elif node.op_type in _RULES:
            inputs = [_shape(shapes, name) for name in node.input if name]
            flops[node.op_type] += 2 * _RULES[node.op_type](node, inputs, _shape(shapes, node.output[0]))
    return Count(dict(flops), sampled)


def _with_shapes(model: onnx.ModelProto, batch: int) -> tuple[onnx.ModelProto, dict[str, Shape]]:
    """A copy with functions inlined and the batch fixed, and the shapes of all its values."""
    import onnx_ir as ir
    from onnxscript import optimizer

    copied = onnx.ModelProto()
    copied.CopyFrom(model)
    for value in copied.graph.input:
        for axis in value.type.tensor_type.shape.dim:
            if not axis.HasField("dim_value"):
                axis.dim_value = batch
    for value in copied.graph.output:
        value.type.tensor_type.ClearField("shape")
    del copied.graph.value_info[:]
    inlined = onnx.inliner.inline_local_functions(copied)
    del inlined.graph.value_info[:]
    # Constants are folded first: shape inference alone cannot follow the shape arithmetic of the warp.
    folded = ir.from_proto(inlined)
    optimizer.fold_constants(folded, onnx_shape_inference=True)
    inferred = onnx.shape_inference.infer_shapes(ir.to_proto(folded), strict_mode=True, data_prop=True)
    graph = inferred.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.value_info, *graph.input, *graph.output):
        axes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(axis.HasField("dim_value") for axis in axes):
            shapes[value.name] = tuple(axis.dim_value for axis in axes)
    return inferred, shapes


def _shape(shapes: dict[str, Shape], name: str) -> Shape:
    if name not in shapes:
        raise ValueError(f"the shape of {name!r} could not be inferred")
    return shapes[name]


def _convolution(_node: onnx.NodeProto, inputs: list[Shape], output: Shape) -> int:
    # The weight is (out, in / groups, kernel ...).
    return math.prod(output) * math.prod(inputs[1][1:])


def _transposed_convolution(_node: onnx.NodeProto, inputs: list[Shape], _output: Shape) -> int:
    # The weight is (in, out / groups, kernel ...): the number of products per input value.
    return math.prod(inputs[0]) * math.prod(inputs[1][1:])


def _matrix_product(node: onnx.NodeProto, inputs: list[Shape], output: Shape) -> int:
    if _attribute(node, "transBatchA", 0):
        raise ValueError(f"transBatchA of {node.name!r} is not supported; add it to benchmarks/flops.py")
    return math.prod(output) * inputs[0][-2 if _attribute(node, "transA", 0) else -1]


def _attention(node: onnx.NodeProto, inputs: list[Shape], _output: Shape) -> int:
    if len(node.input) > 4 and any(node.input[4:6]):
        raise ValueError(f"past keys of {node.name!r} are not supported; add them to benchmarks/flops.py")
    query, key, value = inputs[:3]
    if len(query) == 4:
        batch, heads, queries, width = query
        return batch * heads * queries * key[2] * (width + value[3])
    query_heads, kv_heads = _attribute(node, "q_num_heads", 1), _attribute(node, "kv_num_heads", 1)
    # Widths include all heads: the first product costs the query's width, the second its share of the value's.
    return query[0] * query[1] * key[1] * (query[2] + value[2] // kv_heads * query_heads)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), default)


#: Multiply-adds of a node, from the shapes of its inputs and first output.
_RULES: dict[str, Callable[[onnx.NodeProto, list[Shape], Shape], int]] = {
    "Conv": _convolution,
    "ConvTranspose": _transposed_convolution,
    "MatMul": _matrix_product,
    "FusedMatMul": _matrix_product,
    "Gemm": _matrix_product,
    "Attention": _attention,
}


def count_networks(config: LfdmConfig, frames: int, image_size: int) -> dict[str, Count]:
    """Count the faithful networks for one sample, on tensors without data.

    Args:
        config: the architecture.
        frames: T.
        image_size: H = W.

    Returns:
        Counts by name: `encode` (one image), `init_conv` (part of a step), `step`, `decode_frame` (one frame without
        the encoder, which the published program runs for every frame), `estimate_motion` (two images).
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lfdm_models.generator import Flow
    from lfdm_models.lfae import Lfae
    from lfdm_models.unet import LATENT_CHANNELS, Unet3D

    def count(run: Callable[[], object]) -> Count:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            run()
        return Count({str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts()["Global"].items()})

    size = config.latent_size(image_size)
    channels = config.dm.feature_channels
    with torch.device("meta"):
        lfae, unet = Lfae(config.lfae).eval(), Unet3D(config.dm).eval()
        image = torch.empty(1, config.lfae.image_channels, image_size, image_size)
        latent = torch.empty(1, LATENT_CHANNELS, frames, size, size)
        feature = torch.empty(1, channels, size, size)
        embedding = torch.empty(1, config.dm.text_width)
        timestep = torch.zeros(1, dtype=torch.int64)
        joined = torch.empty(1, LATENT_CHANNELS + channels, frames, size, size)
        flow = Flow(torch.empty(1, size, size, 2), torch.empty(1, 1, size, size))
        with torch.no_grad():
            skips = lfae.generator.encode(image)
    return {
        "encode": count(lambda: lfae.generator.encode(image)),
        "init_conv": count(lambda: unet.init_conv(joined)),
        "step": count(lambda: unet(latent, feature, embedding, timestep)),
        "decode_frame": count(lambda: lfae.generator.decode(image, skips, flow)),
        "estimate_motion": count(lambda: lfae.estimate_motion(image, image)),
    }


@dataclass(frozen=True)
class Row:
    """One line of the comparison: the work of the published program and of the exported graphs."""

    part: str
    network: Count
    exported: Count


def compare(bundle: Bundle, steps: int) -> list[Row]:
    """Count networks and graphs of a bundle for one clip of one sample.

    Args:
        bundle: the bundle, whose stages are counted with a batch of 1.
        steps: sampling steps of the clip.

    Raises:
        ValueError: a graph cannot be counted.
    """
    geometry = bundle.manifest.geometry
    frames = geometry.frames
    network = count_networks(bundle.manifest.config, frames, geometry.image_size)
    graphs = {
        stage: count_graph(onnx.load(bundle.stage_path(stage), load_external_data=False))
        for stage in ("encode", "step", "step_guided", "decode", "estimate_motion")
        if stage in bundle.stages
    }
    decode = (network["encode"] + network["decode_frame"]).times(frames)
    exported_decode = graphs["decode"].times(-(-frames // geometry.chunk_frames))
    clip = network["encode"] + network["step"].times(steps) + decode
    exported_clip = graphs["encode"] + graphs["step"].times(steps) + exported_decode
    return [
        Row("encode", network["encode"], graphs["encode"]),
        Row("step", network["step"], graphs["step"]),
        Row("step, guided", network["step"].times(2), graphs["step_guided"]),
        Row(f"decode of {frames} frames", decode, exported_decode),
        *(Row(name, network[name], graphs[name]) for name in ("estimate_motion",) if name in graphs),
        Row(f"clip of {steps} steps", clip, exported_clip),
    ]


def lines(rows: Sequence[Row]) -> Iterator[str]:
    """The comparison as a table, in GFLOP."""
    yield f"{'GFLOP (multiply-add = 2)':26s} {'network':>9s} {'exported':>9s} {'ratio':>6s} {'sampled MB':>11s}"
    for row in rows:
        before, after = row.network.total / 1e9, row.exported.total / 1e9
        megabytes = row.exported.sampled_bytes / 1e6
        yield f"{row.part:26s} {before:9.1f} {after:9.1f} {after / before:6.2f} {megabytes:11.1f}"
    yield ""
    yield "by operator, exported:"
    for row in rows:
        parts = sorted(row.exported.flops.items(), key=lambda item: -item[1])
        yield f"  {row.part:24s} " + ", ".join(f"{op} {flops / 1e9:.2f}" for op, flops in parts if flops > 5e6)


def main() -> int:
    """Count and print."""
    parser = argparse.ArgumentParser(description="Count the operations of a bundle's stages and of the networks.")
    parser.add_argument("bundle", type=Path, help="a folder that lfdm-export wrote")
    parser.add_argument("--steps", type=int, default=10, help="sampling steps of the clip (10)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers to FILE")
    arguments = parser.parse_args()

    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.errors import LfdmExportError
    from lfdm_export.files.atomic import write_file

    try:
        rows = compare(Bundle.open(arguments.bundle), arguments.steps)
    except (LfdmExportError, ValueError) as error:
        print(f"flops: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines(rows)))
    if arguments.json:
        write_file(arguments.json, (json.dumps([asdict(row) for row in rows], indent=1) + "\n").encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
