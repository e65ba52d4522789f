"""Warp and WarpBlend in a form that OpenVINO's CPU plugin computes exactly.

Motion is resized by sampling it at constant points, and one source is sampled for all frames at once. The plugin rounds
every input of a Resize to bf16, coordinates included. Everything else that leads to the coordinates stays unrounded if
they are outputs of the model, as `lfdm_export.engines.openvino.engine` declares them.
"""

from __future__ import annotations

import onnx

from lfdm_export.ops.body import parse_body
from lfdm_export.ops.warp.onnx_function import GRID, PHASE, SIGNATURES

# Pixel i of n is at (2 i + 1) / n - 1; sampling there with border padding equals ONNX's half_pixel Resize.
_LINE = f"""
    {{t}}_count = Squeeze ({{t}}_size, zero)
    {{t}}_index = Range (first, {{t}}_count, next)
    {{t}}_index_32 = Cast <to = {onnx.TensorProto.FLOAT}> ({{t}}_index)
    {{t}}_count_32 = Cast <to = {onnx.TensorProto.FLOAT}> ({{t}}_count)
    {{t}}_twice = Add ({{t}}_index_32, {{t}}_index_32)
    {{t}}_odd = Add ({{t}}_twice, unit)
    {{t}}_share = Div ({{t}}_odd, {{t}}_count_32)
    {{t}}_line = Sub ({{t}}_share, unit)
"""

_FULL = f"""
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    minus = Constant <value_ints = [-1]> ()
    column = Constant <value_ints = [-1, 1]> ()
    first = Constant <value_int = 0> ()
    next = Constant <value_int = 1> ()
    unit = Constant <value_floats = [1.0]> ()
    motion_32 = Cast <to = {onnx.TensorProto.FLOAT}> (motion)
    rows_size = Shape <start = 2, end = 3> (source)
    columns_size = Shape <start = 3, end = 4> (source)
    {_LINE.format(t="rows")}
    {_LINE.format(t="columns")}
    rows_column = Reshape (rows_line, column)
    full_size = Concat <axis = 0> (rows_size, columns_size)
    y_map = Expand (rows_column, full_size)
    x_map = Expand (columns_line, full_size)
    y_plane = Unsqueeze (y_map, minus)
    x_plane = Unsqueeze (x_map, minus)
    points_plane = Concat <axis = -1> (x_plane, y_plane)
    points = Unsqueeze (points_plane, zero)
    motion_size = Shape <start = 2, end = 4> (motion)
    planes_shape = Concat <axis = 0> (one, minus, motion_size)
    planes = Reshape (motion_32, planes_shape)
    sampled = GridSample <mode = "linear", padding_mode = "border", align_corners = 0> (planes, points)
    full_shape = Concat <axis = 0> (minus, three, full_size)
    full = Reshape (sampled, full_shape)
"""

# Frames stacked vertically form one tall grid for their common source.
_SAMPLE = f"""
    {GRID}
    source_channels = Shape <start = 1, end = 2> (source)
    grid_size = Shape <start = 1, end = 3> (grid)
    grid_width = Shape <start = 2, end = 3> (grid)
    tall_shape = Concat <axis = 0> (batch, minus, grid_width, two)
    tall = Reshape (grid, tall_shape)
    source_32 = Cast <to = {onnx.TensorProto.FLOAT}> (source)
    sampled_tall = GridSample <mode = "linear", padding_mode = "zeros", align_corners = 0> (source_32, tall)
    by_channel_shape = Concat <axis = 0> (batch, source_channels, frames, grid_size)
    by_channel = Reshape (sampled_tall, by_channel_shape)
    by_frame = Transpose <perm = [0, 2, 1, 3, 4]> (by_channel)
    frames_shape = Concat <axis = 0> (all_frames, source_channels, grid_size)
    sampled_frames = Reshape (by_frame, frames_shape)
"""

_WARP = f"""
    {_FULL}
    resized = Identity (full)
    {_SAMPLE}
    warped = CastLike (sampled_frames, source)
"""

_WARP_BLEND = f"""
    {_FULL}
    {PHASE}
    {_SAMPLE}
    warped = CastLike (sampled_frames, previous)
    occlusion_32 = Slice (resized, two, three, one)
    hidden_weight_32 = Sub (unit, occlusion_32)
    occlusion = CastLike (occlusion_32, previous)
    hidden_weight = CastLike (hidden_weight_32, previous)
    visible = Mul (warped, occlusion)
    hidden = Mul (previous, hidden_weight)
    blended = Add (visible, hidden)
"""


def openvino_warp_function(name: str) -> onnx.FunctionProto:
    """Warp(source, motion) or WarpBlend(source, motion, previous), for OpenVINO."""
    return parse_body(SIGNATURES[name], {"Warp": _WARP, "WarpBlend": _WARP_BLEND}[name])
