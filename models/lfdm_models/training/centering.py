"""Changes the weights of a DM so that a chain of few steps starts at the mean of the latents.

A chain starts with pure noise. Many steps can correct this start; few steps cannot. At the first time of the chain, the
network expects the latents' mean (occlusion is near 1) and slightly less noise; without the mean, it treats the picture
as half occluded. The expected input, ``sqrt(a) mean + sqrt(1 - a) noise``, is linear in the noise, so the first
convolution can compute it: its weights for the latent are scaled down, and the constant is added through a combination
of feature channels that is nearly 1 everywhere. (A bias cannot replace it: it would also act at the border, where the
network expects the zeros of the padding.) The last convolutions subtract the constant.

Later steps receive the constant as well. The weight of the x0 estimate in the next latent is therefore chosen so that
the mean is right there too. This reduces the deviation from the mean, which the next gain restores.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfdm_models.diffusion import Diffusion
from lfdm_models.training.few_steps import FewSteps, levels_of_steps

# Ridge of the least squares in `constant_of`, as a share of the features' mean square.
_RIDGE = 1e-5
_HALVINGS = 100


@torch.no_grad()
def center(diffusion: Diffusion, times: Sequence[int], mean: Tensor, features: Tensor) -> FewSteps:
    """Change a DM's weights for a chain that starts at the mean, and return the table of the chain.

    Args:
        diffusion: the DM, which is changed.
        times: (S,), falling.
        mean: (3,), mean of each channel of the latents.
        features: (N, C, h, w), features of pictures, for `constant_of`.
    """
    unet = diffusion.denoise_fn
    signals, spreads = levels_of_steps(diffusion, times)
    added = signals[0] * mean
    removed, amplitudes = _solve(signals, spreads)
    weight = unet.init_conv.weight
    channels = len(mean)
    weight[:, channels:] += torch.einsum("octij,c,f->oftij", weight[:, :channels], added, constant_of(features))
    weight[:, :channels] *= spreads[0]
    for head, part in ((unet.final_conv, slice(0, 2)), (unet.occlusion_map, slice(2, 3))):
        assert head.conv.bias is not None
        head.conv.weight /= spreads[0]
        head.conv.bias.copy_((head.conv.bias - removed * added[part]) / spreads[0])
    ends = [*(amplitude / signal for amplitude, signal in zip(amplitudes[1:], signals[1:], strict=True)), spreads[0]]
    gains = [signal / amplitude * end for signal, amplitude, end in zip(signals, amplitudes, ends, strict=True)]
    return FewSteps(tuple(times), tuple(gains))


def constant_of(features: Tensor) -> Tensor:
    """The combination (C,) of features (N, C, h, w) that is nearest to 1 everywhere, by least squares."""
    rows = features.movedim(1, -1).flatten(0, -2).double()
    squares = rows.T @ rows
    ridge = _RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=rows.dtype, device=rows.device)
    combination: Tensor = torch.linalg.solve(squares + ridge, rows.sum(0))
    return combination.to(features.dtype)


def _solve(signals: Sequence[float], spreads: Sequence[float]) -> tuple[float, list[float]]:
    """The share of the constant that the last layer subtracts, and the amplitudes (S,) of the latents at each step.

    At a step with amplitude r, the network receives ``r (latent - mean) + sqrt(a) mean + noise``. Its estimate contains
    h times the mean. At the last step h must be 1; h rises with the subtracted share, so bisection finds the share.
    """
    low, high = 0.0, 1 / spreads[0]  # at the upper end h is 1 after the first step, and larger after each further step
    for _ in range(_HALVINGS):
        removed = (low + high) / 2
        amplitudes, mean = [signals[0]], 0.0
        for step, (signal, spread) in enumerate(zip(signals, spreads, strict=True)):
            mean = (signal - signals[0] * (1 - spread * removed)) / amplitudes[-1]
            if step + 1 < len(signals):
                amplitudes.append((signals[step + 1] - signals[0]) / mean)
        low, high = (removed, high) if mean < 1 else (low, removed)
    return removed, amplitudes
