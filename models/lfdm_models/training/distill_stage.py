"""A DM of few steps learns the distribution that its teacher, or a data set, has.

All of a short chain runs, twice for the same picture and label, and both ends are compared with a latent of the data,
and with each other, by the energy score: it is smallest, on average, only where they have the data's distribution. A
chain that gave the mean would be near the data but its ends no distance apart; one that scattered would be far from the
data. There is no critic and no second network to train, so that a step costs little more than one of the DM's.

Source: Gneiting and Raftery, Strictly Proper Scoring Rules, Prediction, and Estimation (JASA 2007), section 4.3; De
Bortoli et al., Distributional Diffusion Models with Scoring Rules (arXiv 2502.02483), who train denoisers by it.
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
from lfdm_models.training.centring import centre
from lfdm_models.training.conditions import Float32Array
from lfdm_models.training.dm import DmStage
from lfdm_models.training.few_steps import run_chain
from lfdm_models.training.settings import Precision

#: Chains for the same picture and label.
DRAWS = 2
# Side of the squares of latents that are compared beside the whole, which alone would say little of details.
_SQUARE = 4
# Below it a channel has no deviation that could be measured in.
_LEAST_DEVIATION = 1e-3


def views(latent: Tensor) -> tuple[Tensor, ...]:
    """What is compared of latents (B, 3, T, h, w): the whole (B, 1, n), and squares over all frames (B, S, m)."""
    whole = latent.flatten(1)[:, None]
    rows, columns = latent.shape[3] // _SQUARE, latent.shape[4] // _SQUARE
    if not (rows and columns):
        return (whole,)
    inside = latent[..., : rows * _SQUARE, : columns * _SQUARE]
    squares = inside.unflatten(4, (columns, _SQUARE)).unflatten(3, (rows, _SQUARE))
    return whole, squares.permute(0, 3, 5, 1, 2, 4, 6).flatten(3).flatten(1, 2)


def distance(first: Tensor, second: Tensor) -> Tensor:
    """Distances (B,) of latents (B, 3, T, h, w): root mean squares, summed over `views`."""
    pairs = zip(views(first), views(second), strict=True)
    # The root has no gradient at 0.
    return torch.stack([(a - b).square().mean(-1).add(1e-8).sqrt().mean(1) for a, b in pairs]).sum(0)


def energy_score(drawn: Tensor, wanted: Tensor) -> Tensor:
    """Mean energy score of `DRAWS` latents each: (B, DRAWS, 3, T, h, w) against (B, 3, T, h, w)."""
    first, second = drawn.unbind(1)
    away = (distance(first, wanted) + distance(second, wanted)) / 2
    return (away - distance(first, second) / 2).mean()


class DistillStage(DmStage):
    """Training of a DM of few steps; see the module."""

    # With bfloat16 alone, noise is copied through the network with 8 bits, which few steps do not forgive.
    gpu_precision: Precision = "tf32"

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
        """Begin at the teacher's weights, for a chain that begins at the mean (`centring`).

        Args:
            config: of both networks.
            lfae: trained; it is not changed.
            teacher: the DM of many steps; it is not changed.
            embeddings: see `DmStage`.
            times: (S,) of the chain, falling.
            first: a batch of examples, which means and deviations of latents are taken from.
            examples: see `DmStage`.
            guidance: of the teacher, whose samples the examples are; for the record.
            preview_clips: see `DmStage`.
        """
        super().__init__(
            config,
            lfae,
            copy.deepcopy(teacher).requires_grad_(True),
            embeddings,
            examples=examples,
            null_probability=0.0,
            preview_clips=preview_clips,
        )
        for name, weight in self.diffusion.named_parameters():
            weight.requires_grad_(not name.endswith("rotary_emb.freqs"))
        latent, feature = self.shown(first)
        mean = latent.mean(dim=(0, 2, 3, 4))
        deviation = latent.std(dim=(0, 2, 3, 4)).clamp(min=_LEAST_DEVIATION)
        self.deviation = deviation.view(1, -1, 1, 1, 1)
        self.table_of_steps = centre(self.diffusion, times, mean, feature)
        self.facts |= {"stage": "distill", "few_steps": self.table_of_steps.plain(), "guidance distilled": guidance}

    def to(self, device: torch.device) -> None:
        """Move what there is."""
        super().to(device)
        self.deviation = self.deviation.to(device)

    def shown(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents (B, 3, T, h, w) to be like, and features (B, C, h, w): of clips, or as they were sampled."""
        if "latent" in batch:
            return batch["latent"], batch["feature"]
        return self.encode_once(batch["frames"], batch["clip"].tolist())

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """The energy score of chains, in deviations of each channel."""
        wanted, feature = self.shown(batch)
        label = batch["label"]
        embedding = torch.where(
            (label < 0)[:, None], self.diffusion.denoise_fn.null_cond_emb, self.table[label.clamp(min=0)]
        )
        drawn = run_chain(
            self.diffusion,
            self.table_of_steps,
            feature.repeat_interleave(DRAWS, 0),
            embedding.repeat_interleave(DRAWS, 0),
            wanted.shape[2],
            generator,
        )
        return {"energy": energy_score((drawn / self.deviation).unflatten(0, (-1, DRAWS)), wanted / self.deviation)}

    def sample(self, diffusion: Diffusion, clips: Tensor, embedding: Tensor) -> Tensor:
        """Latents for the first frames of `clips` by the few steps; for previews."""
        feature = self.lfae.generator.encode(clips[:, :, 0])[-1]
        generator = torch.Generator(clips.device).manual_seed(0)
        return run_chain(diffusion, self.table_of_steps, feature, embedding, clips.shape[2], generator)
