"""The operators Warp and WarpBlend."""

from lfdm_export.ops.operator import Operator
from lfdm_export.ops.warp.onnx_function import warp_function
from lfdm_export.ops.warp.openvino_function import openvino_warp_function

#: Index of the motion, which determines the sampling coordinates.
_MOTION = 1

WARPS = tuple(
    Operator(
        name,
        body=lambda nodes: warp_function(nodes.name),
        openvino=lambda nodes: openvino_warp_function(nodes.name),
        samples=True,
        float32_inputs=(_MOTION,),
        plugin="lfdm_export.ops.warp.plugin",
    )
    for name in ("Warp", "WarpBlend")
)
