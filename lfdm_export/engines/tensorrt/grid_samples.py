"""Sets how plans sample pictures, regardless of how the parser reads the graph.

Some parsers of TensorRT read ONNX GridSample with mode "linear", the name in opset 20, as *nearest* (reported for
TensorRT 10.13 and 11.1, onnx-tensorrt issue 1060; the parser of TensorRT for RTX 1.7.1 is correct). Every warp uses
such a sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lfdm_export.errors import EngineError

if TYPE_CHECKING:
    import onnx

#: How every grid-sample layer of a plan samples, as written in fingerprints.
GRID_SAMPLING = "linear, zeros outside, corners not aligned"
# The same as attributes of GridSample, with the default of an omitted attribute. Opsets before 20 say
# "bilinear".
_ATTRIBUTES = {
    "mode": ("linear", ("linear", "bilinear")),
    "padding_mode": ("zeros", ("zeros",)),
    "align_corners": (0, (0,)),
}


def require_grid_sampling(model: onnx.ModelProto) -> None:
    """Reject a graph that samples differently from plans.

    Raises:
        EngineError: a GridSample in the graph, or in one of its functions, has other attributes.
    """
    import onnx

    bodies: Iterable[Iterable[onnx.NodeProto]] = (model.graph.node, *(function.node for function in model.functions))
    for node in (node for body in bodies for node in body if node.op_type == "GridSample"):
        given = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        for name, (default, allowed) in _ATTRIBUTES.items():
            found = given.get(name, default)
            found = found.decode(errors="replace") if isinstance(found, bytes) else found
            if found not in allowed:
                raise EngineError(
                    f"the graph has a GridSample of {name} {found!r}, expected {allowed[0]!r}; export again"
                )


def set_grid_sampling(trt: Any, network: Any) -> int:
    """Set how each grid-sample layer of a parsed network samples, and verify it.

    Args:
        trt: the Python module of TensorRT or of TensorRT for RTX.
        network: a network from the parser.

    Returns:
        Number of layers that the parser had read differently.

    Raises:
        EngineError: a layer does not keep its setting.
    """
    wanted = {
        "interpolation_mode": trt.InterpolationMode.LINEAR,
        "sample_mode": trt.SampleMode.FILL,
        "align_corners": False,
    }
    otherwise = 0
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type != trt.LayerType.GRID_SAMPLE:
            continue
        _as_grid_sample(trt, layer)
        otherwise += any(getattr(layer, name) != value for name, value in wanted.items())
        for name, value in wanted.items():
            setattr(layer, name, value)
        kept = network.get_layer(index)
        _as_grid_sample(trt, kept)
        for name, value in wanted.items():
            if getattr(kept, name) != value:
                raise EngineError(
                    f"the builder keeps {name} {getattr(kept, name)} of the grid-sample layer {layer.name!r}, "
                    f"expected {value}; take another version of it, or --target onnxruntime"
                )
    return otherwise


def _as_grid_sample(trt: Any, layer: Any) -> None:
    """Cast a layer to its own class: a network returns layers as their base class, without their properties."""
    layer.__class__ = trt.IGridSampleLayer
