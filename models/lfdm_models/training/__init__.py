"""Training of LFDM: the latent flow autoencoder (LFAE), then the diffusion model (DM), and their data.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 3.
"""
