"""The target "torch": a bundle's stages as PyTorch compiles them for this machine, on a GPU or a CPU."""
