"""The networks of latent flow diffusion models (LFDM), in PyTorch, and their configuration.

Importing the package is fast; the networks are in separate modules: ``lfdm_models.lfae`` (latent flow autoencoder),
``lfdm_models.diffusion`` (diffusion model), ``lfdm_models.text`` (text encoder).

Source: Ni et al., "Conditional Image-to-Video Generation with Latent Flow Diffusion Models",
CVPR 2023, arXiv 2303.13744.
"""

from lfdm_models.config import DmConfig, HourglassConfig, LfaeConfig, LfdmConfig

__all__ = ["DmConfig", "HourglassConfig", "LfaeConfig", "LfdmConfig"]
