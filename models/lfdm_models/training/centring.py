"""Weights of a DM changed so that a chain of few steps begins at the latents' own mean.

A chain begins with noise, and many steps forgive that no latent is noise: few do not. At the time where they begin
the network expects the latents' mean (occlusion is near 1) and a little less noise; without the mean it takes
the picture for half occluded. What it expects, ``sqrt(a) mean + sqrt(1 - a) noise``, is linear in noise, so the first
convolution can make it of the noise: its weights for the latent are made smaller, and the constant is added through the
feature, of which a combination is nearly 1 everywhere. (A bias would not do: it reaches the border, too, where the
network knows zeros.) The last convolutions subtract what was added.

Later steps see the constant as well. The weight of the x0 estimate in the next latent is therefore chosen such that the
mean is right there, too, at the price of a smaller deviation from it, which the next gain makes up for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfdm_models.diffusion import Diffusion
from lfdm_models.training.few_steps import FewSteps, levels

# Of the least squares that look for the constant 1 in features, as a share of their mean square.
_RIDGE = 1e-5
_HALVINGS = 100


@torch.no_grad()
def centre(diffusion: Diffusion, times: Sequence[int], mean: Tensor, features: Tensor) -> FewSteps:
    """Change a DM's weights for a chain that begins at the mean, and give the chain.

    Args:
        diffusion: changed.
        times: (S,), falling.
        mean: (3,), of the latents' channels.
        features: (N, C, h, w) of pictures, to find the constant in.
    """
    unet = diffusion.denoise_fn
    signals, spreads = zip(*((float(a), float(b)) for a, b in (levels(diffusion, time) for time in times)), strict=True)
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
    """How much of the added constant the last layer takes away, and the latents' amplitudes (S,) at each step.

    With a step's amplitude r the network sees ``r (latent - mean) + sqrt(a) mean + noise``. The estimate that comes of
    it has the mean times h; the last must have it once, which decides, for h rises with the share that is taken away.
    """
    low, high = 0.0, 1 / spreads[0]  # at the upper end it is 1 after the first step, and more after each further one
    for _ in range(_HALVINGS):
        removed = (low + high) / 2
        amplitudes, mean = [signals[0]], 0.0
        for step, (signal, spread) in enumerate(zip(signals, spreads, strict=True)):
            mean = (signal - signals[0] * (1 - spread * removed)) / amplitudes[-1]
            if step + 1 < len(signals):
                amplitudes.append((signals[step + 1] - signals[0]) / mean)
        low, high = (removed, high) if mean < 1 else (low, removed)
    return removed, amplitudes
