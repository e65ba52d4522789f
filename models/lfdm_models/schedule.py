"""The noise schedule of the diffusion model, as the buffers of a released checkpoint. NumPy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float32Array: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Schedule:
    """One float32 value per training step t = 0 … N-1 in each buffer; names are those of the state dict.

    With beta the variance added at step t and a the product of (1 - beta) up to t, a noisy latent is
    sqrt(a) * latent + sqrt(1 - a) * noise.

    Attributes:
        betas: beta, in (0, 1).
        alphas_cumprod: a, falling from almost 1 to almost 0.
        alphas_cumprod_prev: p, which is a of the previous step; p_0 = 1.
        sqrt_alphas_cumprod: sqrt(a).
        sqrt_one_minus_alphas_cumprod: sqrt(1 - a).
        log_one_minus_alphas_cumprod: log(1 - a).
        sqrt_recip_alphas_cumprod: sqrt(1 / a).
        sqrt_recipm1_alphas_cumprod: sqrt(1 / a - 1), the noise-to-signal ratio.
        posterior_variance: variance of q(x_{t-1} | x_t, x_0); 0 at t = 0.
        posterior_log_variance_clipped: its log, with the variance clipped to at least 1e-20.
        posterior_mean_coef1: weight of x_0 in the mean of q(x_{t-1} | x_t, x_0).
        posterior_mean_coef2: weight of x_t in the same mean.

    Source: Ho et al., Denoising Diffusion Probabilistic Models, equations 4, 6 and 7.
    """

    betas: Float32Array
    alphas_cumprod: Float32Array
    alphas_cumprod_prev: Float32Array
    sqrt_alphas_cumprod: Float32Array
    sqrt_one_minus_alphas_cumprod: Float32Array
    log_one_minus_alphas_cumprod: Float32Array
    sqrt_recip_alphas_cumprod: Float32Array
    sqrt_recipm1_alphas_cumprod: Float32Array
    posterior_variance: Float32Array
    posterior_log_variance_clipped: Float32Array
    posterior_mean_coef1: Float32Array
    posterior_mean_coef2: Float32Array

    def __post_init__(self) -> None:
        """Check that the buffers match.

        Raises:
            ValueError: a buffer is not a finite float32 vector, or the lengths differ or are 0.
        """
        shape = (len(self.betas),) if np.ndim(self.betas) == 1 else ()
        if shape in ((), (0,)):
            raise ValueError(
                f"schedule buffer 'betas' must be a vector with one entry per step, not {np.shape(self.betas)}"
            )
        for name, values in self.buffers().items():
            if values.dtype != np.float32 or values.shape != shape:
                found = f"{values.dtype} {values.shape}"
                raise ValueError(f"schedule buffer {name!r} is {found}; like 'betas' it must be float32 {shape}")
            if not np.isfinite(values).all():
                raise ValueError(f"schedule buffer {name!r} holds values that are not finite")

    @property
    def steps(self) -> int:
        """Training steps N."""
        return len(self.betas)

    def buffers(self) -> dict[str, Float32Array]:
        """The arrays by name, in the order of the attributes."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_buffers(cls, buffers: Mapping[str, Float32Array]) -> Schedule:
        """Take the schedule from a mapping that may have other entries, such as a checkpoint's arrays.

        Raises:
            ValueError: buffers are missing, or do not match.
        """
        missing = [field.name for field in fields(cls) if field.name not in buffers]
        if missing:
            raise ValueError(f"schedule buffers are missing: {', '.join(missing)}")
        return cls(**{field.name: np.asarray(buffers[field.name]) for field in fields(cls)})


def cosine_schedule(steps: int) -> Schedule:
    """The cosine schedule, computed in float64 and rounded to float32 once.

    Args:
        steps: training steps N, at least 1.

    Raises:
        ValueError: `steps` is below 1.

    Source: Nichol and Dhariwal, Improved Denoising Diffusion Probabilistic Models, equation 17, with
        beta capped at 0.9999 (as in the released LFDM) instead of the paper's 0.999.
    """
    if steps < 1:
        raise ValueError(f"a noise schedule needs 1 step or more, not {steps}")
    signal = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
    signal = signal / signal[0]
    betas = np.minimum(1 - signal[1:] / signal[:-1], 0.9999)
    a = np.cumprod(1 - betas)
    p = np.concatenate([[1.0], a[:-1]])
    variance = betas * (1 - p) / (1 - a)
    exact = {
        "betas": betas,
        "alphas_cumprod": a,
        "alphas_cumprod_prev": p,
        "sqrt_alphas_cumprod": np.sqrt(a),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - a),
        "log_one_minus_alphas_cumprod": np.log(1 - a),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / a),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / a - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(p) / (1 - a),
        "posterior_mean_coef2": (1 - p) * np.sqrt(1 - betas) / (1 - a),
    }
    return Schedule.from_buffers({name: values.astype(np.float32) for name, values in exact.items()})
