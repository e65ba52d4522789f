"""One sampling step in NumPy, and the loop that every engine shares.

The samplers are tables of coefficients (`lfdm_export.sampling.tables`; `lfdm_export.sampling.rows` gives the
arithmetic of a step). Their noise comes from `lfdm_export.sampling.noise`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

import numpy as np

from lfdm_export.errors import InputError
from lfdm_export.sampling.noise import NoiseSource, handed_noise
from lfdm_export.sampling.rows import (
    CARRY_FROM_CARRY,
    CARRY_FROM_PREVIOUS_X0,
    CARRY_FROM_X0,
    NEXT_FROM_CARRY,
    NEXT_FROM_LATENT,
    NEXT_FROM_NOISE,
    NEXT_FROM_PREDICTED_NOISE,
    NEXT_FROM_PREVIOUS_X0,
    NEXT_FROM_X0,
    X0_FROM_LATENT,
    X0_FROM_PREDICTED_NOISE,
    Float32Array,
    Int64Array,
    SamplerTable,
)


class Step(Protocol):
    """One sampling step of a batch, such as the stage `step` of an engine with its other inputs bound."""

    def __call__(
        self,
        noisy_latent: Float32Array,
        timestep: Int64Array,
        history: Float32Array,
        noise: Float32Array,
        coefficients: Float32Array,
    ) -> tuple[Float32Array, Float32Array]:
        """Take (B,3,T,h,w), (B,), (B,2,3,T,h,w), (B,3,T,h,w), (B,11); return the next latent and history."""


def quantile_rank(elements: int) -> tuple[int, np.float32]:
    """Index of the order statistic at or below the 0.9 quantile of `elements` values, and the weight of the next one.

    The rank is 0.9 * (n - 1) in float32, as in ``torch.quantile``.
    """
    rank = np.float32(0.9) * np.float32(elements - 1)
    below = int(np.floor(rank))
    return below, rank - np.float32(below)


def quantile_0_9(magnitudes: Float32Array) -> Float32Array:
    """The 0.9 quantile over all elements of each sample, with linear interpolation.

    Between the order statistics a and b that enclose `quantile_rank`, the value is that of ``torch.lerp``:
    a + w (b - a), or b - (b - a)(1 - w) for w >= 0.5. Where torch uses fused multiply-adds, the last bit can differ.

    Args:
        magnitudes: float32 (B, …), with at least one element per sample.

    Returns:
        float32 (B,).
    """
    flat = magnitudes.reshape(len(magnitudes), -1)
    below, weight = quantile_rank(flat.shape[1])
    above = below + 1 if weight else below
    ordered = np.partition(flat, sorted({below, above}), axis=1)
    a, b = ordered[:, below], ordered[:, above]
    return a + weight * (b - a) if weight < 0.5 else b - (b - a) * (np.float32(1) - weight)


def threshold(x0: Float32Array) -> Float32Array:
    """Dynamic thresholding: clamp each sample to its 0.9 quantile q of |x0|, at least 1, and divide by q.

    Args:
        x0: float32 (B, …).

    Returns:
        float32 (B, …), in [-1, 1].

    Source: Saharia et al., Imagen, section 2.3.
    """
    limit: Float32Array = np.maximum(quantile_0_9(np.abs(x0)), np.float32(1)).reshape(-1, *[1] * (x0.ndim - 1))
    return np.clip(x0, -limit, limit) / limit


def apply_step(
    latent: Float32Array,
    predicted_noise: Float32Array,
    history: Float32Array,
    noise: Float32Array,
    coefficients: Float32Array,
) -> tuple[Float32Array, Float32Array]:
    """The update after the network: the reference for what the stages `step` and `step_guided` fuse.

    Args:
        latent: float32 (B, …), usually (B, 3, T, h, w).
        predicted_noise: float32, same shape.
        history: float32 (B, 2, …): the carry and the previous x0 estimate.
        noise: float32, of the shape of `latent`.
        coefficients: float32 (B, 11), one row per sample.

    Returns:
        The next latent and the next history.
    """
    c = coefficients.T.reshape(-1, len(latent), *[1] * (latent.ndim - 1))
    carry, previous_x0 = history[:, 0], history[:, 1]
    x0 = threshold(c[X0_FROM_LATENT] * latent + c[X0_FROM_PREDICTED_NOISE] * predicted_noise)
    next_latent = (
        c[NEXT_FROM_LATENT] * latent
        + c[NEXT_FROM_X0] * x0
        + c[NEXT_FROM_PREDICTED_NOISE] * predicted_noise
        + c[NEXT_FROM_CARRY] * carry
        + c[NEXT_FROM_PREVIOUS_X0] * previous_x0
        + c[NEXT_FROM_NOISE] * noise
    )
    next_carry = c[CARRY_FROM_CARRY] * carry + c[CARRY_FROM_X0] * x0 + c[CARRY_FROM_PREVIOUS_X0] * previous_x0
    return next_latent, np.stack([next_carry, x0], axis=1)


def step_from_denoiser(denoise: Callable[[Float32Array, Int64Array], Float32Array]) -> Step:
    """Make a step from a network alone.

    Args:
        denoise: takes the noisy latent (B,3,T,h,w) and the timestep (B,), returns the predicted noise (B,3,T,h,w).
    """

    def step(
        noisy_latent: Float32Array,
        timestep: Int64Array,
        history: Float32Array,
        noise: Float32Array,
        coefficients: Float32Array,
    ) -> tuple[Float32Array, Float32Array]:
        predicted_noise = denoise(noisy_latent, timestep)
        return apply_step(noisy_latent, predicted_noise, history, noise, coefficients)

    return step


def sample(
    step: Step,
    table: SamplerTable,
    start: Float32Array,
    noise: NoiseSource | Iterable[Float32Array],
    *,
    on_step: Callable[[int, Float32Array, Float32Array], None] | None = None,
) -> Float32Array:
    """Run a chain for all samples of a batch together.

    Args:
        step: called once per row of the table.
        table: the sampler.
        start: float32 (B, 3, T, h, w), standard normal.
        noise: a source (`seeded_noise`, `handed_noise`), or an iterator over the draws after the start. It is
            called only where ``table.draws_noise`` is true; further draws stay in it.
        on_step: called after each step with its index and the latent and history that the step returned.

    Returns:
        The last latent, float32 (B, 3, T, h, w).

    Raises:
        InputError: the start is not a float32 batch, or the noise runs out or does not match it.
    """
    if start.dtype != np.float32 or start.ndim < 2:
        raise InputError(
            f"start: found {start.dtype} {start.shape}, expected float32 (B, 3, T, h, w); pass such an array"
        )
    source = noise if callable(noise) else handed_noise(noise, start.shape)
    batch, latent = len(start), start
    history = np.zeros((batch, 2, *start.shape[1:]), np.float32)
    silence = np.zeros_like(start)
    for i, timestep in enumerate(table.timesteps):
        latent, history = step(
            latent,
            np.full(batch, timestep),
            history,
            source(i) if table.draws_noise[i] else silence,
            np.tile(table.coefficients[i], (batch, 1)),
        )
        if on_step is not None:
            on_step(i, latent, history)
    return latent
