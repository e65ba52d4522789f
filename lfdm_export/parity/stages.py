"""Parity of one stage."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.engines.interface import Engine
from lfdm_export.errors import EngineError
from lfdm_export.parity.report.checks import Check
from lfdm_export.reference.stored import Reference, positions
from lfdm_export.stages import StageSpec

Array: TypeAlias = NDArray[Any]

_WRONG_VALUES = "the graph's result differs from PyTorch's: its weights are not the model's, or the export is faulty"
_NOT_FINITE = "NaN or infinity: the weights are damaged, or the graph overflows"
_REFERENCE_NOT_FINITE = "PyTorch itself gives NaN or infinity here: the model's weights are faulty"
_BATCH = "a sample's result depends on the other samples of its batch"


def check_stage(
    load: Callable[[str], Engine],
    spec: StageSpec,
    tolerance: float,
    inputs: Mapping[str, Array],
    reference: Reference,
) -> list[Check]:
    """Check names, dtypes and shapes; finite values; error; independence of the batch; stop when a check is impossible.

    Args:
        load: returns the engine of a stage.
        spec: the stage.
        tolerance: largest allowed error, relative to max(1, largest |reference|).
        inputs: every stage input by name, several samples each.
        reference: PyTorch's outputs for these inputs.
    """
    feeds = {tensor.name: inputs[tensor.name] for tensor in spec.inputs}
    try:
        # Not kept: a stage's weights and buffers are freed before the next stage loads its own.
        engine = load(spec.name)
        outputs = engine.run(feeds)
    except EngineError as error:
        return [Check(spec.name, "interface", "names, dtypes, shapes", passed=False, meaning=str(error))]
    checks = [Check(spec.name, "interface", "names, dtypes, shapes", passed=True)]
    finite = [_finite(spec.name, name, values) for name, values in outputs.items()]
    checks += finite
    usable = [check.subject for check in finite if check.passed]
    checks += [
        _values(spec.name, name, outputs[name], reference.outputs[spec.name][name], reference.seed, tolerance)
        for name in usable
    ]
    if usable:
        checks += _batch(engine, feeds, {name: outputs[name] for name in usable}, tolerance)
    return checks


def _finite(stage: str, name: str, values: Array) -> Check:
    wrong = int(values.size - np.count_nonzero(np.isfinite(values)))
    return Check(
        stage,
        "finite",
        name,
        passed=wrong == 0,
        found=float(wrong),
        allowed=0.0,
        unit="values",
        compared=values.size,
        meaning=_NOT_FINITE if wrong else "",
    )


def _values(stage: str, name: str, values: Array, expected: Array, seed: int, tolerance: float) -> Check:
    kept = values.reshape(-1)[positions(seed, f"{stage}/{name}", values.size, expected.size)]
    if not np.isfinite(expected).all():
        return Check(stage, "values", name, passed=False, meaning=_REFERENCE_NOT_FINITE)
    return _compared(stage, "values", name, kept, expected, tolerance, _WRONG_VALUES)


def _batch(engine: Engine, feeds: Mapping[str, Array], outputs: Mapping[str, Array], tolerance: float) -> list[Check]:
    """Compare the first sample alone with the same sample in the batch."""
    stage = engine.spec.name
    try:
        alone = engine.run({name: array[:1] for name, array in feeds.items()})
    except EngineError as error:
        return [Check(stage, "batch", "alone", passed=False, meaning=f"a single sample cannot be run: {error}")]
    return [
        _compared(stage, "batch", name, alone[name], values[:1], tolerance, _BATCH) for name, values in outputs.items()
    ]


def _compared(stage: str, kind: Any, name: str, found: Array, expected: Array, tolerance: float, meaning: str) -> Check:
    error = np.abs(found.astype(np.float64) - expected)
    largest = float(error.max())
    scale = float(np.abs(expected).max())
    relative = largest / max(1.0, scale)
    if not math.isfinite(relative):  # only the output of a single sample can still be NaN here
        return Check(stage, kind, name, passed=False, allowed=tolerance, meaning=_NOT_FINITE)
    passed = relative <= tolerance
    return Check(
        stage,
        kind,
        name,
        passed=passed,
        found=relative,
        allowed=tolerance,
        max_abs=largest,
        mean_abs=float(error.mean()),
        scale=scale,
        compared=found.size,
        meaning="" if passed else meaning,
    )
