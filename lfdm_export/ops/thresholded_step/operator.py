"""The operator ThresholdedStep."""

from lfdm_export.ops.operator import Nodes, Operator
from lfdm_export.ops.thresholded_step.onnx_function import thresholded_step_function


def _weight(nodes: Nodes) -> float:
    return nodes.same(lambda node: float(node.attribute("weight")))


THRESHOLDED_STEP = Operator(
    "ThresholdedStep",
    body=lambda nodes: thresholded_step_function(_weight(nodes)),
    tensorrt=lambda nodes: thresholded_step_function(_weight(nodes), pivots_at_once=True),
    plugin="lfdm_export.ops.thresholded_step.plugin",
)
