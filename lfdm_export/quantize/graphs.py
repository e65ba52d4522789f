"""Float32 graphs -> int8 or fp8 graphs, calibrated and measured."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lfdm_export.progress import Progress, report
from lfdm_export.quantize.correction import Float32, measure_errors, measure_shifts
from lfdm_export.quantize.layers import KEPT_STAGES
from lfdm_export.quantize.qdq import insert_qdq
from lfdm_export.quantize.ranges import Format, Method, activation_scale
from lfdm_export.quantize.report import Correction, SensitivityReport, StageSensitivity
from lfdm_export.quantize.sensitivity import measure_stage
from lfdm_export.quantize.states import STAGES, Calibrated, Calibration, Sources, calibrate
from lfdm_export.stages import StageSpec, stage_specs

logger = logging.getLogger(__name__)

#: Method for scales.
METHOD: Mapping[Format, Method] = {"int8": "mse", "fp8": "max"}
#: Seconds per stage for measuring single layers in an export, beyond the measurements that it needs.
SECONDS = 30.0
# The calibrated stage with the same layers.
_SAME_LAYERS = {"denoise_guided": "denoise", "step": "denoise", "step_guided": "denoise"}


@dataclass(frozen=True, eq=False)
class Quantized:
    """The result of `quantized_graphs`.

    Attributes:
        graphs: graphs of all stages, by name.
        report: sensitivity of the layers.
    """

    graphs: dict[str, ir.Model]
    report: SensitivityReport


def quantized_graphs(
    sources: Sources,
    form: Format,
    *,
    calibration: Calibration | None = None,
    seconds: float | None = SECONDS,
    each_way: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Quantized:
    """Calibrate, find the layers that must stay float, quantize the others in every stage, and correct their biases.

    Args:
        sources: the float32 graphs of every stage, and the data for sampling states.
        form: "int8" or "fp8" (E4M3).
        calibration: what to sample; default: `Calibration()`.
        seconds: time per stage for measuring single layers in the report; None for all layers.
        each_way: also report the gain if each layer stayed float.
        threads: threads of ONNX Runtime; None for all cores.
        progress: called as ``progress(what, done, total)``.

    Raises:
        EngineError: a graph cannot be run.
        InputError: a sampler of the calibration cannot be used.
    """
    begin = time.monotonic()
    method = METHOD[form]
    seen = calibrate(sources, calibration, threads=threads, progress=progress)
    specs = stage_specs(sources.geometry)
    scales: dict[str, dict[str, np.float32]] = {}
    measured: list[StageSensitivity] = []
    for done, stage in enumerate(STAGES):
        report(progress, "sensitivity", done, len(STAGES))
        every = {name: activation_scale(observed, form, method) for name, observed in seen.observed[stage].items()}
        found = measure_stage(
            sources.graphs[stage], specs[stage], every, seen.held_out[stage], form,
            seconds=seconds, each_way=each_way, threads=threads,
        )  # fmt: skip
        scales[stage] = {name: scale for name, scale in every.items() if name not in found.kept}
        measured.append(found)
        logger.info("%s: %d of %d layers in %s", stage, len(scales[stage]), len(every), form)
    report(progress, "sensitivity", len(STAGES), len(STAGES))
    shifts: dict[str, dict[str, Float32]] = {}
    corrections: list[Correction] = []
    for done, stage in enumerate(STAGES):
        report(progress, "bias correction", done, len(STAGES))
        shifts[stage], correction = _correct(sources.graphs[stage], specs[stage], scales[stage], form, seen, threads)
        corrections.append(correction)
    report(progress, "bias correction", len(STAGES), len(STAGES))
    graphs = dict(sources.graphs)
    for stage in graphs.keys() - set(KEPT_STAGES):
        calibrated = _SAME_LAYERS.get(stage, stage)
        graphs[stage] = insert_qdq(graphs[stage], scales[calibrated], form, shifts[calibrated])
    sensitivity = SensitivityReport(
        form=form,
        method=method,
        evaluations=seen.evaluations,
        timesteps=(min(seen.timesteps), max(seen.timesteps), len(seen.timesteps)),
        labels=seen.labels,
        seconds=time.monotonic() - begin,
        stages=tuple(measured),
        corrections=tuple(corrections),
    )
    return Quantized(graphs, sensitivity)


def _correct(
    graph: ir.Model,
    spec: StageSpec,
    scales: Mapping[str, np.float32],
    form: Format,
    seen: Calibrated,
    threads: int | None,
) -> tuple[dict[str, Float32], Correction]:
    """The shifts of a stage's layers, and what their correction changes on the held-out chain."""
    states = seen.states[spec.name]
    shifts = measure_shifts(graph, spec, scales, form, states, threads=threads)
    before, after = (
        measure_errors(graph, insert_qdq(graph, scales, form, given), spec, seen.held_out[spec.name], threads=threads)
        for given in (None, shifts)
    )
    correction = Correction(
        stage=spec.name,
        layers=len(shifts),
        states=len(states),
        ratio=(before.ratio, after.ratio),
        shift=(before.shift, after.shift),
    )
    return shifts, correction
