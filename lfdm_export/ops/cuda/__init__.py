"""Kernels as text, with tools to build and run them: NVRTC and the driver for a GPU, a C++ compiler for the host."""
