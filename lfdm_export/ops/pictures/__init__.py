"""From the outputs of `decode` to 8-bit pictures, and a check of latents, for engines that keep clips on a GPU."""
