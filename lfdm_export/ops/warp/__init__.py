"""Warp: resize the motion, sample one source for all its frames, optionally blend with an activation."""

from lfdm_export.ops.warp.reference import warp, warp_blend

__all__ = ["warp", "warp_blend"]
