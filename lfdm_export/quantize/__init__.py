"""Graphs of int8 and fp8 by explicit quantise and dequantise nodes, calibrated on real sampling trajectories."""
