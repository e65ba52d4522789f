"""SmallConv as a model-local ONNX function: Winograd's F(2x2, 3x3) with matrix products, or one Conv.

In Winograd's form, the pixels' transforms are two products with small constant matrices; the convolution itself is one
batched product with 2.25 times fewer multiplications. Kernels are transformed inside the graph, so that weights are
stored once and engines fold the transform at load time.

Source: Lavin & Gray, Fast Algorithms for Convolutional Neural Networks (arXiv 1509.09308), Sec. 4.1.
"""

from __future__ import annotations

import onnx

from lfdm_export.ops.body import parse_body

_SIGNATURE = "SmallConv <height, width> (x, weight, bias, kernel, spread, gather) => (y)"


def small_conv_function() -> onnx.FunctionProto:
    """SmallConv(x, weight, bias, kernel, spread, gather), as in `reference`."""
    return parse_body(
        _SIGNATURE,
        """
    zero = Constant <value_ints = [0]> ()
    minus = Constant <value_ints = [-1]> ()
    sixteen = Constant <value_ints = [16]> ()
    flat_last = Constant <value_ints = [0, 0, -1]> ()
    height_0d = Constant <value_int: int = @height> ()
    width_0d = Constant <value_int: int = @width> ()
    height_1d = Unsqueeze (height_0d, zero)
    width_1d = Unsqueeze (width_0d, zero)
    in_channels = Shape <start = 1, end = 2> (weight)
    out_channels = Shape <start = 0, end = 1> (weight)
    taps = Reshape (weight, flat_last)
    transformed = MatMul (taps, kernel)
    kernels = Transpose <perm = [2, 1, 0]> (transformed)
    channels_first = Reshape (x, flat_last)
    pixels = Transpose <perm = [0, 2, 1]> (channels_first)
    values = MatMul (spread, pixels)
    rows = Shape <start = 0, end = 1> (spread)
    tiles = Div (rows, sixteen)
    by_value_shape = Concat <axis = 0> (minus, sixteen, tiles, in_channels)
    by_value = Reshape (values, by_value_shape)
    value_first = Transpose <perm = [1, 0, 2, 3]> (by_value)
    product_shape = Concat <axis = 0> (sixteen, minus, in_channels)
    tiles_of_all = Reshape (value_first, product_shape)
    products = MatMul (tiles_of_all, kernels)
    split_shape = Concat <axis = 0> (sixteen, minus, tiles, out_channels)
    split = Reshape (products, split_shape)
    map_first = Transpose <perm = [1, 0, 2, 3]> (split)
    gathered_shape = Concat <axis = 0> (zero, minus, out_channels)
    gathered = Reshape (map_first, gathered_shape)
    summed = MatMul (gather, gathered)
    biased = Add (summed, bias)
    out_first = Transpose <perm = [0, 2, 1]> (biased)
    y_shape = Concat <axis = 0> (zero, out_channels, height_1d, width_1d)
    y = Reshape (out_first, y_shape)
""",
    )


def plain_small_conv_function() -> onnx.FunctionProto:
    """The same as one Conv, for backends that run it well on small maps; the transforms are unused."""
    return parse_body(_SIGNATURE, "y = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, weight, bias)")
