"""How fast a GPU can be at best: its own measured rates, and what a stage must compute and move.

A floor is what no program of the same operations goes below. The time of a stage over its floor says how much is left
to gain, on any GPU; the time alone does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """What a stage costs at least.

    Attributes:
        flops: floating-point operations of its products and convolutions.
        bytes: of its weights, inputs and results, each moved once.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """What a GPU was measured to give.

    Attributes:
        flops: floating-point operations per second of a large matrix product.
        bytes: per second that a large copy reads and writes together.
    """

    flops: float
    bytes: float

    def floor(self, work: Work) -> float:
        """Seconds that the work takes at least."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def clip_floors(ceilings: Record, work: Record, dtype: str, steps: int) -> dict[str, float]:
    """Floors of a step, of the decoding of all frames, and of a clip, in seconds.

    Args:
        ceilings: data of the part "ceilings".
        work: `flops` and `bytes` of "step" and "decode", as the part "ours-fp16" counts them.
        dtype: of the matrix product whose rate counts, such as "fp16".
        steps: of the clip.
    """
    rates = Rates(
        ceilings["matrix_product"][dtype]["flops_per_second"], ceilings["copy"]["bytes_per_second"]
    )  # fmt: skip
    step, decode = (rates.floor(Work(**work[name])) for name in ("step", "decode"))
    return {"step": step, "decode": decode, "clip": steps * step + decode}
