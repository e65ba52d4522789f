"""Bodies of the operators of domain `lfdm` that suit OpenVINO's CPU plugin.

Each form was chosen by measurement on the published UNet and decoder, in float32 and under the bf16 hint:

- Rotation is written on half-split channels, to which the columns of queries' and keys' weights are permuted (products
  of queries and keys do not change): the plugin then runs it as one operation instead of six.
- Statistics of group norms are taken with ReduceL2, whose squares never leave float32, and on whole maps, which keep
  the layout that convolutions give them.
- Motion is resized by sampling it at constant points, and one source is sampled for all frames at once. The plugin
  rounds whatever leads to a Resize to bf16, coordinates included; nothing else that leads to them is rounded if they
  are outputs of the model, as `lfdm_export.engines.openvino` makes them.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx.parser

from lfdm_export.ops.group_norm_silu.onnx_function import NORM, PLAIN
from lfdm_export.ops.group_norm_silu.reference import EPSILON as GROUP_EPSILON
from lfdm_export.ops.symbolic import DOMAIN, OPSET
from lfdm_export.ops.temporal_attention.reference import EPSILON as LAYER_EPSILON
from lfdm_export.ops.warp.onnx_function import GRID, PHASE

_HEADER = f'<domain: "{DOMAIN}", opset_import: ["" : {OPSET}]>'

_TEMPORAL = """
{header}
{name} <heads, rotary_width> (x, gamma, query, key, value, out, cos, sin, bias, position) => (y) {{
    order = Constant <value_ints = [{order}]> ()
    split_heads = Constant <value_ints = [0, 0, {heads}, {width}]> ()
    join_heads = Constant <value_ints = [0, 0, {joined}]> ()
    halves = Constant <value_ints = [{half}, {half}]> ()
    parts = Constant <value_ints = [{rotary}, {rest}]> ()
    leading = Constant <value_ints = [0, 1]> ()
    minus_value = Constant <value = float[1,1,1,1] {{-1.0}}> ()
    minus = CastLike (minus_value, x)
    scale_value = Constant <value_float = {scale!r}> ()
    scale = CastLike (scale_value, query)
    normed = LayerNormalization <axis = -1, epsilon = {epsilon}> (x, gamma)
    query_ordered = Gather <axis = 1> (query, order)
    query_scaled = Mul (query_ordered, scale)
    key_ordered = Gather <axis = 1> (key, order)
    {tables}
    q = MatMul (normed, query_scaled)
    k = MatMul (normed, key_ordered)
    v = MatMul (normed, value)
    {turns}
    v_heads = Reshape (v, split_heads)
    v_first = Transpose <perm = [0, 2, 1, 3]> (v_heads)
    k_last = Transpose <perm = [0, 1, 3, 2]> (k_turned)
    product = MatMul (q_turned, k_last)
    bias_like = CastLike (bias, product)
    logits = Add (product, bias_like)
    weights = Softmax <axis = -1> (logits)
    attended = MatMul (weights, v_first)
    attended_last = Transpose <perm = [0, 2, 1, 3]> (attended)
    attended_joined = Reshape (attended_last, join_heads)
    projected = MatMul (attended_joined, out)
    y = Add (x, projected)
}}
"""

_TABLE = """
    {t}_twice = Concat <axis = -1> ({t}, {t})
    {t}_like = CastLike ({t}_twice, x)
    {t}_table = Unsqueeze ({t}_like, leading)
"""

# The axes' signs and the order of the operands are part of the pattern that the plugin knows.
_TURN = """
    {t}_heads = Reshape ({t}, split_heads)
    {t}_first = Transpose <perm = [0, 2, 1, 3]> ({t}_heads)
    {take}
    {t}_low, {t}_high = Split <axis = 3> ({t}_turning, halves)
    {t}_minus = Mul ({t}_high, minus)
    {t}_swapped = Concat <axis = -1> ({t}_minus, {t}_low)
    {t}_along = Mul ({t}_turning, cos_table)
    {t}_across = Mul ({t}_swapped, sin_table)
    {t}_rotated = Add ({t}_along, {t}_across)
    {give}
"""


def openvino_temporal_attention(name: str, heads: int, head_width: int, rotary_width: int) -> onnx.FunctionProto:
    """TemporalAttention… (x, gamma, query, key, value, out, cos, sin, bias, position), all pixels together.

    Args:
        name: of the operator.
        heads: H.
        head_width: D.
        rotary_width: R, channels of a head that are rotated.
    """
    within = (*range(0, rotary_width, 2), *range(1, rotary_width, 2), *range(rotary_width, head_width))
    whole = rotary_width == head_width
    turns = (
        _TURN.format(
            t=t,
            take=f"{t}_turning = Identity ({t}_first)"
            if whole
            else f"{t}_turning, {t}_rest = Split <axis = 3> ({t}_first, parts)",
            give=f"{t}_turned = Identity ({t}_rotated)"
            if whole
            else f"{t}_turned = Concat <axis = -1> ({t}_rotated, {t}_rest)",
        )
        for t in "qk"
    )
    return onnx.parser.parse_function(
        _TEMPORAL.format(
            header=_HEADER,
            name=name,
            order=_integers(head * head_width + channel for head in range(heads) for channel in within),
            heads=heads,
            width=head_width,
            joined=heads * head_width,
            half=rotary_width // 2,
            rotary=rotary_width,
            rest=head_width - rotary_width,
            scale=head_width**-0.5,
            epsilon=LAYER_EPSILON,
            tables="".join(_TABLE.format(t=t) for t in ("cos", "sin")),
            turns="".join(turns),
        )
    )


_GROUP_NORM = """
{header}
{name} <grouped, per_group, per_channel, clip, flat> ({inputs}) => (y) {{
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
}}
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
        name: which of the two.
        frames: T.
        groups: of channels, that share statistics.
    """
    modulated = name == "ModulatedGroupNormSilu"
    return onnx.parser.parse_function(
        _GROUP_NORM.format(
            header=_HEADER,
            name=name,
            inputs="x, gamma, beta" + (", scale, shift" if modulated else ""),
            frames=frames,
            groups=groups,
            epsilon=GROUP_EPSILON,
            float32=onnx.TensorProto.FLOAT,
            norm=NORM,
            modulation=_MODULATION if modulated else PLAIN,
        )
    )


# Pixel i of n lies at (2 i + 1) / n - 1; sampling with border padding is ONNX's half_pixel Resize there.
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

# Frames below each other are one tall grid for their common source.
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
{_HEADER}
Warp (source, motion) => (warped) {{
    {_FULL}
    resized = Identity (full)
    {_SAMPLE}
    warped = CastLike (sampled_frames, source)
}}
"""

_WARP_BLEND = f"""
{_HEADER}
WarpBlend <stride, phase_y, phase_x> (source, motion, previous) => (blended) {{
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
}}
"""


def openvino_warp_functions() -> list[onnx.FunctionProto]:
    """Warp(source, motion) and WarpBlend(source, motion, previous)."""
    return [onnx.parser.parse_function(text) for text in (_WARP, _WARP_BLEND)]


def _integers(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))
