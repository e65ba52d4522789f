"""ThresholdedStep: x0 estimate, exact dynamic thresholding, sampler update, in one operator."""

from lfdm_export.ops.thresholded_step.reference import quantile_rank, thresholded_step

__all__ = ["quantile_rank", "thresholded_step"]
