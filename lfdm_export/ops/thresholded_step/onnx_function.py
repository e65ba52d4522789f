"""ThresholdedStep as a model-local ONNX function, with an exact quantile without TopK.

TensorRT's TopK is limited to 3840; the 0.9 quantile of a latent's 122,880 values would need 12,289. Instead, the lower
order statistic is bracketed by counting, then picked exactly as the smallest value above the bracket's lower end. Its
upper neighbor is the same value if enough values equal it, else the smallest value above it. Bisection counts least,
which suits a CPU. A search with many pivots at once has few rounds, which suits a GPU and TensorRT's builder: its time
for latents of some thousand values grows exponentially with the rounds.
"""

from __future__ import annotations

import onnx

from lfdm_export.ops.body import parse_body
from lfdm_export.sampling import rows

#: From 2^-126 .. 2^128, 8 bisections of the exponent range leave a factor of 2, and 24 more leave neighboring floats;
#: plus two in reserve.
BISECTIONS = 34
#: Intervals into which one round of the search with many pivots divides the bracket.
LANES = 64
#: Its rounds with pivots in geometric and in arithmetic progression: two leave a factor of 2^(254 / 64^2), a gap of
#: 2^-4.5 of the lower end; four rounds of 6 bits each reduce it below half the distance between neighboring floats.
GEOMETRIC_ROUNDS, ARITHMETIC_ROUNDS = 2, 4

# Values at or below the smallest normal float count as zero: where the quantile is below 1 the bound is 1.
_START = """
    floor = Constant <value_floats = [1.1754944e-38]> ()
    ceiling = Constant <value_floats = [3.4028235e38]> ()
    largest = ReduceMax <keepdims = 1> (magnitude, one)
    low_0 = Add (zeros, floor)
    bounded = Min (largest, ceiling)
    high_0 = Max (bounded, low_0)
"""

_BISECT = """
    root_low_{i} = Sqrt (low_{i})
    root_high_{i} = Sqrt (high_{i})
    geometric_{i} = Mul (root_low_{i}, root_high_{i})
    gap_{i} = Sub (high_{i}, low_{i})
    half_{i} = Mul (gap_{i}, one_half)
    arithmetic_{i} = Add (low_{i}, half_{i})
    wide_{i} = Greater (gap_{i}, low_{i})
    middle_{i} = Where (wide_{i}, geometric_{i}, arithmetic_{i})
    within_{i} = LessOrEqual (magnitude, middle_{i})
    within_f_{i} = Cast <to = 1> (within_{i})
    count_{i} = ReduceSum <keepdims = 1> (within_f_{i}, one)
    enough_{i} = Greater (count_{i}, rank)
    low_{j} = Where (enough_{i}, low_{i}, middle_{i})
    high_{j} = Where (enough_{i}, middle_{i}, high_{i})
"""

_LANES = """
    fractions = Constant <value = float[1, {lanes}] {{{fractions}}}> ()
    magnitude_row = Unsqueeze (magnitude, one)
    {rounds}
"""

_GEOMETRIC_PIVOTS = """
    log_low_{i} = Log (low_{i})
    log_high_{i} = Log (high_{i})
    log_gap_{i} = Sub (log_high_{i}, log_low_{i})
    log_part_{i} = Mul (log_gap_{i}, fractions)
    log_pivots_{i} = Add (log_low_{i}, log_part_{i})
    rough_pivots_{i} = Exp (log_pivots_{i})
    capped_pivots_{i} = Min (rough_pivots_{i}, high_{i})
    pivots_{i} = Max (capped_pivots_{i}, low_{i})
"""

_ARITHMETIC_PIVOTS = """
    gap_{i} = Sub (high_{i}, low_{i})
    part_{i} = Mul (gap_{i}, fractions)
    pivots_{i} = Add (low_{i}, part_{i})
"""

_NARROW = """
    pivot_column_{i} = Unsqueeze (pivots_{i}, last)
    within_{i} = LessOrEqual (magnitude_row, pivot_column_{i})
    within_f_{i} = Cast <to = 1> (within_{i})
    count_{i} = ReduceSum <keepdims = 0> (within_f_{i}, last)
    enough_{i} = Greater (count_{i}, rank)
    lows_{i} = Where (enough_{i}, low_{i}, pivots_{i})
    highs_{i} = Where (enough_{i}, pivots_{i}, high_{i})
    low_{j} = ReduceMax <keepdims = 1> (lows_{i}, one)
    high_{j} = ReduceMin <keepdims = 1> (highs_{i}, one)
"""

_SELECT = """
    infinity = Constant <value_floats = [inf]> ()
    above_low = Greater (magnitude, low_{last})
    candidates = Where (above_low, magnitude, infinity)
    picked = ReduceMin <keepdims = 1> (candidates, one)
    tiny = LessOrEqual (magnitude, low_0)
    tiny_f = Cast <to = 1> (tiny)
    tiny_count = ReduceSum <keepdims = 1> (tiny_f, one)
    mostly_tiny = Greater (tiny_count, rank)
    lower = Where (mostly_tiny, zeros, picked)
    pivot = Max (lower, low_0)
    within = LessOrEqual (magnitude, pivot)
    within_f = Cast <to = 1> (within)
    count = ReduceSum <keepdims = 1> (within_f, one)
    repeated = Greater (count, next_rank)
    above_pivot = Greater (magnitude, pivot)
    upper_candidates = Where (above_pivot, magnitude, infinity)
    next_value = ReduceMin <keepdims = 1> (upper_candidates, one)
    upper = Where (repeated, lower, next_value)
"""

# As in torch.lerp: from the nearer end.
_LERP_BELOW_HALF = """
    spread = Sub (upper, lower)
    part = Mul (spread, weight)
    quantile = Add (lower, part)
"""
_LERP_FROM_HALF = """
    spread = Sub (upper, lower)
    rest = Sub (unit, weight)
    part = Mul (spread, rest)
    quantile = Sub (upper, part)
"""


def _combine(result: str, terms: list[tuple[int, str]]) -> str:
    """ONNX text of result = sum of coefficient column x flat tensor."""
    lines = []
    for position, (column, tensor) in enumerate(terms):
        product = f"{result}_term_{position}"
        lines.append(f"{product} = Mul (c_{column}, {tensor})")
        if position:
            total = result if position == len(terms) - 1 else f"{result}_sum_{position}"
            left = f"{result}_sum_{position - 1}" if position > 1 else f"{result}_term_0"
            lines.append(f"{total} = Add ({left}, {product})")
    return "\n    ".join(lines)


def _search(pivots_at_once: bool) -> tuple[str, int]:
    """ONNX text that narrows the bracket of the lower order statistic, and the number of its rounds."""
    if not pivots_at_once:
        return "".join(_BISECT.format(i=i, j=i + 1) for i in range(BISECTIONS)), BISECTIONS
    kinds = [_GEOMETRIC_PIVOTS] * GEOMETRIC_ROUNDS + [_ARITHMETIC_PIVOTS] * ARITHMETIC_ROUNDS
    rounds = "".join((pivots + _NARROW).format(i=i, j=i + 1) for i, pivots in enumerate(kinds))
    fractions = [lane / LANES for lane in range(1, LANES)]
    return _LANES.format(lanes=len(fractions), fractions=", ".join(map(str, fractions)), rounds=rounds), len(kinds)


def thresholded_step_function(weight: float, *, pivots_at_once: bool = False) -> onnx.FunctionProto:
    """The function for latents whose quantile has that interpolation weight.

    Args:
        weight: from `sampling.loop.quantile_rank`; decides from which end the interpolation starts.
        pivots_at_once: search with many pivots in few rounds, instead of bisection.
    """
    search, rounds = _search(pivots_at_once)
    columns = "\n    ".join(
        f"i_{i} = Constant <value_ints = [{i}]> ()\n    c_{i} = Gather <axis = 1> (coefficients, i_{i})"
        for i in range(11)
    )
    x0 = [(rows.X0_FROM_LATENT, "x"), (rows.X0_FROM_PREDICTED_NOISE, "e")]
    latent = [
        (rows.NEXT_FROM_LATENT, "x"),
        (rows.NEXT_FROM_X0, "x0"),
        (rows.NEXT_FROM_PREDICTED_NOISE, "e"),
        (rows.NEXT_FROM_CARRY, "carry"),
        (rows.NEXT_FROM_PREVIOUS_X0, "previous"),
        (rows.NEXT_FROM_NOISE, "z"),
    ]
    carry = [
        (rows.CARRY_FROM_CARRY, "carry"),
        (rows.CARRY_FROM_X0, "x0"),
        (rows.CARRY_FROM_PREVIOUS_X0, "previous"),
    ]
    return parse_body(
        "ThresholdedStep <lower_rank, weight> (latent, predicted_noise, history, noise, coefficients) "
        "=> (next_latent, next_history)",
        f"""
    one = Constant <value_ints = [1]> ()
    last = Constant <value_ints = [-1]> ()
    flat = Constant <value_ints = [0, -1]> ()
    halves = Constant <value_ints = [0, 2, -1]> ()
    index_0 = Constant <value_int = 0> ()
    index_1 = Constant <value_int = 1> ()
    unit = Constant <value_floats = [1.0]> ()
    one_half = Constant <value_floats = [0.5]> ()
    rank_i = Constant <value_int: int = @lower_rank> ()
    rank = Cast <to = 1> (rank_i)
    next_rank = Add (rank, unit)
    weight = Constant <value_float: float = @weight> ()
    {columns}
    x = Reshape (latent, flat)
    e = Reshape (predicted_noise, flat)
    z = Reshape (noise, flat)
    pair = Reshape (history, halves)
    carry = Gather <axis = 1> (pair, index_0)
    previous = Gather <axis = 1> (pair, index_1)
    {_combine("estimate", x0)}
    magnitude = Abs (estimate)
    zeros = Sub (c_0, c_0)
    {_START}
    {search}
    {_SELECT.format(last=rounds)}
    {_LERP_BELOW_HALF if weight < 0.5 else _LERP_FROM_HALF}
    bound = Max (quantile, unit)
    negative_bound = Neg (bound)
    clipped_above = Min (estimate, bound)
    clipped = Max (clipped_above, negative_bound)
    x0 = Div (clipped, bound)
    {_combine("next_flat", latent)}
    {_combine("next_carry", carry)}
    latent_shape = Shape (latent)
    next_latent = Reshape (next_flat, latent_shape)
    carry_row = Unsqueeze (next_carry, one)
    x0_row = Unsqueeze (x0, one)
    pair_next = Concat <axis = 1> (carry_row, x0_row)
    history_shape = Shape (history)
    next_history = Reshape (pair_next, history_shape)
""",
    )
