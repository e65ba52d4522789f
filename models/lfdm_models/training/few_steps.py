"""Chains of few steps in torch: what a distilled DM is trained through, and the long chains of its teacher.

The table of a chain is that of `lfdm_export.sampling.tuned.TunedSteps`, all noise between its steps drawn anew.
"""

from __future__ import annotations

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
        times: (S,), the training step that the network is asked about, falling.
        gains: (S,), of the x0 estimates, above 0.
    """

    times: tuple[int, ...]
    gains: tuple[float, ...]

    def plain(self) -> dict[str, Any]:
        """As a checkpoint tells of it, for the toolkit to make a `TunedSteps` of."""
        return {"times": list(self.times), "gains": list(self.gains), "fresh": [1.0] * (len(self.times) - 1)}


def chosen_times(steps: int, training_steps: int) -> tuple[int, ...]:
    """Times of a chain on a schedule.

    Raises:
        ValueError: there are no times for so many steps, or the schedule is too short to tell them apart.
    """
    if steps not in DEFAULT_TIMES:
        raise ValueError(f"steps is {steps}, expected {', '.join(map(str, DEFAULT_TIMES))}")
    times = tuple(int(share * training_steps) for share in DEFAULT_TIMES[steps])
    if len(set(times)) < steps:
        raise ValueError(f"a schedule of {training_steps} training steps is too short for {steps} steps")
    return times


def levels(diffusion: Diffusion, timestep: int) -> tuple[Tensor, Tensor]:
    """Shares of latent and noise at a time: sqrt(a) and sqrt(1 - a), scalars."""
    return (
        diffusion.get_buffer("sqrt_alphas_cumprod")[timestep],
        diffusion.get_buffer("sqrt_one_minus_alphas_cumprod")[timestep],
    )


def threshold(x0: Tensor) -> Tensor:
    """Dynamic thresholding, as `lfdm_export.sampling.loop.threshold`; its limit counts as a constant for gradients.

    Args:
        x0: (B, …) float32.

    Source: Saharia et al., Imagen (arXiv 2205.11487), section 2.3.
    """
    limit = torch.quantile(x0.detach().abs().flatten(1), 0.9, dim=1).clamp(min=1).view(-1, *[1] * (x0.ndim - 1))
    return x0.clamp(-limit, limit) / limit


def run_chain(
    diffusion: Diffusion, table: FewSteps, feature: Tensor, embedding: Tensor, size: int, generator: torch.Generator
) -> Tensor:
    """Latents (B, 3, T, h, w) float32 by a chain of few steps, through which gradients flow.

    Args:
        diffusion: whose network is asked.
        table: the steps.
        feature: (B, C, h, w).
        embedding: (B, text_width).
        size: T, frames of a clip.
        generator: of the start, and of the noise between the steps.
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
    """Latents (B, 3, T, h, w) by DDIM with eta 1: noise at each step corrects what the network gets wrong.

    Args:
        diffusion: the teacher.
        feature: (B, C, h, w).
        embedding: (B, text_width).
        start: (B, 3, T, h, w), standard normal.
        steps: how many, evenly over the schedule.
        guidance: scale of classifier-free guidance; 1: the conditional prediction alone.
        generator: of the noise.

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
