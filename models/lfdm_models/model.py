"""A loaded pair of LFAE and DM."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lfdm_models.config import LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae


@dataclass(repr=False)
class LfdmModel:
    """Both networks in eval mode, and the facts known about them.

    Attributes:
        config: their architecture.
        lfae: autoencoder.
        diffusion: UNet and schedule.
        provenance: origin of the weights (file names, hashes, whether they were trained).
        label_embeddings: text embedding (text_width,) float32 of each known label, if the weights
            include them; otherwise a text encoder computes them at export.
    """

    config: LfdmConfig
    lfae: Lfae
    diffusion: Diffusion
    provenance: dict[str, object] = field(default_factory=dict)
    label_embeddings: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __repr__(self) -> str:
        sizes = [sum(weight.numel() for weight in part.parameters()) / 1e6 for part in (self.lfae, self.diffusion)]
        labels = len(self.label_embeddings)
        return f"<LfdmModel: LFAE of {sizes[0]:.1f} M weights, DM of {sizes[1]:.1f} M, {labels} own labels>"
