"""SmallConv: 3x3 convolution of maps of a few pixels, where blocked convolutions run far below peak."""
