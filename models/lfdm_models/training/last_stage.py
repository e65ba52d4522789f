"""Trains the last level of a DM for a chain of few steps, on features that are computed once.

All but the last level runs once per picture and noise, and its outputs are kept in half precision. Then only the last
level (two ResBlocks, attention, and the layers that predict) is trained, in a small part of the whole network's time.
It no longer predicts noise but the latent itself, in units of its deviation: as noise, the latent is a small
difference from the input, and each error of the network counts many times over.

The table expresses this without another format. Its gains are so small that the input hardly appears in the estimate of
x0, ``gain (x - spread e) / signal``, and the last layers are scaled up accordingly.

Later steps of the chain are trained on latents of the data with noise, as in the training of a DM: if a step gives the
distribution of the data, that is what the next one gets.

Source: De Bortoli et al., Distributional Diffusion Models with Scoring Rules (arXiv 2502.02483).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from lfdm_models.config import LfdmConfig
from lfdm_models.training.centering import center
from lfdm_models.training.data import permutation
from lfdm_models.training.devices import generator
from lfdm_models.training.distill_stage import DRAWS, FewStepStage, spread_of
from lfdm_models.training.few_steps import FewSteps, levels, levels_of_steps
from lfdm_models.training.last_views import Score
from lfdm_models.training.teacher import ReportSamples
from lfdm_models.unet import Unet3D

# Factor of the predicted noise in the estimate of x0. The input's factor is about the same: a 20th of the deviation of
# small flows.
_FACTOR = 1e-3
# Pictures per run of the network; a batch is always the same examples, so that its bits do not depend on a resumption.
_BATCH = 4


class LastLevel(nn.Module):
    """The trained part of a UNet, under the UNet's names."""

    def __init__(self, unet: Unet3D) -> None:
        super().__init__()
        self.last = len(unet.up_levels) - 1
        self.ups = nn.ModuleDict({str(self.last): unet.up_levels[-1]})
        self.final_conv, self.occlusion_map = unet.final_conv, unet.occlusion_map

    def forward(self, inputs: Tensor, first: Tensor, condition: Tensor, bias: Tensor) -> Tensor:
        """(B, 2 width, T, h, w), (B, width, T, h, w), (B, condition), (heads, T, T) -> (B, 3, T, h, w)."""
        seen = torch.cat([self.ups[str(self.last)](inputs, condition, bias), first], dim=1)
        return torch.cat([self.final_conv(seen), self.occlusion_map(seen)], dim=1)


@dataclass(frozen=True)
class KeptFeatures(Dataset[dict[str, Tensor]]):
    """Examples of the last level, in a new order in every epoch: each picture at each step of the chain.

    Attributes:
        inputs: (N, S, 2, 2 width, T, h, w) float16, inputs of the last level for two draws of noise.
        first: (N, S, 2, width, T, h, w) float16, outputs of the first convolution.
        conditions: (N, S, condition), of times and labels.
        latents: (N, 3, T, h, w), latents of the data.
        features: (N, C, h, w), features of the pictures.
        seed: seed of the order.
    """

    inputs: Tensor
    first: Tensor
    conditions: Tensor
    latents: Tensor
    features: Tensor
    seed: int

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        count, steps = self.inputs.shape[:2]
        epoch, place = divmod(number, count * steps)
        clip, step = divmod(int(permutation(count * steps, self.seed, epoch)[place]), steps)
        return {
            "inputs": self.inputs[clip, step],
            "first": self.first[clip, step],
            "condition": self.conditions[clip, step],
            "latent": self.latents[clip],
            "feature": self.features[clip],
            "step": torch.tensor(step),
        }


class LastStage(FewStepStage):
    """Training of the last level; see the module's docstring."""

    kind: Mapping[str, Any] = {**FewStepStage.kind, "learn": "last"}

    def begin(self, times: tuple[int, ...], latent: Tensor, feature: Tensor) -> None:
        """See `FewStepStage.begin`; the last level initially gives the mean latent."""
        mean, deviation = spread_of(latent)
        self.score = Score(latent, feature, mean, deviation, residual_flow=self.config.residual_flow)
        center(self.diffusion, times, mean, feature)
        signals, spreads = levels_of_steps(self.diffusion, times)
        gains = tuple(_FACTOR * signal / spread for signal, spread in zip(signals, spreads, strict=True))
        self.table_of_steps = FewSteps(tuple(times), gains)
        # The first convolution adds the mean at every step, so the estimates before the last are without that much.
        shares = [signals[0] / (spreads[0] * signal) for signal in signals[1:]]
        self.offsets = torch.tensor([*shares, 0.0])[:, None] * mean
        self.last_level = LastLevel(self.diffusion.denoise_fn)
        for head in (self.last_level.final_conv, self.last_level.occlusion_map):
            nn.init.zeros_(head.conv.weight)
            assert head.conv.bias is not None
            nn.init.zeros_(head.conv.bias)

    @property
    def network(self) -> nn.Module:
        """The last level."""
        return self.last_level

    def to(self, device: torch.device) -> None:
        """Move networks, embeddings, means and deviations."""
        super().to(device)
        self.score.to(device)
        self.offsets = self.offsets.to(device)

    @torch.no_grad()
    def keep(self, latents: Tensor, features: Tensor, labels: Tensor, seed: int, report: ReportSamples) -> KeptFeatures:
        """Run the network up to its last level, for each picture at each step with two draws of noise.

        Args:
            latents: (N, 3, T, h, w).
            features: (N, C, h, w).
            labels: (N,), indices of labels; below 0 for none.
            seed: seed of noise and order.
            report: called with the number of pictures done and their total.
        """
        unet, times = self.diffusion.denoise_fn, self.table_of_steps.times
        kept: dict[str, list[Tensor]] = {"inputs": [], "first": [], "conditions": []}
        hooks = [
            unet.up_levels[-1].register_forward_pre_hook(lambda _, given: kept["inputs"].append(given[0].half())),
            unet.up_levels[-1].register_forward_pre_hook(lambda _, given: kept["conditions"].append(given[1])),
            unet.init_conv.register_forward_hook(lambda _, __, out: kept["first"].append(out.half())),
        ]
        try:
            for start in range(0, len(latents), _BATCH):
                part = slice(start, start + _BATCH)
                draws = generator(seed, start)
                for step, time in enumerate(times):
                    self._run(unet, latents[part], features[part], labels[part], step, time, draws)
                report(min(start + _BATCH, len(latents)), len(latents))
        finally:
            for hook in hooks:
                hook.remove()
        whole = {name: _by_clip(parts, len(times), len(latents)) for name, parts in kept.items()}
        return KeptFeatures(whole["inputs"], whole["first"], whole["conditions"][:, :, 0], latents, features, seed)

    def _run(
        self,
        unet: Unet3D,
        latent: Tensor,
        feature: Tensor,
        label: Tensor,
        step: int,
        time: int,
        generator: torch.Generator,
    ) -> None:
        """Run the network at a step, for two draws of each example."""
        device = self.table.device
        seen = torch.randn((DRAWS * len(latent), *latent.shape[1:]), generator=generator)
        if step:
            signal, spread = (float(level) for level in levels(self.diffusion, time))
            before = latent - self.offsets[step - 1].cpu().view(1, 3, 1, 1, 1)
            seen = signal * before.repeat_interleave(DRAWS, 0) + spread * seen
        embedding = self.embedding_of(label.to(device)).repeat_interleave(DRAWS, 0)
        timestep = torch.full((len(seen),), time, device=device)
        unet(seen.to(device), feature.to(device).repeat_interleave(DRAWS, 0), embedding, timestep)

    def losses(
        self,
        batch: Mapping[str, Tensor],
        generator: torch.Generator,  # noqa: ARG002 (the noise was drawn before)
    ) -> dict[str, Tensor]:
        """The energy scores of the last level's latents, and of the features that they warp."""
        wanted = batch["latent"]
        out = self.last_level(
            batch["inputs"].flatten(0, 1).float(),
            batch["first"].flatten(0, 1).float(),
            batch["condition"].repeat_interleave(DRAWS, 0),
            self.diffusion.denoise_fn.time_rel_pos_bias(wanted.shape[2]),
        ).float()
        offset = self.offsets[batch["step"]].repeat_interleave(DRAWS, 0)
        shift = (self.score.mean + offset).view(-1, 3, 1, 1, 1)
        drawn = self.score.deviation.view(1, 3, 1, 1, 1) * out + shift
        latent, warped = self.score(drawn.unflatten(0, (-1, DRAWS)), wanted, batch["feature"])
        return {"latent": latent, "warped": warped}

    def checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The whole DM in the released layout, with last layers that are scaled for the table."""
        unet = {key: value.detach().cpu() for key, value in self.diffusion.denoise_fn.state_dict().items()}
        unet |= {key: value.detach().cpu().clone() for key, value in weights.items()}
        mean, deviation = self.score.mean.cpu(), self.score.deviation.cpu()
        for head, part in (("final_conv.1", slice(0, 2)), ("occlusion_map.1", slice(2, 3))):
            unet[f"{head}.weight"] *= -deviation[part].view(-1, 1, 1, 1, 1) / _FACTOR
            unet[f"{head}.bias"] = -(deviation[part] * unet[f"{head}.bias"] + mean[part]) / _FACTOR
        return super().checkpoint(unet)

    def preview(self, weights: Mapping[str, Tensor], folder: Path, step: int) -> None:
        """See `DmStage.preview`; the weights are those of the last level."""
        diffusion = self.checkpoint(weights)["diffusion"]
        prefix = "denoise_fn."
        whole = {key.removeprefix(prefix): value for key, value in diffusion.items() if key.startswith(prefix)}
        super().preview(whole, folder, step)


def bytes_kept(config: LfdmConfig, steps: int, shape: tuple[int, ...]) -> int:
    """Bytes that `LastStage.keep` keeps per picture, for latents (3, T, h, w)."""
    return 2 * DRAWS * steps * 3 * config.dm.width * int(torch.Size(shape[1:]).numel())


def _by_clip(parts: list[Tensor], steps: int, count: int) -> Tensor:
    """Outputs of each batch and step (2 B, …), steps innermost -> (N, S, 2, …), on the CPU."""
    rows = [
        torch.stack([one.cpu().unflatten(0, (-1, DRAWS)) for one in parts[n : n + steps]], 1)
        for n in range(0, len(parts), steps)
    ]
    found = torch.cat(rows)
    assert len(found) == count
    return found
