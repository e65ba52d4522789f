"""The observed values of an activation, and its scale."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]
Format = Literal["int8", "fp8"]
Method = Literal["max", "mse"]
FORMATS: tuple[Format, ...] = get_args(Format)

#: The largest magnitude of each format; fp8 is E4M3, whose largest finite value is 448.
LARGEST: Mapping[Format, float] = {"int8": 127.0, "fp8": 448.0}
# Scales that "mse" tries, as shares of the scale that covers the largest value.
_SHARES = np.linspace(0.3, 1.0, 29)
# Maximum number of values for the search of a scale; more change it by less than a step of the search.
_SEARCHED = 65_536


@dataclass
class Observed:
    """Observed values of one tensor.

    Attributes:
        largest: largest magnitude.
        states: number of states.
        samples: some values from each state.
    """

    largest: float = 0.0
    states: int = 0
    samples: list[Float32] = field(default_factory=list, repr=False)

    def add(self, values: Float32, count: int, rng: np.random.Generator) -> None:
        """Observe a state, and keep `count` of its values."""
        flat = values.reshape(-1)
        self.largest = max(self.largest, float(flat.max()), -float(flat.min()))
        self.samples.append(flat[rng.integers(0, flat.size, min(count, flat.size))])
        self.states += 1


def activation_scale(observed: Observed, form: Format, method: Method = "max") -> np.float32:
    """The scale of a tensor with zero point 0: the value of a stored 1.

    Args:
        observed: the observed values.
        form: storage format.
        method: "max": the range covers every observed value. "mse": the smallest squared error.
    """
    tiny = float(np.finfo(np.float32).tiny) * LARGEST[form]
    covering = max(observed.largest, tiny) / LARGEST[form]
    if method == "max":
        return np.float32(covering)
    values = np.concatenate(observed.samples)[:: max(1, sum(map(len, observed.samples)) // _SEARCHED)]
    losses = [_squared_error(values, np.float32(covering * share), form) for share in _SHARES]
    return np.float32(covering * _SHARES[int(np.argmin(losses))])


def weight_scales(weight: Float32, axis: int, form: Format) -> Float32:
    """One scale per output, (outputs,), that covers its largest weight."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    largest = np.abs(weight).max(axis=others)
    scales: Float32 = np.where(largest > 0, largest / LARGEST[form], 1).astype(np.float32)
    return scales


def quantize(values: Float32, scale: NDArray[np.float32] | np.float32, form: Format) -> NDArray[np.generic]:
    """Values in units of their scale, in their storage type; values outside the range saturate."""
    units = values / scale
    stored: NDArray[np.generic]
    if form == "int8":
        stored = np.clip(np.rint(units), -LARGEST[form], LARGEST[form]).astype(np.int8)
    else:
        stored = np.clip(units, -LARGEST[form], LARGEST[form]).astype(ml_dtypes.float8_e4m3fn)
    return stored


def rounded(values: Float32, scale: NDArray[np.float32] | np.float32, form: Format) -> Float32:
    """Values after quantizing and dequantizing."""
    back: Float32 = quantize(values, scale, form).astype(np.float32) * scale
    return back


def _squared_error(values: Float32, scale: np.float32, form: Format) -> float:
    return float(np.square(rounded(values, scale, form) - values, dtype=np.float64).mean())
