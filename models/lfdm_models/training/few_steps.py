"""Sampling chains in torch: the chain of few steps through which a DM is distilled, and the long chain of its teacher.

The table of a short chain corresponds to `lfdm_export.sampling.tuned.TunedSteps`, with new noise between all steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfdm_models.diffusion import Diffusion
from lfdm_models.training.settings import DEFAULT_TIMES


@dataclass(frozen=True)
class FewSteps:
    """The table of a chain of S steps.

    Attributes:
        times: (S,), the training steps at which the network is evaluated, falling.
        gains: (S,), factors of the x0 estimates, above 0.
    """

    times: tuple[int, ...]
    gains: tuple[float, ...]

    def plain(self) -> dict[str, Any]:
        """The table as a checkpoint stores it, from which the toolkit makes a `TunedSteps`."""
        return {"times": list(self.times), "gains": list(self.gains), "fresh": [1.0] * (len(self.times) - 1)}


def chosen_times(steps: int, training_steps: int) -> tuple[int, ...]:
    """The times of a chain on a schedule.

    Raises:
        ValueError: the number of steps is not supported, or the schedule is too short for different times.
    """
    if steps not in DEFAULT_TIMES:
        raise ValueError(f"steps is {steps}, expected {', '.join(map(str, DEFAULT_TIMES))}")
    times = tuple(int(share * training_steps) for share in DEFAULT_TIMES[steps])
    if len(set(times)) < steps:
        raise ValueError(f"a schedule of {training_steps} training steps is too short for {steps} steps")
    return times


def levels(diffusion: Diffusion, timestep: int | Tensor) -> tuple[Tensor, Tensor]:
    """The factors of latent and noise at a time, or at times (B,): sqrt(a) and sqrt(1 - a), of the same shape."""
    return (
        diffusion.get_buffer("sqrt_alphas_cumprod")[timestep],
        diffusion.get_buffer("sqrt_one_minus_alphas_cumprod")[timestep],
    )


def levels_of_steps(diffusion: Diffusion, times: Sequence[int]) -> tuple[list[float], list[float]]:
    """The factors of latent and noise at each step of a chain."""
    found = [levels(diffusion, time) for time in times]
    return [float(signal) for signal, _ in found], [float(spread) for _, spread in found]


def threshold(x0: Tensor) -> Tensor:
    """Dynamic thresholding, as in `lfdm_export.sampling.loop.threshold`; gradients treat the limit as a constant.

    Args:
        x0: (B, …) float32.

    Source: Saharia et al., Imagen (arXiv 2205.11487), section 2.3.
    """
    limit = torch.quantile(x0.detach().abs().flatten(1), 0.9, dim=1).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-limit, limit) / limit


def run_chain(
    diffusion: Diffusion, table: FewSteps, feature: Tensor, embedding: Tensor, size: int, generator: torch.Generator
) -> Tensor:
    """Latents (B, 3, T, h, w) float32 from a chain of few steps, through which gradients flow.

    Args:
        diffusion: the DM.
        table: the table of the chain.
        feature: (B, C, h, w).
        embedding: (B, text_width).
        size: T, frames of a clip.
        generator: for the initial noise, and the noise between the steps.
    """
    shape = (len(feature), 3, size, *feature.shape[2:])
    latent = torch.randn(shape, generator=generator, device=feature.device)
    for index, (time, gain) in enumerate(zip(table.times, table.gains, strict=True)):
        signal, spread = levels(diffusion, time)
        timestep = torch.full((len(latent),), time, device=latent.device)
        noise = diffusion.denoise_fn(latent, feature, embedding, timestep).float()
        latent = threshold(gain * (latent - spread * noise) / signal)
        if index + 1 < len(table.times):
            signal, spread = levels(diffusion, table.times[index + 1])
            fresh = torch.randn(shape, generator=generator, device=feature.device)
            latent = signal * latent + spread * fresh
    return latent


@torch.no_grad()
def long_chain(
    diffusion: Diffusion,
    feature: Tensor,
    embedding: Tensor,
    start: Tensor,
    steps: int,
    guidance: float,
    generator: torch.Generator,
) -> Tensor:
    """Latents (B, 3, T, h, w) from DDIM with eta 1: the noise of each step corrects errors of the network.

    Args:
        diffusion: the teacher.
        feature: (B, C, h, w).
        embedding: (B, text_width).
        start: (B, 3, T, h, w), standard normal.
        steps: number of steps, spread evenly over the schedule.
        guidance: scale of classifier-free guidance; 1: only the conditional prediction.
        generator: for the noise of the steps.

    Source: Song et al., Denoising Diffusion Implicit Models (arXiv 2010.02502), equations 12 and 16.
    """
    training_steps = len(diffusion.get_buffer("alphas_cumprod"))
    times = [training_steps * (steps - index) // (steps + 1) for index in range(steps)]
    latent = start
    for now, after in zip(times, [*times[1:], -1], strict=True):
        signal, spread = levels(diffusion, now)
        timestep = torch.full((len(latent),), now, device=latent.device)
        noise = diffusion.denoise_fn.guided(latent, feature, embedding, timestep, guidance)
        x0 = threshold((latent - spread * noise) / signal)
        if after < 0:
            return x0
        signal_after, spread_after = levels(diffusion, after)
        sigma = spread_after / spread * (1 - (signal / signal_after).square()).sqrt()
        fresh = torch.randn(latent.shape, generator=generator, device=latent.device)
        kept = (spread_after.square() - sigma.square()).clamp(min=0).sqrt()
        latent = signal_after * x0 + kept * noise + sigma * fresh
    return latent
