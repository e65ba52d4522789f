"""The second stage: the DM learns to denoise flow, conditioned on the first frame and a label.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.3; Ho and Salimans, Classifier-Free Diffusion
Guidance (arXiv 2207.12598).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfdm_models.attention import Rotary
from lfdm_models.config import LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae, flow_to_latent, latent_to_flow
from lfdm_models.training.conditions import Float32Array
from lfdm_models.training.data import NO_CLIP
from lfdm_models.training.few_steps import levels
from lfdm_models.training.files import load, load_weights
from lfdm_models.training.lfae import plain
from lfdm_models.training.previews import save_gif
from lfdm_models.training.settings import Precision

#: Probability that an example's embedding is replaced by the null embedding.
NULL_PROBABILITY = 0.1
#: Limit of the weight in `noise_weight`.
MOST_WEIGHT = 25.0
_PREVIEW_STEPS = 25


def new_diffusion(config: LfdmConfig, seed: int) -> Diffusion:
    """A new DM for training from scratch; the global random state does not change."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        diffusion = Diffusion(config.dm)
    for module in diffusion.modules():
        if isinstance(module, Rotary):
            module.freqs.requires_grad_(False)  # position frequencies are fixed, not learned
    return diffusion


def load_diffusion(diffusion: Diffusion, path: Path) -> None:
    """Load a checkpoint's weights into a DM.

    Args:
        diffusion: a DM with the checkpoint's architecture.
        path: written by this stage, or released.

    Raises:
        TrainingError: the file cannot be read, or has another architecture.
    """
    content = load(path, "a DM checkpoint")
    weights = {key.removeprefix("module."): value for key, value in content.get("diffusion", {}).items()}
    load_weights(diffusion, weights, path, "a DM")


def noise_weight(signal: Tensor, spread: Tensor, signal_std: float) -> Tensor:
    """Weight, 0 … 1, of an error of the predicted noise at a noise level.

    A latent with a standard deviation s far below 1, such as residual flow, hardly affects the noise to predict: it is
    visible only where the noise is as small as s, and there the noise's unpredictable details dominate the error.
    Errors are therefore weighted like those of the estimated latent, over its variance given the noisy latent:
    1 + (noise / s)^2, limited to `MOST_WEIGHT` and divided by it.

    Args:
        signal: share of the latent in the noisy latent, sqrt of the cumulative alpha.
        spread: share of the noise.
        signal_std: s; 0 gives weight 1 everywhere.

    Source: the weighting of Karras et al., Elucidating the Design Space of Diffusion-Based Generative Models
    (arXiv 2206.00364), Table 1, for a network that predicts noise.
    """
    if not signal_std:
        return torch.ones_like(signal)
    return (1 + (spread / (signal * signal_std)).square()).clamp(max=MOST_WEIGHT) / MOST_WEIGHT


class DmStage:
    """Training of a DM, as a `lfdm_models.training.loop.Stage`."""

    name = "dm"
    gpu_precision: Precision = "bf16"

    def __init__(
        self,
        config: LfdmConfig,
        lfae: Lfae,
        diffusion: Diffusion,
        embeddings: Mapping[str, Float32Array],
        *,
        examples: Mapping[str, Any],
        null_probability: float = NULL_PROBABILITY,
        signal_std: float = 0.0,
        preview_clips: Tensor | None = None,
    ) -> None:
        """Train `diffusion`.

        Args:
            config: configuration of both networks.
            lfae: the trained LFAE, which is not changed.
            diffusion: the DM, such as from `new_diffusion`.
            embeddings: (text_width,) of each label, in the order of the examples' label indices.
            examples: description of the examples in plain values, which must be the same for a resumed run.
            null_probability: probability that an example's embedding is replaced by the null embedding.
            signal_std: typical standard deviation of the latents, for `noise_weight`; 0 weights all errors equally, as
                published.
            preview_clips: (N, 3, T, H, W) in [0, 1], for previews, which use their first frames, and labels 0, 1, ….
        """
        self.config, self.diffusion = config, diffusion
        self.lfae = lfae.eval().requires_grad_(False)
        self.labels = list(embeddings)
        self._encoded: dict[int, tuple[Tensor, Tensor]] = {}
        self.table = torch.from_numpy(np.stack(list(embeddings.values())))
        self.null_probability, self.signal_std = null_probability, signal_std
        self.preview_clips = preview_clips
        self.facts: dict[str, Any] = {
            "stage": self.name,
            "config": plain(config.dm),
            "residual_flow": config.residual_flow,
            "null probability": null_probability,
            "signal std": signal_std,
            "labels": self.labels,
            "examples": dict(examples),
        }

    @property
    def network(self) -> nn.Module:
        """The UNet; the schedule's buffers do not change."""
        return self.diffusion.denoise_fn

    def to(self, device: torch.device) -> None:
        """Move both networks and the embeddings."""
        self.lfae.to(device)
        self.diffusion.to(device)
        self.table = self.table.to(device)

    @torch.no_grad()
    def encode(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Clips -> the latents that the DM learns, and their condition.

        Args:
            frames: (B, 3, T, H, W) in [0, 1]; the first is the reference.

        Returns:
            Latents (B, 3, T, h, w), and the reference's feature (B, C, h, w), both float32.
        """
        batch, channels, length, height, width = frames.shape
        lfae = self.lfae
        source = frames[:, :, 0]
        driving = frames.transpose(1, 2).reshape(batch * length, channels, height, width)
        # Autocast would reduce the flow, which is the target, to 8 bits.
        with torch.autocast(frames.device.type, enabled=False):
            repeated = source[:, None].expand(-1, length, -1, -1, -1).reshape_as(driving)
            latent = flow_to_latent(lfae.estimate_motion(repeated, driving), residual_flow=self.config.residual_flow)
            feature = lfae.generator.encode(source)[-1]
        # Contiguous: otherwise, the UNet's convolutions would be three times as slow.
        return latent.unflatten(0, (batch, length)).transpose(1, 2).contiguous(), feature

    def encode_once(self, frames: Tensor, clips: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`encode`, with a cache for clips that repeat.

        Clips are encoded one by one: another batch size may change the last bits, and the batch of a clip depends on
        where a run was resumed.
        """
        if min(clips) < 0:
            return self.encode(frames)
        for index, clip in enumerate(clips):
            if clip not in self._encoded:
                self._encoded[clip] = self.encode(frames[index : index + 1])
        latents, features = zip(*(self._encoded[clip] for clip in clips), strict=True)
        return torch.cat(latents), torch.cat(features)

    def embedding_of(self, label: Tensor) -> Tensor:
        """Embeddings (B, text_width) of labels (B,); the null embedding for those below 0."""
        null = self.diffusion.denoise_fn.null_cond_emb
        return torch.where((label < 0)[:, None], null, self.table[label.clamp(min=0)])

    def losses(self, batch: Mapping[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        """Mean squared error of the predicted noise, each at a random step of the schedule."""
        frames = batch["frames"]
        clips = batch["clip"].tolist() if "clip" in batch else [NO_CLIP] * len(frames)
        latent, feature = self.encode_once(frames, clips)
        count, device = len(latent), latent.device
        timestep = torch.randint(self.config.dm.training_steps, (count,), generator=generator, device=device)
        noise = torch.randn(latent.shape, generator=generator, device=device)
        signal, spread = (factor.view(-1, 1, 1, 1, 1) for factor in levels(self.diffusion, timestep))
        unet = self.diffusion.denoise_fn
        dropped = torch.rand(count, generator=generator, device=device) < self.null_probability
        embedding = self.embedding_of(batch["label"].masked_fill(dropped, -1))
        predicted = unet(signal * latent + spread * noise, feature, embedding, timestep)
        error = (predicted.float() - noise).square().mean(dim=(1, 2, 3, 4))
        return {"noise": (noise_weight(signal, spread, self.signal_std).flatten() * error).mean()}

    def checkpoint(self, weights: Mapping[str, Tensor]) -> dict[str, Any]:
        """The released layout, the labels with their embeddings, and the training's facts under "training"."""
        buffers = {key: value.detach().cpu() for key, value in self.diffusion.named_buffers(recurse=False)}
        unet = {f"denoise_fn.{key}": value for key, value in weights.items()}
        return {
            "diffusion": {**buffers, **unet},
            "labels": self.labels,
            "label_embeddings": self.table.cpu(),
            "training": self.facts,
        }

    @torch.no_grad()
    def preview(self, weights: Mapping[str, Tensor], folder: Path, step: int) -> None:
        """Rows of a real clip, and a clip generated from its first frame by a few steps of DDIM (eta 0)."""
        if self.preview_clips is None:
            return
        device = self.table.device
        diffusion = Diffusion(self.config.dm).to(device).eval()
        diffusion.denoise_fn.load_state_dict(weights)
        clips = self.preview_clips.to(device)
        labels = torch.arange(len(clips), device=device) % len(self.labels)
        latents = self.sample(diffusion, clips, self.table[labels])
        rows = [[clip, self.decode(clip[:, 0], latent)] for clip, latent in zip(clips, latents, strict=True)]
        save_gif(folder / f"step_{step:07d}.gif", rows)

    def sample(self, diffusion: Diffusion, clips: Tensor, embedding: Tensor) -> Tensor:
        """Latents (B, 3, T, h, w) for the first frames of `clips` by DDIM without noise; for previews only.

        Source: Song et al., Denoising Diffusion Implicit Models (arXiv 2010.02502), equation 12 with sigma 0.
        """
        latent, feature = self.encode(clips)
        generator = torch.Generator(latent.device).manual_seed(0)
        x = torch.randn(latent.shape, generator=generator, device=latent.device)
        signal = diffusion.get_buffer("alphas_cumprod")
        steps = torch.linspace(self.config.dm.training_steps - 1, 0, _PREVIEW_STEPS).long().tolist()
        for now, after in zip(steps, [*steps[1:], -1], strict=True):
            a, b = signal[now], signal[after] if after >= 0 else torch.ones_like(signal[0])
            noise = diffusion.denoise_fn(x, feature, embedding, torch.full((len(x),), now, device=x.device))
            estimate = ((x - (1 - a).sqrt() * noise) / a.sqrt()).clamp(-1, 1)
            x = b.sqrt() * estimate + (1 - b).sqrt() * noise
        return x

    def decode(self, source: Tensor, latent: Tensor) -> Tensor:
        """One image (3, H, W) and one latent (3, T, h, w) -> frames (3, T, H, W)."""
        flow = latent_to_flow(latent.transpose(0, 1), residual_flow=self.config.residual_flow)
        images = source[None].expand(latent.shape[1], -1, -1, -1).contiguous()
        generator = self.lfae.generator
        return generator.decode(images, generator.encode(images), flow).frame.transpose(0, 1)
