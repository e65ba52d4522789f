"""ThresholdedStep: x0 estimate, exact dynamic thresholding, sampler update, in one operator."""

from lfdm_export.ops.thresholded_step.reference import thresholded_step

__all__ = ["thresholded_step"]
