"""GroupNormSilu and ModulatedGroupNormSilu in the fastest form for OpenVINO's CPU plugin.

Statistics use ReduceL2, whose squares stay in float32, on whole maps, which keep the layout of the convolutions. Chosen
by measurement on the published UNet, in float32 and with the bf16 hint.
"""

from __future__ import annotations

import onnx

from lfdm_export.ops.body import parse_body
from lfdm_export.ops.domain import EPSILON
from lfdm_export.ops.group_norm_silu.onnx_function import ATTRIBUTES, INPUTS, NORM, PLAIN

_GROUP_NORM = """
    last = Constant <value_ints = [-1]> ()
    one = Constant <value_ints = [1]> ()
    map_axes = Constant <value_ints = [2, 3]> ()
    frames_and_channels = Constant <value_ints = [1, 3]> ()
    groups = Constant <value_ints = [{groups}]> ()
    clip_frames = Constant <value_ints = [1, {frames}, 1]> ()
    unit = Constant <value_floats = [1.0]> ()
    epsilon = Constant <value_floats = [{epsilon}]> ()
    channels = Shape <start = 1, end = 2> (x)
    map_size = Shape <start = 2, end = 4> (x)
    pixel_count = ReduceProd <keepdims = 0> (map_size)
    pixels = Cast <to = {float32}> (pixel_count)
    group_channels = Div (channels, groups)
    frame_count = Constant <value_ints = [{frames}]> ()
    grouped_shape = Concat <axis = 0> (last, frame_count, groups, group_channels)
    per_group_shape = Concat <axis = 0> (one, groups, last)
    per_channel_shape = Concat <axis = 0> (last, channels)
    factor_shape = Concat <axis = 0> (last, channels, one, one)
    x_32 = Cast <to = {float32}> (x)
    gamma_32 = Cast <to = {float32}> (gamma)
    beta_32 = Cast <to = {float32}> (beta)
    map_mean = ReduceMean <keepdims = 0> (x_32, map_axes)
    map_length = ReduceL2 <keepdims = 0> (x_32, map_axes)
    map_squares = Mul (map_length, map_length)
    map_square = Div (map_squares, pixels)
    grouped_mean = Reshape (map_mean, grouped_shape)
    grouped_square = Reshape (map_square, grouped_shape)
    mean = ReduceMean <keepdims = 0> (grouped_mean, frames_and_channels)
    square = ReduceMean <keepdims = 0> (grouped_square, frames_and_channels)
    {norm}
    {modulation}
    factor_row = Unsqueeze (factor, one)
    offset_row = Unsqueeze (offset, one)
    factor_rows = Tile (factor_row, clip_frames)
    offset_rows = Tile (offset_row, clip_frames)
    factor_maps = Reshape (factor_rows, factor_shape)
    offset_maps = Reshape (offset_rows, factor_shape)
    scaled = Mul (x_32, factor_maps)
    normed = Add (scaled, offset_maps)
    gate = Sigmoid (normed)
    activated = Mul (normed, gate)
    y = CastLike (activated, x)
"""

_MODULATION = f"""
    scale_32 = Cast <to = {onnx.TensorProto.FLOAT}> (scale)
    shift_32 = Cast <to = {onnx.TensorProto.FLOAT}> (shift)
    gain = Add (scale_32, unit)
    factor = Mul (norm_factor, gain)
    gained = Mul (norm_offset, gain)
    offset = Add (gained, shift_32)
"""


def openvino_group_norm_silu(name: str, frames: int, groups: int) -> onnx.FunctionProto:
    """GroupNormSilu(x, gamma, beta) or ModulatedGroupNormSilu(x, gamma, beta, scale, shift).

    Args:
        name: name of the operator.
        frames: T.
        groups: groups of channels that share statistics.
    """
    body = _GROUP_NORM.format(
        frames=frames,
        groups=groups,
        epsilon=EPSILON,
        float32=onnx.TensorProto.FLOAT,
        norm=NORM,
        modulation=_MODULATION if name == "ModulatedGroupNormSilu" else PLAIN,
    )
    return parse_body(f"{name} {ATTRIBUTES} ({INPUTS[name]}) => (y)", body)
