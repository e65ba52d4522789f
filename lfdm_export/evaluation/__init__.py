"""Measures the quality of a model's clips, and tunes samplers."""
