"""Trains a DM for a chain of few steps, on samples of a teacher or on a data set.

For each picture and label, the whole chain runs twice. The energy score compares both results with a latent of the data
and with each other. Its mean is smallest only if the results have the distribution of the data: results at the mean are
near the data, but not apart from each other; widely scattered ones are far from the data. No critic or other second
network is trained, so a step costs little more than one of the DM's training.

Source: Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation (JASA 2007), section 4.3; De
Bortoli et al., Distributional Diffusion Models with Scoring Rules (arXiv 2502.02483), who train denoisers with it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lfdm_models.config import LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae
from lfdm_models.training.centering import center
from lfdm_models.training.conditions import Float32Array
from lfdm_models.training.dm import DmStage
from lfdm_models.training.few_steps import FewSteps, run_chain
from lfdm_models.training.settings import Precision

#: Chains per picture and label.
DRAWS = 2
# Side of the squares of latents that are compared in addition to the whole, which is insensitive to details.
_SQUARE = 4
#: Least standard deviation of a channel; differences are divided by it.
_LEAST_DEVIATION = 1e-3


def views(latent: Tensor) -> tuple[Tensor, ...]:
    """The compared parts of latents (B, 3, T, h, w): the whole (B, 1, n), and squares over all frames (B, S, m)."""
    whole = latent.flatten(1)[:, None]
    rows, columns = latent.shape[3] // _SQUARE, latent.shape[4] // _SQUARE
    if not (rows and columns):
        return (whole,)
    inside = latent[..., : rows * _SQUARE, : columns * _SQUARE]
    squares = inside.unflatten(4, (columns, _SQUARE)).unflatten(3, (rows, _SQUARE))
    return whole, squares.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Distances (B,) between latents (B, 3, T, h, w): root mean squares, summed over `views`."""
    pairs = zip(views(first), views(second), strict=True)
    # The root has no gradient at 0.
    return torch.stack([(a - b).square().mean(-1).add(1e-8).sqrt().mean(1) for a, b in pairs]).sum(0)


def energy_score(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Mean energy score of `DRAWS` latents per example: (B, DRAWS, 3, T, h, w) against (B, 3, T, h, w)."""
    first, second = drawn.unbind(1)
    away = (distance(first, wanted) + distance(second, wanted)) / 2
    return (away - distance(first, second) / 2).mean()


def spread_of(latent: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (3,) of each channel of latents (N, 3, T, h, w)."""
    return latent.mean(dim=(0, 2, 3, 4)), latent.std(dim=(0, 2, 3, 4)).clamp(min=_LEAST_DEVIATION)


class FewStepStage(DmStage):
    """Training of a DM for the few steps of its table."""

    # In bfloat16, the network would copy the noise with 8 bits; few steps cannot correct such errors.
    gpu_precision: Precision = "tf32"
    #: Facts of the kind of stage, beside those of every DM.
    kind: Mapping[str, Any] = {"stage": "distill"}

    table_of_steps: FewSteps

    def __init__(
        self,
        config: LfdmConfig,
        lfae: Lfae,
        teacher: Diffusion,
        embeddings: Mapping[str, Float32Array],
        *,
        times: tuple[int, ...],
        first: Mapping[str, Tensor],
        examples: Mapping[str, Any],
        guidance: float = 1.0,
        preview_clips: Tensor | None = None,
    ) -> None:
        """Start from the teacher's weights, changed for a chain that starts at the mean (`centering`).

        Args:
            config: configuration of both networks.
            lfae: the trained LFAE, which is not changed.
            teacher: the trained DM, which is not changed.
            embeddings: see `DmStage`.
            times: (S,), times of the chain, falling.
            first: a batch of examples, from which the latents' means and deviations are measured.
            examples: see `DmStage`.
            guidance: guidance scale of the teacher's samples, stored with the run.
            preview_clips: see `DmStage`.
        """
        super().__init__(
            config,
            lfae,
            copy.deepcopy(teacher).requires_grad_(False),
            embeddings,
            examples=examples,
            null_probability=0.0,
            preview_clips=preview_clips,
        )
        self.begin(times, *self.shown(first))
        for name, weight in self.network.named_parameters():
            weight.requires_grad_(not name.endswith("rotary_emb.freqs"))
        self.facts |= {**self.kind, "few_steps": self.table_of_steps.plain(), "guidance distilled": guidance}

    def begin(self, times: tuple[int, ...], latent: Tensor, feature: Tensor) -> None:
        """Set the table, the initial weights and the scales of the losses.

        Args:
            times: (S,), times of the chain, falling.
            latent: (N, 3, T, h, w), of the first examples.
            feature: (N, C, h, w), of the same.
        """
        raise NotImplementedError

    def shown(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Target latents (B, 3, T, h, w) and features (B, C, h, w) of a batch of samples or clips."""
        if "latent" in batch:
            return batch["latent"], batch["feature"]
        return self.encode_once(batch["frames"], batch["clip"].tolist())

    def sample(self, diffusion: Diffusion, clips: Tensor, embedding: Tensor) -> Tensor:
        """Latents for the first frames of `clips` from the chain of few steps; for previews."""
        feature = self.lfae.generator.encode(clips[:, :, 0])[-1]
        generator = torch.Generator(clips.device).manual_seed(0)
        return run_chain(diffusion, self.table_of_steps, feature, embedding, clips.shape[2], generator)


class DistillStage(FewStepStage):
    """Training of a DM for few steps; see the module's docstring."""

    def begin(self, times: tuple[int, ...], latent: Tensor, feature: Tensor) -> None:
        """See `FewStepStage.begin`."""
        mean, deviation = spread_of(latent)
        self.deviation = deviation.view(1, -1, 1, 1, 1)
        self.table_of_steps = center(self.diffusion, times, mean, feature)

    def to(self, device: torch.device) -> None:
        """Move networks, embeddings and deviations."""
        super().to(device)
        self.deviation = self.deviation.to(device)

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The energy score of the chains, with each channel divided by its deviation."""
        wanted, feature = self.shown(batch)
        embedding = self.embedding_of(batch["label"])
        drawn = run_chain(
            self.diffusion,
            self.table_of_steps,
            feature.repeat_interleave(DRAWS, 0),
            embedding.repeat_interleave(DRAWS, 0),
            wanted.shape[2],
            generator,
        )
        return {"energy": energy_score((drawn / self.deviation).unflatten(0, (-1, DRAWS)), wanted / self.deviation)}
