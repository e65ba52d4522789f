"""The energy score of the last level's training: latents, and the picture's features that they warp, at several scales.

Of a latent, most elements hold little but noise; motion is in averages, and what a viewer sees of it depends on the
picture. The decoder warps the picture's features by the flow and multiplies them by the occlusion. So distances are
taken of the latents and of the warped features. Each distance is divided by its mean for the data, so that motion
counts as much as details.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lfdm_models.layers import sample
from lfdm_models.lfae import latent_to_flow
from lfdm_models.training.distill_stage import views

# Frames, rows and columns over which latents and warped features are averaged.
_LATENT_AVERAGES = ((2, 2, 2), (4, 4, 4), (4, 8, 8), (1, 4, 4))
_WARPED_AVERAGES = ((4, 1, 1), (2, 4, 4))

Views = Callable[[Tensor], Sequence[Tensor]]


class Score:
    """The energy score of two draws per example, for the data of some latents.

    Args:
        latent: (N, 3, T, h, w), latents of the data.
        feature: (N, C, h, w), features of their pictures.
        mean: (3,), mean of each channel of the latents.
        deviation: (3,), their standard deviation.
        residual_flow: whether latents hold offsets from the identity.
    """

    def __init__(
        self, latent: Tensor, feature: Tensor, mean: Tensor, deviation: Tensor, *, residual_flow: bool
    ) -> None:
        self.mean, self.deviation = mean, deviation
        self.residual_flow = residual_flow
        still = mean.view(1, 3, 1, 1, 1).expand_as(latent)
        self._scales = [
            _distances(kind, one, other).mean(1, keepdim=True).clamp(min=1e-6)
            for (kind, one), (_, other) in zip(self._seen(latent, feature), self._seen(still, feature), strict=True)
        ]

    def to(self, device: torch.device) -> None:
        """Move means, deviations and scales."""
        self.mean, self.deviation = self.mean.to(device), self.deviation.to(device)
        self._scales = [scale.to(device) for scale in self._scales]

    def __call__(self, drawn: Tensor, wanted: Tensor, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The score of the latents, and that of the warped features.

        Args:
            drawn: (B, 2, 3, T, h, w), two draws per example.
            wanted: (B, 3, T, h, w), latents of the data.
            feature: (B, C, h, w), features of the pictures.
        """
        seen = zip(*(self._seen(one, feature) for one in (*drawn.unbind(1), wanted)), strict=True)
        scores = []
        for ((kind, first), (_, second), (_, data)), scale in zip(seen, self._scales, strict=True):
            away = (_distances(kind, first, data) + _distances(kind, second, data)) / 2
            scores.append(((away - _distances(kind, first, second) / 2) / scale).mean())
        return scores[0], scores[1]

    def _seen(self, latent: Tensor, feature: Tensor) -> tuple[tuple[Views, Tensor], tuple[Views, Tensor]]:
        deviation = self.deviation.view(1, 3, 1, 1, 1)
        return (latent_views, latent / deviation), (warped_views, warped(latent, feature, self.residual_flow))


def warped(latent: Tensor, feature: Tensor, residual_flow: bool) -> Tensor:
    """Features (B, C, h, w) as the decoder warps them by latents (B, 3, T, h, w): (B, C, T, h, w)."""
    frames = latent.shape[2]
    flow = latent_to_flow(latent.transpose(1, 2).flatten(0, 1), residual_flow=residual_flow)
    repeated = feature[:, None].expand(-1, frames, -1, -1, -1).flatten(0, 1)
    seen: Tensor = (sample(repeated, flow.grid) * flow.occlusion).unflatten(0, (-1, frames))
    return seen.transpose(1, 2)


def latent_views(latent: Tensor) -> tuple[Tensor, ...]:
    """The compared parts (B, groups, n) of latents: the whole, squares, averages, and changes between frames."""
    return (*views(latent), *(_averages(latent, size) for size in _LATENT_AVERAGES), _changes(latent))


def warped_views(seen: Tensor) -> tuple[Tensor, ...]:
    """The compared parts (B, groups, n) of warped features: the whole, averages, and changes between frames."""
    return (seen.flatten(1)[:, None], *(_averages(seen, size) for size in _WARPED_AVERAGES), _changes(seen))


def _averages(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    cut = [min(one, extent) for one, extent in zip(size, x.shape[2:], strict=True)]
    return F.avg_pool3d(x, cut).flatten(1)[:, None]


def _changes(x: Tensor) -> Tensor:
    return (x[:, :, 1:] - x[:, :, :-1]).flatten(1)[:, None]


def _distances(kind: Views, first: Tensor, second: Tensor) -> Tensor:
    """Root mean squares (views, B)."""
    pairs = zip(kind(first), kind(second), strict=True)
    # The root has no gradient at 0.
    return torch.stack([(a - b).square().mean(-1).add(1e-8).sqrt().mean(1) for a, b in pairs])
