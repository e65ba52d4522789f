"""SpatialAttention: norm, projections, softmax attention over the pixels of a frame, and residual in one operator."""

from lfdm_export.ops.spatial_attention.reference import spatial_attention

__all__ = ["spatial_attention"]
