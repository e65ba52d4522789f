"""Comparison of float32 results up to rounding."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Largest relative error of one rounding in float32.
ROUNDING = 2.0**-24


def assert_same_floats(found: Any, expected: Any, *, roundings: int = 32) -> None:
    """Compare results of the same operators in other memory, another batch, or through another interface.

    A library chooses its loops by processor, memory alignment and sizes, and each order of summation rounds
    differently. The tolerance is therefore a number of roundings of the largest value: 2e-6 of it for results of a few
    sums. Wrong results (another weight, a neighbor's row, a lost step) differ by 1e-3 and more.

    Args:
        found: floats of any shape.
        expected: floats of the same shape.
        roundings: allowed number of roundings, each 2^-24 of the largest expected value, or of 1 if that is smaller.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=roundings * ROUNDING * scale)
