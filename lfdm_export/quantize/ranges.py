"""What values an activation takes, and from that its scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Float32: TypeAlias = NDArray[np.float32]
Format = Literal["int8", "fp8"]
Method = Literal["max", "percentile", "mse", "entropy"]
FORMATS: tuple[Format, ...] = get_args(Format)

#: The largest magnitude of each format; fp8 is E4M3, whose largest finite value is 448.
LARGEST: Mapping[Format, float] = {"int8": 127.0, "fp8": 448.0}
#: Share of the magnitudes that "percentile" keeps within the range.
PERCENTILE = 0.9999
# Scales that "mse" and "entropy" try, as shares of the one that covers the largest value.
_SHARES = np.linspace(0.3, 1.0, 29)
_BINS = 2048
# Values that a scale is searched on; more change it by less than a step of the search.
_SEARCHED = 65_536


@dataclass
class Observed:
    """Values of one tensor in the states that it was seen in.

    Attributes:
        largest: magnitude.
        states: how many.
        samples: of the values, some from each state.
    """

    largest: float = 0.0
    states: int = 0
    samples: list[Float32] = field(default_factory=list, repr=False)

    def add(self, values: Float32, count: int, rng: np.random.Generator) -> None:
        """Take note of a state, and keep `count` of its values."""
        flat = values.reshape(-1)
        self.largest = max(self.largest, float(flat.max()), -float(flat.min()))
        self.samples.append(flat[rng.integers(0, flat.size, min(count, flat.size))])
        self.states += 1


def activation_scale(observed: Observed, form: Format, method: Method = "max") -> np.float32:
    """The scale of a tensor whose zero is zero: what a stored 1 stands for.

    Args:
        observed: what it takes.
        form: what it is stored in.
        method: "max": the range covers every value seen. "percentile": all but one in ten thousand. "mse": the
            smallest squared error. "entropy": the distribution that differs least from the one seen.
    """
    tiny = float(np.finfo(np.float32).tiny) * LARGEST[form]
    covering = max(observed.largest, tiny) / LARGEST[form]
    if method == "max":
        return np.float32(covering)
    values = np.concatenate(observed.samples)[:: max(1, sum(map(len, observed.samples)) // _SEARCHED)]
    if method == "percentile":
        return np.float32(max(float(np.quantile(np.abs(values), PERCENTILE)), tiny) / LARGEST[form])
    loss: Callable[[Float32, np.float32, Format], float] = _squared_error if method == "mse" else _divergence
    losses = [loss(values, np.float32(covering * share), form) for share in _SHARES]
    return np.float32(covering * _SHARES[int(np.argmin(losses))])


def weight_scales(weight: Float32, axis: int, form: Format) -> Float32:
    """One scale for each output, (outputs,), that covers its largest weight."""
    others = tuple(other for other in range(weight.ndim) if other != axis)
    largest = np.abs(weight).max(axis=others)
    scales: Float32 = np.where(largest > 0, largest / LARGEST[form], 1).astype(np.float32)
    return scales


def quantise(values: Float32, scale: NDArray[np.float32] | np.float32, form: Format) -> NDArray[np.generic]:
    """Values in units of their scale, as they are stored; beyond the range they saturate."""
    units = values / scale
    if form == "int8":
        return np.clip(np.rint(units), -LARGEST[form], LARGEST[form]).astype(np.int8)
    return np.clip(units, -LARGEST[form], LARGEST[form]).astype(ml_dtypes.float8_e4m3fn)


def rounded(values: Float32, scale: NDArray[np.float32] | np.float32, form: Format) -> Float32:
    """What is left of values when they were quantised."""
    back: Float32 = quantise(values, scale, form).astype(np.float32) * scale
    return back


def _squared_error(values: Float32, scale: np.float32, form: Format) -> float:
    return float(np.square(rounded(values, scale, form) - values, dtype=np.float64).mean())


def _divergence(values: Float32, scale: np.float32, form: Format) -> float:
    """Kullback-Leibler divergence of the magnitudes seen from those that quantising leaves.

    Source: Migacz, 8-bit Inference with TensorRT (GTC 2017): counts beyond the range go to its last bin; a level's
    count is spread over the bins that it stands for, in which something was seen.
    """
    magnitudes = np.abs(values)
    limit = float(scale) * LARGEST[form]
    edges = np.linspace(0, max(float(magnitudes.max()), limit), _BINS + 1)
    inside = int(np.searchsorted(edges, limit, side="right")) - 1
    counts = np.histogram(magnitudes, edges)[0].astype(np.float64)
    seen = counts[:inside].copy()
    if not inside or not seen.any():
        return float("inf")
    seen[-1] += counts[inside:].sum()
    centres = ((edges[:-1] + edges[1:]) / 2)[:inside].astype(np.float32)
    _, level = np.unique(quantise(centres, scale, form).astype(np.float32), return_inverse=True)
    occupied = counts[:inside] > 0
    totals = np.bincount(level, counts[:inside])
    bins = np.maximum(np.bincount(level, occupied), 1)
    left = np.where(occupied, (totals / bins)[level], 0)
    p, q = seen / seen.sum(), left / max(left.sum(), 1e-30)
    within = p > 0
    return float((p[within] * np.log(p[within] / np.maximum(q[within], 1e-12))).sum())
