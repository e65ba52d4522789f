"""A sampler as a table of coefficients, one row per step. NumPy only; the loop is in `lfdm_export.sampling.loop`.

All samplers share the same arithmetic with different numbers. With the noisy latent x, the predicted
noise e, the noise draw n, and the history [P, m] of one sample, a step with coefficients c is

    x0 = threshold(c[0] x + c[1] e)
    x  <- c[2] x + c[3] x0 + c[4] e + c[5] P + c[6] m + c[7] n
    P  <- c[8] P + c[9] x0 + c[10] m
    m  <- x0

so one graph with a `coefficients` input serves all samplers. The history starts at zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.stages import COEFFICIENTS
from lfdm_models.schedule import Schedule

Float32Array: TypeAlias = NDArray[np.float32]
Int64Array: TypeAlias = NDArray[np.int64]

#: Columns of `coefficients`: which factor, and which sum the product is added to.
X0_FROM_LATENT = 0
X0_FROM_PREDICTED_NOISE = 1
NEXT_FROM_LATENT = 2
NEXT_FROM_X0 = 3
NEXT_FROM_PREDICTED_NOISE = 4
NEXT_FROM_CARRY = 5
NEXT_FROM_PREVIOUS_X0 = 6
NEXT_FROM_NOISE = 7
CARRY_FROM_CARRY = 8
CARRY_FROM_X0 = 9
CARRY_FROM_PREVIOUS_X0 = 10


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The steps of one sampler.

    Attributes:
        name: a key of `lfdm_export.sampling.tables.SAMPLERS`.
        timesteps: int64 (S,), the training timestep passed to the network, decreasing.
        coefficients: float32 (S, 11), in the columns of this module.
        draws_noise: bool (S,), whether the step draws noise. It may weight the draw with 0, as the released
            program does.
    """

    name: str
    timesteps: Int64Array
    coefficients: Float32Array
    draws_noise: NDArray[np.bool_]

    @property
    def steps(self) -> int:
        """Number of steps S."""
        return len(self.timesteps)

    def check(self) -> None:
        """Check that the rows are consistent, for tables that do not come from `SAMPLERS`.

        Raises:
            InputError: there is no step, or a row is missing, has another type, or is not finite.
        """
        steps = self.steps
        if steps < 1:
            raise InputError("steps: found none, expected 1 or more; use at least one step")
        for name, array, dtype, shape in (
            ("timesteps", self.timesteps, np.int64, (steps,)),
            ("coefficients", self.coefficients, np.float32, (steps, COEFFICIENTS)),
            ("draws_noise", self.draws_noise, np.bool_, (steps,)),
        ):
            if array.dtype != dtype or array.shape != shape:
                raise InputError(f"{name}: found {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}")
        if not np.isfinite(self.coefficients).all() or (self.timesteps < 0).any():
            raise InputError("coefficients or timesteps: found values that no sampler has; make the table again")


def estimating_rows(schedule: Schedule, timesteps: Int64Array) -> NDArray[np.float64]:
    """Coefficients (S, 11) that give the x0 estimate at these times; all others are 0."""
    rows = np.zeros((len(timesteps), COEFFICIENTS))
    rows[:, X0_FROM_LATENT] = schedule.sqrt_recip_alphas_cumprod[timesteps]
    rows[:, X0_FROM_PREDICTED_NOISE] = -schedule.sqrt_recipm1_alphas_cumprod[timesteps]
    return rows


def make_table(
    name: str, timesteps: Int64Array, rows: NDArray[np.float64], draws_noise: NDArray[np.bool_]
) -> SamplerTable:
    """Make a table from rows (S, 11) computed in float64."""
    return SamplerTable(name, timesteps.astype(np.int64), rows.astype(np.float32), draws_noise)
