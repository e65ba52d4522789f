"""ThresholdedStep: x0 estimate, exact dynamic thresholding, sampler update, in one operator."""
