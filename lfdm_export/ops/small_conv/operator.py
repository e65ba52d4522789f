"""The operator SmallConv."""

from lfdm_export.ops.operator import Operator
from lfdm_export.ops.small_conv.onnx_function import plain_small_conv_function, small_conv_function

SMALL_CONV = Operator(
    "SmallConv",
    body=lambda _: small_conv_function(),
    openvino=lambda _: plain_small_conv_function(),
    tensorrt=lambda _: plain_small_conv_function(),
    rounded=lambda _: plain_small_conv_function(),  # Winograd's intermediate sums would be rounded
    has_weights=True,
)
