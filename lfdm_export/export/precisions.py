"""Float32 graphs -> graphs of the precision that a bundle is exported in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.graphs.typed import TYPES, lower
from lfdm_export.progress import Progress
from lfdm_export.quantize.graphs import quantized_graphs
from lfdm_export.quantize.ranges import FORMATS
from lfdm_export.quantize.report import SensitivityReport
from lfdm_export.quantize.states import Sources
from lfdm_export.stages import CHAIN_TOLERANCES, PRECISIONS, Geometry
from lfdm_models.model import LfdmModel


@dataclass(frozen=True, eq=False)
class Traced:
    """A model whose stages were traced, and what a precision may need to know of it beside its graphs.

    Attributes:
        graphs: of every stage, float32, by name. They are not to be changed.
        model: that they were traced from.
        geometry: of the stages.
        embeddings: text embedding (text_width,) of each known label.
    """

    graphs: Mapping[str, ir.Model]
    model: LfdmModel
    geometry: Geometry
    embeddings: Mapping[str, NDArray[np.float32]]


def check_precision(precision: str) -> None:
    """Refuse a precision that cannot be exported.

    Raises:
        InputError: it is unknown.
    """
    known = [name for name in PRECISIONS if name in CHAIN_TOLERANCES]
    if precision not in known:
        raise InputError(f"unknown engine precision {precision!r}; expected one of {', '.join(known)}")


@dataclass(frozen=True, eq=False)
class Lowered:
    """What became of a model in a precision.

    Attributes:
        graphs: of every stage, by name.
        sensitivity: what each layer costs, where layers were quantized.
    """

    graphs: dict[str, ir.Model]
    sensitivity: SensitivityReport | None = None


def typed_graphs(traced: Traced, precision: str, progress: Progress | None = None) -> Lowered:
    """The graphs of every stage in a precision.

    Each precision is a function from the float32 graphs to typed ones that keeps names, order and types of
    the stages' inputs and outputs, the nodes of domain `lfdm`, and (for graphs that share weights) gives equal weights
    equal bytes. Its tolerances stand in `stages`; without them it is not exported.

    Args:
        traced: the float32 graphs and what they come from.
        precision: one of `stages.PRECISIONS`.
        progress: called as ``progress(what, done, total)`` where that takes long.

    Raises:
        InputError: the precision cannot be exported.
        ExportError: a weight is beyond its range.
        EngineError: a graph cannot be run, which int8 and fp8 need for their scales.
        MissingDependencyError: so do they onnxruntime, which is not installed.
    """
    check_precision(precision)
    if precision in TYPES:
        return Lowered({name: lower(graph, precision) for name, graph in traced.graphs.items()})
    if precision in FORMATS:
        diffusion = traced.model.diffusion
        null = diffusion.denoise_fn.null_cond_emb.detach().numpy()[0]
        embeddings = tuple(traced.embeddings.values())
        sources = Sources(traced.graphs, traced.geometry, diffusion.schedule(), embeddings, null)
        quantized = quantized_graphs(sources, precision, progress=progress)
        return Lowered(quantized.graphs, quantized.report)
    # "fp32"; in TF32 an engine of the same graphs rounds the factors of products only.
    return Lowered(dict(traced.graphs))
