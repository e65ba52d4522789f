"""The denoising loop: tables of coefficients, noise, one step after the other."""
