"""Warp: resize the motion, sample one source for all its frames, optionally blend with an activation."""
