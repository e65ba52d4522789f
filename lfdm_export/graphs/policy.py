"""What stays float32 in a graph of lower precision, by groups of nodes; docs/precision.md has the measurements.

A node is known by its operator and by the module that it came from, which its name begins with (see `module_of`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

# The last part of a node's name is its own; what stands before it is the module.
_SEPARATOR = "/"


@dataclass(frozen=True)
class Group:
    """Nodes that are kept or lowered together.

    Attributes:
        meaning: what they compute, in words.
        has: tells whether a node is one of them.
    """

    meaning: str
    has: Callable[[ir.Node], bool]


def module_of(node: ir.Node) -> str:
    """Path of the module that a node came from, as in a state dict; "" for the stage's own."""
    return (node.name or "").rpartition(_SEPARATOR)[0]


def node_name(module: str, output: str) -> str:
    """Name of the node of a module that makes an output."""
    return f"{module}{_SEPARATOR}{output}"


def _in(pattern: str, *operators: str) -> Callable[[ir.Node], bool]:
    """Nodes whose whole module path matches, of these operators (all if none are given)."""
    path = re.compile(pattern)
    return lambda node: path.fullmatch(module_of(node)) is not None and (not operators or node.op_type in operators)


def _warps_image(node: ir.Node) -> bool:
    source = node.inputs[0] if node.op_type in ("Warp", "WarpBlend") else None
    return source is not None and source.name == "image"


_DM = r"(denoise\.)?unet"
_FLOW = r"lfae\.generator\.pixelwise_flow_predictor"

#: Every group by name. The order is that of a clip's way.
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

#: Groups that stay float32. What only comes from inputs, such as sampling coordinates, stays float32 by itself.
KEPT: frozenset[str] = frozenset(
    ("time", "guidance", "sampler", "picture", "anti-aliasing", "regions", "background", "flow", "pooling")
)
