"""SmallConv: 3x3 convolution of maps of a few pixels, where blocked convolutions run far below peak."""

from lfdm_export.ops.small_conv.reference import small_conv, suits_small_conv

__all__ = ["small_conv", "suits_small_conv"]
