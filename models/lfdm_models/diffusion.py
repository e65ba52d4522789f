"""The diffusion model: UNet and noise schedule, in the released state dict's layout.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.3; schedule of Nichol & Dhariwal (arXiv 2102.09672).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lfdm_models.config import DmConfig
from lfdm_models.schedule import Schedule, cosine_schedule
from lfdm_models.unet import Unet3D


class Diffusion(nn.Module):
    """The UNet as `denoise_fn`, and the schedule's buffers under their released names."""

    def __init__(self, config: DmConfig) -> None:
        super().__init__()
        self.config = config
        schedule = cosine_schedule(config.training_steps)
        for field in dataclasses.fields(Schedule):
            self.register_buffer(field.name, torch.from_numpy(getattr(schedule, field.name)))
        self.denoise_fn = Unet3D(config)

    def schedule(self) -> Schedule:
        """The schedule in the buffers (after loading, the checkpoint's own)."""
        buffers = dict(self.named_buffers(recurse=False))
        return Schedule(**{f.name: buffers[f.name].float().cpu().numpy() for f in dataclasses.fields(Schedule)})
