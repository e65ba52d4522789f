"""When two float32 results count as the same."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Largest relative error of one rounding in float32.
ROUNDING = 2.0**-24


def assert_same_floats(found: Any, expected: Any, *, roundings: int = 32) -> None:
    """Compare what the same operators give in other memory, another batch, or through another interface.

    A library picks its loops by the processor, by how memory is aligned and by sizes, and each order of summing rounds
    otherwise. Bits are therefore not compared, but errors of so many roundings of the largest value: 2e-6 of it where
    a result takes a few sums. What is wrong (another weight, a row of a neighbor, a step that was lost) is off by 1e-3
    and more.

    Args:
        found: floats of any shape.
        expected: floats of the same shape.
        roundings: allowed, each of 2^-24 of the largest expected value, or of 1 where that is smaller.
    """
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.dtype == expected.dtype
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(found, expected, rtol=0, atol=roundings * ROUNDING * scale)
