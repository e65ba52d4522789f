"""GroupNormSilu and ModulatedGroupNormSilu as model-local ONNX functions.

The bodies accept any floating type of `x`. Statistics, norm, modulation and activation are float32 in all of them; only
the result is rounded to the type of `x`.
"""

from __future__ import annotations

import onnx

from lfdm_export.ops.body import parse_body
from lfdm_export.ops.domain import EPSILON

_FLOAT32 = onnx.TensorProto.FLOAT

#: Groups' means and mean squares to one factor and one offset per channel; needs `last`, `epsilon` and the shapes.
NORM = """
    mean_squared = Mul (mean, mean)
    variance = Sub (square, mean_squared)
    stable = Add (variance, epsilon)
    deviation = Sqrt (stable)
    rstd = Reciprocal (deviation)
    gamma_grouped = Reshape (gamma_32, per_group_shape)
    beta_grouped = Reshape (beta_32, per_group_shape)
    rstd_column = Unsqueeze (rstd, last)
    mean_column = Unsqueeze (mean, last)
    norm_factor_grouped = Mul (rstd_column, gamma_grouped)
    moved = Mul (mean_column, norm_factor_grouped)
    norm_offset_grouped = Sub (beta_grouped, moved)
    norm_factor = Reshape (norm_factor_grouped, per_channel_shape)
    norm_offset = Reshape (norm_offset_grouped, per_channel_shape)
"""

# Statistics are computed per frame and then averaged over the frames, so that (B·T, C, h, w) need not be permuted. Norm
# and modulation are one product and one sum per value.
_REDUCED = f"""
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    unit = Constant <value_floats = [1.0]> ()
    epsilon = Constant <value_floats = [{EPSILON}]> ()
    grouped_shape = Constant <value_ints: ints = @grouped> ()
    per_group_shape = Constant <value_ints: ints = @per_group> ()
    per_channel_shape = Constant <value_ints: ints = @per_channel> ()
    clip_shape = Constant <value_ints: ints = @clip> ()
    flat_shape = Constant <value_ints: ints = @flat> ()
    x_32 = Cast <to = {_FLOAT32}> (x)
    gamma_32 = Cast <to = {_FLOAT32}> (gamma)
    beta_32 = Cast <to = {_FLOAT32}> (beta)
    x_grouped = Reshape (x_32, grouped_shape)
    x_squared = Mul (x_grouped, x_grouped)
    frame_mean = ReduceMean <keepdims = 0> (x_grouped, last)
    frame_square = ReduceMean <keepdims = 0> (x_squared, last)
    mean = ReduceMean <keepdims = 0> (frame_mean, one)
    square = ReduceMean <keepdims = 0> (frame_square, one)
    {NORM}
    %s
    x_clip = Reshape (x_32, clip_shape)
    scaled = Mul (x_clip, factor)
    normed = Add (scaled, offset)
    gate = Sigmoid (normed)
    activated = Mul (normed, gate)
    activated_flat = Reshape (activated, flat_shape)
    y = CastLike (activated_flat, x)
"""

_REDUCED_MODULATION = f"""
    scale_32 = Cast <to = {_FLOAT32}> (scale)
    shift_32 = Cast <to = {_FLOAT32}> (shift)
    scale_channels = Reshape (scale_32, per_channel_shape)
    shift_channels = Reshape (shift_32, per_channel_shape)
    gain = Add (scale_channels, unit)
    factor = Mul (norm_factor, gain)
    gained = Mul (norm_offset, gain)
    offset = Add (gained, shift_channels)
"""

#: Without modulation.
PLAIN = """
    factor = Identity (norm_factor)
    offset = Identity (norm_offset)
"""

# One TensorRT layer, after a permutation to (B, C, T, h, w); it computes its statistics in float32 whatever the type of
# `x` (attribute `stash_type`).
_WHOLE = f"""
    unit = Constant <value_floats = [1.0]> ()
    clip_shape = Constant <value_ints: ints = @clip> ()
    flat_shape = Constant <value_ints: ints = @flat> ()
    gamma_like = CastLike (gamma, x)
    beta_like = CastLike (beta, x)
    x_clip = Reshape (x, clip_shape)
    x_channels = Transpose <perm = [0, 2, 1, 3, 4]> (x_clip)
    x_normed = GroupNormalization <epsilon = {EPSILON}, num_groups = %d> (x_channels, gamma_like, beta_like)
    %s
    gate = Sigmoid (normed)
    activated = Mul (normed, gate)
    activated_clip = Transpose <perm = [0, 2, 1, 3, 4]> (activated)
    y = Reshape (activated_clip, flat_shape)
"""

_WHOLE_MODULATION = """
    inner = Constant <value_ints = [2, 3, 4]> ()
    scale_like = CastLike (scale, x)
    shift_like = CastLike (shift, x)
    unit_like = CastLike (unit, x)
    gain = Add (scale_like, unit_like)
    gain_channels = Unsqueeze (gain, inner)
    shift_channels = Unsqueeze (shift_like, inner)
    gained = Mul (x_normed, gain_channels)
    normed = Add (gained, shift_channels)
"""

_WHOLE_PLAIN = "normed = Identity (x_normed)"


#: The operators' attributes, and by name their inputs.
ATTRIBUTES = "<grouped, per_group, per_channel, clip, flat>"
INPUTS = {"GroupNormSilu": "x, gamma, beta", "ModulatedGroupNormSilu": "x, gamma, beta, scale, shift"}


def group_norm_silu_function(name: str) -> onnx.FunctionProto:
    """GroupNormSilu(x, gamma, beta) or ModulatedGroupNormSilu(x, gamma, beta, scale, shift), as in `reference`."""
    return _function(name, _REDUCED % {"GroupNormSilu": PLAIN, "ModulatedGroupNormSilu": _REDUCED_MODULATION}[name])


def whole_group_norm_silu_function(name: str, groups: int) -> onnx.FunctionProto:
    """The same with GroupNormalization, for that number of groups."""
    modulation = {"GroupNormSilu": _WHOLE_PLAIN, "ModulatedGroupNormSilu": _WHOLE_MODULATION}[name]
    return _function(name, _WHOLE % (groups, modulation))


def _function(name: str, body: str) -> onnx.FunctionProto:
    return parse_body(f"{name} {ATTRIBUTES} ({INPUTS[name]}) => (y)", body)
