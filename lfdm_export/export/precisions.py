"""Float32 graphs -> graphs of the bundle's precision."""

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
    """A model's traced stages, and facts about the model that some precisions need.

    Attributes:
        graphs: float32 graph of every stage, by name. Do not change them.
        model: the traced model.
        geometry: geometry of the stages.
        embeddings: text embedding (text_width,) of each known label.
    """

    graphs: Mapping[str, ir.Model]
    model: LfdmModel
    geometry: Geometry
    embeddings: Mapping[str, NDArray[np.float32]]


def check_precision(precision: str) -> None:
    """Refuse a precision that cannot be exported.

    Raises:
        InputError: the precision is unknown.
    """
    known = [name for name in PRECISIONS if name in CHAIN_TOLERANCES]
    if precision not in known:
        raise InputError(f"unknown engine precision {precision!r}; expected one of {', '.join(known)}")


@dataclass(frozen=True, eq=False)
class Lowered:
    """A model's graphs in a precision.

    Attributes:
        graphs: graph of every stage, by name.
        sensitivity: error that each quantized layer causes; None without quantization.
    """

    graphs: dict[str, ir.Model]
    sensitivity: SensitivityReport | None = None


def typed_graphs(traced: Traced, precision: str, progress: Progress | None = None) -> Lowered:
    """The graphs of every stage in a precision.

    Each precision is a function from the float32 graphs to typed ones. It keeps names, order and types of the stages'
    inputs and outputs, and the nodes of domain `lfdm`; equal weights of graphs that share a file get equal bytes. Its
    tolerances are in `stages`; a precision without tolerances is not exported.

    Args:
        traced: the float32 graphs and their model.
        precision: one of `stages.PRECISIONS`.
        progress: called as ``progress(what, done, total)`` during long work.

    Raises:
        InputError: the precision cannot be exported.
        ExportError: a weight exceeds the precision's range.
        EngineError: a graph cannot be run; int8 and fp8 run graphs to find their scales.
        MissingDependencyError: onnxruntime, which int8 and fp8 need, is not installed.
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
    # "fp32" and "tf32" have the same graphs: a TF32 engine only rounds the factors of products.
    return Lowered(dict(traced.graphs))
