"""GroupNormSilu: group norm over a clip, modulation by the condition, and SiLU in one operator."""

from lfdm_export.ops.group_norm_silu.reference import group_norm_silu

__all__ = ["group_norm_silu"]
