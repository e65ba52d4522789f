"""Warp and WarpBlend as model-local ONNX functions.

The bodies accept any floating type of `source` and `previous`. Coordinates, sampling and blending are float32; only the
result is rounded to the type of `source`.
"""

from __future__ import annotations

import onnx

from lfdm_export.ops.body import parse_body

_FLOAT32 = onnx.TensorProto.FLOAT

#: The operators' interfaces, by name.
SIGNATURES = {
    "Warp": "Warp (source, motion) => (warped)",
    "WarpBlend": "WarpBlend <stride, phase_y, phase_x> (source, motion, previous) => (blended)",
}
_RESIZE = f"""
    motion_32 = Cast <to = {_FLOAT32}> (motion)
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    three = Constant <value_ints = [3]> ()
    kept_axes = Shape <start = 0, end = 2> (motion)
    full_size = Shape <start = 2, end = 4> (source)
    full_shape = Concat <axis = 0> (kept_axes, full_size)
    full = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (motion_32, , , full_shape)
"""

#: The pixels of the resized map for one phase of a transposed convolution; needs `zero` and `full_size`.
PHASE = """
    first_row = Constant <value_int: int = @phase_y> ()
    first_column = Constant <value_int: int = @phase_x> ()
    step = Constant <value_int: int = @stride> ()
    first_row_1d = Unsqueeze (first_row, zero)
    first_column_1d = Unsqueeze (first_column, zero)
    step_1d = Unsqueeze (step, zero)
    starts = Concat <axis = 0> (first_row_1d, first_column_1d)
    steps = Concat <axis = 0> (step_1d, step_1d)
    image_axes = Constant <value_ints = [2, 3]> ()
    resized = Slice (full, starts, full_size, image_axes, steps)
"""

#: The map's coordinates, and the number of frames per source; needs `zero`, `one` and `two`.
GRID = """
    grid_planes = Slice (resized, zero, two, one)
    grid = Transpose <perm = [0, 2, 3, 1]> (grid_planes)
    batch = Shape <start = 0, end = 1> (source)
    all_frames = Shape <start = 0, end = 1> (motion)
    frames = Div (all_frames, batch)
"""

# GridSample takes one source per grid, so the source is repeated; a plugin needs no copies.
_SAMPLE = f"""
    source_32 = Cast <to = {_FLOAT32}> (source)
    {GRID}
    source_axes = Shape <start = 1> (source)
    expanded_shape = Concat <axis = 0> (batch, frames, source_axes)
    repeated_shape = Concat <axis = 0> (all_frames, source_axes)
    unsqueezed = Unsqueeze (source_32, one)
    expanded = Expand (unsqueezed, expanded_shape)
    repeated = Reshape (expanded, repeated_shape)
    sampled = GridSample <mode = "linear", padding_mode = "zeros", align_corners = 0> (repeated, grid)
"""

_WARP = f"""
    {_RESIZE}
    resized = Identity (full)
    {_SAMPLE}
    warped = CastLike (sampled, source)
"""

_WARP_BLEND = f"""
    {_RESIZE}
    {PHASE}
    {_SAMPLE}
    occlusion = Slice (resized, two, three, one)
    previous_32 = Cast <to = {_FLOAT32}> (previous)
    visible = Mul (sampled, occlusion)
    unit = Constant <value_floats = [1.0]> ()
    hidden_weight = Sub (unit, occlusion)
    hidden = Mul (previous_32, hidden_weight)
    mixed = Add (visible, hidden)
    blended = CastLike (mixed, source)
"""


def warp_function(name: str) -> onnx.FunctionProto:
    """Warp(source, motion) or WarpBlend(source, motion, previous), as in `reference`."""
    return parse_body(SIGNATURES[name], {"Warp": _WARP, "WarpBlend": _WARP_BLEND}[name])
