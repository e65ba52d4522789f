"""Lower bounds of a stage's time on a GPU, from the GPU's measured rates and the stage's operations and bytes.

A floor is the time that no program with the same operations can beat. The ratio of a stage's time to its floor shows
how much can still be gained, on any GPU; the time alone does not.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu_records import Record


@dataclass(frozen=True)
class Work:
    """Minimum work of a stage.

    Attributes:
        flops: floating-point operations of its products and convolutions.
        bytes: bytes of its weights, inputs and results, each moved once.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """Measured rates of a GPU.

    Attributes:
        flops: floating-point operations per second of a large matrix product.
        bytes: bytes per second that a large copy reads and writes together.
    """

    flops: float
    bytes: float

    def floor(self, work: Work) -> float:
        """Minimum seconds of the work."""
        return max(work.flops / self.flops, work.bytes / self.bytes)


def clip_floors(ceilings: Record, work: Record, dtype: str, steps: int) -> dict[str, float]:
    """Floors of a step, of decoding all frames, and of a clip, in seconds.

    Args:
        ceilings: data of the part "ceilings".
        work: `flops` and `bytes` of "step" and "decode", counted by the part "ours-fp16".
        dtype: dtype of the matrix product whose rate applies, such as "fp16".
        steps: steps of the clip.
    """
    rates = Rates(
        ceilings["matrix_product"][dtype]["flops_per_second"], ceilings["copy"]["bytes_per_second"]
    )  # fmt: skip
    step, decode = (rates.floor(Work(**work[name])) for name in ("step", "decode"))
    return {"step": step, "decode": decode, "clip": steps * step + decode}
