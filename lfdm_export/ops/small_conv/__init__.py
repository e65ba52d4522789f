"""SmallConv: 3x3 convolution of maps of a few pixels, for which blocked convolutions run far below peak speed."""
