"""int8 and fp8 graphs with explicit quantize and dequantize nodes, calibrated on real sampling trajectories."""
