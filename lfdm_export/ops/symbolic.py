"""Add nodes of the custom operators' domain to an exported graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfdm_export.ops.domain import DOMAIN, VERSION

Attributes = dict[str, int | float | list[int]]


def exporting() -> bool:
    """Whether a graph is being exported, so that operators add nodes instead of computing values."""
    return torch.onnx.is_in_onnx_export()


def node(
    op_type: str, inputs: Sequence[Tensor], attributes: Attributes, shapes: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Add one node of the domain; `shapes` are those of its outputs, which all have the first input's dtype."""
    return list(
        torch.onnx.ops.symbolic_multi_out(
            f"{DOMAIN}::{op_type}",
            inputs,
            {**attributes, "plugin_namespace": DOMAIN, "plugin_version": str(VERSION)},
            dtypes=[inputs[0].dtype] * len(shapes),
            shapes=shapes,
            version=VERSION,
        )
    )
