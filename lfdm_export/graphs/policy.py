"""Groups of nodes that stay float32 in a graph of lower precision; docs/precision.md has the measurements.

A node is identified by its operator and by its module, whose path its name begins with (see `module_of`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

# The last part of a node's name is its own; the part before it is the module.
_SEPARATOR = "/"


@dataclass(frozen=True)
class Group:
    """Nodes that stay float32 or are lowered together.

    Attributes:
        meaning: what they compute, in words.
        has: whether a node belongs to the group.
    """

    meaning: str
    has: Callable[[ir.Node], bool]


def module_of(node: ir.Node) -> str:
    """Path of a node's module, as in a state dict; "" for the stage itself."""
    return (node.name or "").rpartition(_SEPARATOR)[0]


def node_name(module: str, output: str) -> str:
    """Name of the node of a module that computes an output."""
    return f"{module}{_SEPARATOR}{output}"


def _in(pattern: str, *operators: str) -> Callable[[ir.Node], bool]:
    """Nodes whose whole module path matches, with these operators (default: all)."""
    path = re.compile(pattern)
    return lambda node: path.fullmatch(module_of(node)) is not None and (not operators or node.op_type in operators)


def _warps_image(node: ir.Node) -> bool:
    source = node.inputs[0] if node.op_type in ("Warp", "WarpBlend") else None
    return source is not None and source.name == "image"


_DM = r"(denoise\.)?unet"
_FLOW = r"lfae\.generator\.pixelwise_flow_predictor"

#: Every group by name, in the order in which a clip passes through them.
GROUPS: Mapping[str, Group] = {
    "time": Group("embedding of the timestep", _in(rf"{_DM}\.time_mlp(\..*)?")),
    "guidance": Group("mixture of both predictions", _in(rf"{_DM}\.guidance")),
    "sampler": Group("estimate of x0, threshold, update", lambda node: node.op_type == "ThresholdedStep"),
    "modulation": Group("scales and shifts from the condition", _in(rf"{_DM}\.modulation(\..*)?")),
    "input convolution": Group("convolution of the noisy latent", _in(rf"{_DM}\.latent_conv")),
    "output blocks": Group("the two heads", _in(rf"{_DM}\.final_(blocks|convs)\..*")),
    "temporal attention": Group("norm, products, softmax over time", _in(rf"{_DM}\.(.*\.)?(init_|mid_)?temporal")),
    "spatial attention": Group("norm, products, softmax over pixels", _in(rf"{_DM}\.(.*\.)?(mid_)?spatial")),
    "spatial softmax": Group("softmax of linear attention", _in(rf"{_DM}\..*\.spatial", "Softmax")),
    "group norms": Group(
        "group norm, modulation and SiLU", _in(rf"{_DM}\..*", "GroupNormSilu", "ModulatedGroupNormSilu")
    ),
    "encoder": Group("encoder of the image", _in(r"generator(\..*)?")),
    "context": Group("the DM's response to the feature", _in(r"context")),
    "bottleneck": Group("residual blocks at the coarsest size", _in(r"bottleneck(\..*)?")),
    "up-sampling": Group("convolutions of the decoder", _in(r"ups\..*")),
    "picture": Group(
        "sigmoid and blending of the decoder's output",
        lambda node: _warps_image(node) or _in("", "Sigmoid")(node),
    ),
    "anti-aliasing": Group("Gaussian that shrinks the images", _in(r"lfae\..*\.down")),
    "regions": Group("moments of the heatmaps, principal axes", _in(r"lfae\.region_predictor")),
    "region network": Group("hourglass of the heatmaps", _in(r"lfae\.region_predictor\.(predictor|regions)(\..*)?")),
    "background": Group("affine motion of the background", _in(r"lfae\.bg_predictor(\.fc)?")),
    "background network": Group("encoder of the background", _in(r"lfae\.bg_predictor\.encoder(\..*)?")),
    "flow": Group("sparse motions, their mixture, occlusion", _in(_FLOW)),
    "flow network": Group("hourglass of mask and occlusion", _in(rf"{_FLOW}\.(hourglass|mask|occlusion)(\..*)?")),
    "pooling": Group("mean over the tokens", _in("", "ReduceSum")),
}

#: Groups that stay float32. Values that depend on inputs only, such as sampling coordinates, always stay float32.
KEPT: frozenset[str] = frozenset(
    ("time", "guidance", "sampler", "picture", "anti-aliasing", "regions", "background", "flow", "pooling")
)
