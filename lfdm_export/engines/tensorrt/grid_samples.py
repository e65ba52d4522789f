"""How plans sample pictures: said to the builder, whatever its parser made of the graph.

Some parsers of TensorRT read ONNX GridSample of mode "linear", as opset 20 calls it, as *nearest* (reported for
TensorRT 10.13 and 11.1, onnx-tensorrt issue 1060; that of TensorRT for RTX 1.7.1 reads it rightly). Every warp is such
a sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lfdm_export.errors import EngineError

if TYPE_CHECKING:
    import onnx

#: How every grid-sample layer of a plan samples, as fingerprints say it.
GRID_SAMPLING = "linear, zeros outside, corners not aligned"
# The same as attributes of GridSample, with what stands for an attribute that is left out. Opsets before 20 say
# "bilinear".
_ATTRIBUTES = {
    "mode": ("linear", ("linear", "bilinear")),
    "padding_mode": ("zeros", ("zeros",)),
    "align_corners": (0, (0,)),
}


def require_grid_sampling(model: onnx.ModelProto) -> None:
    """Refuse a graph that samples in another way than plans do.

    Raises:
        EngineError: a GridSample of the graph, or of one of its functions, has other attributes.
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
    """Set how each grid-sample layer of a parsed network samples, and read it back.

    Args:
        trt: the module of TensorRT or of TensorRT for RTX.
        network: that the parser filled.

    Returns:
        How many layers the parser had read otherwise.

    Raises:
        EngineError: a layer does not keep what it was told.
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
    """A network gives its layers as of their common class, which has none of the properties of their own."""
    layer.__class__ = trt.IGridSampleLayer
