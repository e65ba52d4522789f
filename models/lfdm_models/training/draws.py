"""Random numbers that are the same on every machine and with every version of NumPy.

NumPy guarantees stable streams of its bit generators, but not of the distributions built on them, so only raw bits are
used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

#: Seeds are integers below this number.
SEEDS = 2**64


class Draws:
    """A stream of random numbers, identified by seed and purpose."""

    def __init__(self, seed: int, purpose: int) -> None:
        """Start a stream.

        Args:
            seed: 0 … 2^64 - 1.
            purpose: index of the stream among those of the seed, 0 … 2^64 - 1.

        Raises:
            ValueError: a number is out of range.
        """
        if not (0 <= seed < SEEDS and 0 <= purpose < SEEDS):
            raise ValueError(f"seed {seed} or purpose {purpose} is out of range, expected 0 to 2^64 - 1")
        self._bits = np.random.Philox(key=(purpose << 64) | seed)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> float:
        """A number in [low, high)."""
        return low + (high - low) * (int(self._bits.random_raw()) >> 11) * 2.0**-53

    def integer(self, count: int) -> int:
        """An integer in 0 … count - 1."""
        return int(self.uniform(0.0, float(count)))

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.uniform() < probability

    def sign(self) -> float:
        """-1 or 1."""
        return 1.0 if self.chance(0.5) else -1.0

    def pick(self, choices: Sequence[T]) -> T:
        """One of the choices, all equally likely."""
        return choices[self.integer(len(choices))]
