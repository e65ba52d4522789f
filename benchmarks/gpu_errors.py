"""Errors of kernels against float64."""

from __future__ import annotations

import math

from torch import Tensor


class WrongResultError(Exception):
    """A kernel's result is wrong."""


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest error, relative to the largest value; a value that was not written (NaN) counts as infinite."""
    return float((found.double() - expected).abs().nan_to_num(nan=math.inf).max() / expected.abs().max())
