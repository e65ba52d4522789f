"""ThresholdedStep among the operators."""

from lfdm_export.ops.operator import Operator
from lfdm_export.ops.thresholded_step.onnx_function import thresholded_step_function

THRESHOLDED_STEP = Operator(
    "ThresholdedStep",
    body=lambda nodes: thresholded_step_function(nodes.attribute("weight")),
    tensorrt=lambda nodes: thresholded_step_function(nodes.attribute("weight"), pivots_at_once=True),
    plugin="lfdm_export.ops.thresholded_step.plugin",
)
