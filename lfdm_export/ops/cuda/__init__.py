"""Kernels as text, and what builds and runs them: NVRTC and the driver for a GPU, a C++ compiler for the host."""
