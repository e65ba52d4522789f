"""All operators of domain `lfdm`. To add one, add its folder and its line here."""

from __future__ import annotations

from lfdm_export.errors import ExportError
from lfdm_export.ops.domain import DOMAIN
from lfdm_export.ops.group_norm_silu.operator import GROUP_NORMS
from lfdm_export.ops.operator import Operator
from lfdm_export.ops.small_conv.operator import SMALL_CONV
from lfdm_export.ops.spatial_attention.operator import SPATIAL_ATTENTION
from lfdm_export.ops.temporal_attention.operator import TEMPORAL_ATTENTION
from lfdm_export.ops.thresholded_step.operator import THRESHOLDED_STEP
from lfdm_export.ops.warp.operator import WARPS

OPERATORS: tuple[Operator, ...] = (
    *WARPS,
    *GROUP_NORMS,
    SMALL_CONV,
    SPATIAL_ATTENTION,
    TEMPORAL_ATTENTION,
    THRESHOLDED_STEP,
)


def find_operator(op_type: str) -> Operator:
    """The operator of the nodes with this name.

    Raises:
        ExportError: the name is unknown.
    """
    for operator in OPERATORS:
        if operator.is_called(op_type):
            return operator
    known = ", ".join(operator.name for operator in OPERATORS)
    raise ExportError(f"domain {DOMAIN!r} has no operator {op_type!r}, only {known}; list it in {__name__}")
