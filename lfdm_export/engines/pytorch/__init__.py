"""The target "torch": the stages of a bundle, compiled by PyTorch for this machine, on a GPU or a CPU."""
