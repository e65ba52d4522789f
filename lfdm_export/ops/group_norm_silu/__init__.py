"""GroupNormSilu: group norm over a clip, modulation by the condition, and SiLU in one operator."""
