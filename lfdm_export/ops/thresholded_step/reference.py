"""ThresholdedStep in torch; inside an ONNX export it adds a node of domain `lfdm` instead.

Source: dynamic thresholding of Saharia et al. (arXiv 2205.11487), Sec. 2.3, as the published LFDM applies it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfdm_export.ops.cuda.dispatch import has_kernel
from lfdm_export.ops.symbolic import Attributes, exporting, node
from lfdm_export.sampling import rows
from lfdm_export.sampling.loop import quantile_rank


def thresholded_step(
    latent: Tensor, predicted_noise: Tensor, history: Tensor, noise: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """One update of any sampler; `lfdm_export.sampling.loop` defines the coefficients.

    On a GPU this is the kernel of `kernel.cuh`.

    Args:
        latent: the noisy latent x, (B, 3, T, h, w).
        predicted_noise: the same shape; the same dtype, or a narrower one.
        history: carry and previous x0 estimate, (B, 2, 3, T, h, w).
        noise: like `latent`.
        coefficients: (B, 11).

    Returns:
        The next latent and the next history.
    """
    if exporting():
        lower, weight = quantile_rank(math.prod(latent.shape[1:]))
        inputs = [latent, predicted_noise, history, noise, coefficients]
        attributes: Attributes = {"lower_rank": lower, "weight": float(weight)}
        next_latent, next_history = node(
            "ThresholdedStep", inputs, attributes, [tuple(latent.shape), tuple(history.shape)]
        )
        return next_latent, next_history
    if has_kernel(latent):
        from lfdm_export.ops.thresholded_step.gpu import thresholded_step_on_gpu

        return thresholded_step_on_gpu(latent, predicted_noise, history, noise, coefficients)
    return thresholded_step_in_torch(latent, predicted_noise, history, noise, coefficients)


def thresholded_step_in_torch(
    latent: Tensor, predicted_noise: Tensor, history: Tensor, noise: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """`thresholded_step` with torch's own operators, on any device."""
    c = coefficients.view(*coefficients.shape, *[1] * (latent.ndim - 1)).unbind(dim=1)
    carry, previous = history.unbind(dim=1)
    estimate = c[rows.X0_FROM_LATENT] * latent + c[rows.X0_FROM_PREDICTED_NOISE] * predicted_noise
    magnitude = estimate.flatten(1).abs()
    lower, weight = quantile_rank(magnitude.shape[1])
    ordered = magnitude.sort(dim=1).values
    above = ordered[:, min(lower + 1, magnitude.shape[1] - 1)]
    bound = torch.lerp(ordered[:, lower], above, float(weight)).clamp(min=1).view(-1, *[1] * (latent.ndim - 1))
    x0 = torch.clamp(estimate, -bound, bound) / bound
    next_latent = (
        c[rows.NEXT_FROM_LATENT] * latent
        + c[rows.NEXT_FROM_X0] * x0
        + c[rows.NEXT_FROM_PREDICTED_NOISE] * predicted_noise
        + c[rows.NEXT_FROM_CARRY] * carry
        + c[rows.NEXT_FROM_PREVIOUS_X0] * previous
        + c[rows.NEXT_FROM_NOISE] * noise
    )
    next_carry = (
        c[rows.CARRY_FROM_CARRY] * carry + c[rows.CARRY_FROM_X0] * x0 + c[rows.CARRY_FROM_PREVIOUS_X0] * previous
    )
    return next_latent, torch.stack([next_carry, x0], dim=1)
