"""TemporalAttention: norm, projections, rotary embedding, biased softmax attention and residual in one operator."""

from lfdm_export.ops.temporal_attention.reference import temporal_attention

__all__ = ["temporal_attention"]
