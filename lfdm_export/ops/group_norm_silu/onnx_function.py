"""GroupNormSilu and ModulatedGroupNormSilu as model-local ONNX functions.

Statistics are taken a frame at a time and then averaged over the frames, so that (B·T, C, h, w) need not be
permuted; norm and modulation are one product and one sum a value.
"""

from __future__ import annotations

import onnx
import onnx.parser

from lfdm_export.ops.group_norm_silu.reference import EPSILON
from lfdm_export.ops.symbolic import DOMAIN, OPSET

_BODY = """
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    unit = Constant <value_floats = [1.0]> ()
    epsilon = Constant <value_floats = [{epsilon}]> ()
    grouped_shape = Constant <value_ints: ints = @grouped> ()
    per_group_shape = Constant <value_ints: ints = @per_group> ()
    per_channel_shape = Constant <value_ints: ints = @per_channel> ()
    clip_shape = Constant <value_ints: ints = @clip> ()
    flat_shape = Constant <value_ints: ints = @flat> ()
    x_grouped = Reshape (x, grouped_shape)
    x_squared = Mul (x_grouped, x_grouped)
    frame_mean = ReduceMean <keepdims = 0> (x_grouped, last)
    frame_square = ReduceMean <keepdims = 0> (x_squared, last)
    mean = ReduceMean <keepdims = 0> (frame_mean, one)
    square = ReduceMean <keepdims = 0> (frame_square, one)
    mean_squared = Mul (mean, mean)
    variance = Sub (square, mean_squared)
    stable = Add (variance, epsilon)
    deviation = Sqrt (stable)
    rstd = Reciprocal (deviation)
    gamma_grouped = Reshape (gamma, per_group_shape)
    beta_grouped = Reshape (beta, per_group_shape)
    rstd_column = Unsqueeze (rstd, last)
    mean_column = Unsqueeze (mean, last)
    norm_factor_grouped = Mul (rstd_column, gamma_grouped)
    moved = Mul (mean_column, norm_factor_grouped)
    norm_offset_grouped = Sub (beta_grouped, moved)
    norm_factor = Reshape (norm_factor_grouped, per_channel_shape)
    norm_offset = Reshape (norm_offset_grouped, per_channel_shape)
    {modulation}
    x_clip = Reshape (x, clip_shape)
    scaled = Mul (x_clip, factor)
    normed = Add (scaled, offset)
    gate = Sigmoid (normed)
    activated = Mul (normed, gate)
    y = Reshape (activated, flat_shape)
"""

_MODULATION = """
    scale_channels = Reshape (scale, per_channel_shape)
    shift_channels = Reshape (shift, per_channel_shape)
    gain = Add (scale_channels, unit)
    factor = Mul (norm_factor, gain)
    gained = Mul (norm_offset, gain)
    offset = Add (gained, shift_channels)
"""

_NO_MODULATION = """
    factor = Identity (norm_factor)
    offset = Identity (norm_offset)
"""


def group_norm_silu_functions() -> list[onnx.FunctionProto]:
    """GroupNormSilu(x, gamma, beta) and ModulatedGroupNormSilu(x, gamma, beta, scale, shift), as in `reference`."""
    return [
        _function("GroupNormSilu", "x, gamma, beta", _NO_MODULATION),
        _function("ModulatedGroupNormSilu", "x, gamma, beta, scale, shift", _MODULATION),
    ]


def _function(name: str, inputs: str, modulation: str) -> onnx.FunctionProto:
    text = f"""
<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>
{name} <grouped, per_group, per_channel, clip, flat> ({inputs}) => (y) {{
    {_BODY.format(epsilon=EPSILON, modulation=modulation)}
}}
"""
    return onnx.parser.parse_function(text)
