"""Float32 graphs -> int8 or fp8 graphs, calibrated and measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lfdm_export.progress import Progress, report
from lfdm_export.quantize.layers import KEPT_STAGES
from lfdm_export.quantize.qdq import insert_qdq
from lfdm_export.quantize.ranges import Format, Method, activation_scale
from lfdm_export.quantize.report import SensitivityReport, StageSensitivity
from lfdm_export.quantize.sensitivity import FLOOR, measure_stage
from lfdm_export.quantize.states import STAGES, Calibration, Sources, calibrate
from lfdm_export.stages import stage_specs

logger = logging.getLogger(__name__)

#: How scales are found; compared in docs/precision.md.
METHOD: Mapping[Format, Method] = {"int8": "mse", "fp8": "max"}
#: Seconds that an export spends on single layers of each stage, beyond what it must know.
SECONDS = 30.0
# The calibrated stage whose layers a stage has.
_SAME_LAYERS = {"denoise_guided": "denoise", "step": "denoise", "step_guided": "denoise"}


@dataclass(frozen=True, eq=False)
class Quantised:
    """What came of it.

    Attributes:
        graphs: of every stage, by name.
        report: what it costs.
    """

    graphs: dict[str, ir.Model]
    report: SensitivityReport


def quantised_graphs(
    sources: Sources,
    form: Format,
    *,
    method: Method | None = None,
    calibration: Calibration | None = None,
    floor: float = FLOOR,
    together: float | None = None,
    seconds: float | None = SECONDS,
    each_way: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Quantised:
    """Calibrate, find what has to stay float, quantise the rest of every stage.

    Args:
        sources: the float32 graphs of every stage, and what states are drawn from.
        form: "int8" or "fp8" (E4M3).
        method: how scales are found; None for METHOD.
        calibration: what is sampled; None for the default.
        floor: see `measure_stage`.
        together: see `measure_stage`.
        seconds: for single layers of each stage in the report; None for all of them.
        each_way: report also what would be gained by leaving each layer out.
        threads: of ONNX Runtime; None takes all cores.
        progress: called as ``progress(what, done, total)``.

    Raises:
        EngineError: a graph cannot be run.
        InputError: the calibration's samplers cannot be used.
    """
    begin = time.monotonic()
    method = METHOD[form] if method is None else method
    seen = calibrate(sources, calibration, threads=threads, progress=progress)
    specs = stage_specs(sources.geometry)
    scales: dict[str, dict[str, np.float32]] = {}
    measured: list[StageSensitivity] = []
    for done, stage in enumerate(STAGES):
        report(progress, "sensitivity", done, len(STAGES))
        every = {name: activation_scale(observed, form, method) for name, observed in seen.observed[stage].items()}
        found = measure_stage(
            sources.graphs[stage], specs[stage], every, seen.held_out[stage], form,
            seconds=seconds, floor=floor, together=together, each_way=each_way, threads=threads,
        )  # fmt: skip
        scales[stage] = {name: scale for name, scale in every.items() if name not in found.kept}
        measured.append(found)
        logger.info("%s: %d of %d layers in %s", stage, len(scales[stage]), len(every), form)
    report(progress, "sensitivity", len(STAGES), len(STAGES))
    graphs = {
        stage: graph if stage in KEPT_STAGES else insert_qdq(graph, scales[_SAME_LAYERS.get(stage, stage)], form)
        for stage, graph in sources.graphs.items()
    }
    sensitivity = SensitivityReport(
        form=form,
        method=method,
        evaluations=seen.evaluations,
        timesteps=(min(seen.timesteps), max(seen.timesteps), len(seen.timesteps)),
        labels=seen.labels,
        seconds=time.monotonic() - begin,
        stages=tuple(measured),
    )
    return Quantised(graphs, sensitivity)
