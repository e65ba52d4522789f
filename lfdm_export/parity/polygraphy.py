"""Engines compared with ONNX Runtime by NVIDIA Polygraphy: its runner of the same graph, its comparison, its files.

An independent check with code of another project: `verify` itself compares this program's engines with PyTorch.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.interface import Engine
from lfdm_export.engines.onnxruntime.engine import open_session
from lfdm_export.errors import EngineError, MissingDependencyError
from lfdm_export.parity.report.checks import Check
from lfdm_export.stages import StageSpec
from lfdm_export.wording import one_line

Array = NDArray[Any]

_OTHERS = "this engine's output differs from that of ONNX Runtime for the same graph, run by Polygraphy"
_REFERENCE = "ONNX Runtime, by Polygraphy"


def compare_stage(
    bundle: Bundle,
    spec: StageSpec,
    load: Callable[[str], Engine],
    name: str,
    tolerance: float,
    inputs: Mapping[str, Array],
    *,
    threads: int | None = None,
    save: str | os.PathLike[str] | None = None,
) -> list[Check]:
    """Run one stage by an engine and by Polygraphy's ONNX Runtime, and compare the outputs.

    Args:
        bundle: the bundle with the stage.
        spec: the stage.
        load: returns the engine of a stage.
        name: name of the engine, for Polygraphy.
        tolerance: largest allowed error, relative to max(1, largest magnitude of ONNX Runtime's output).
        inputs: every stage input by name.
        threads: threads of ONNX Runtime; None uses all cores.
        save: folder for all outputs as ``STAGE.json``, which the ``polygraphy`` command reads; None saves nothing.

    Returns:
        One check per output.

    Raises:
        EngineError: the engine or ONNX Runtime cannot be loaded, or fails.
        MissingDependencyError: Polygraphy is not installed.
    """
    try:
        from polygraphy.backend.base import BaseRunner
        from polygraphy.backend.onnxrt import OnnxrtRunner
        from polygraphy.comparator import Comparator, SimpleCompareFunc
        from polygraphy.exception import PolygraphyException
        from polygraphy.logger import G_LOGGER
    except ImportError as error:
        raise MissingDependencyError("polygraphy", "comparing engines by Polygraphy", "polygraphy") from error

    feeds = {tensor.name: np.ascontiguousarray(inputs[tensor.name]) for tensor in spec.inputs}
    runners = [
        OnnxrtRunner(lambda: open_session(bundle.stage_path(spec.name), threads=threads), name=_REFERENCE),
        _engine_runner(BaseRunner, load, spec, name),
    ]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        try:
            results = Comparator.run(runners, data_loader=[feeds])
        except PolygraphyException as error:
            raise EngineError(f"stage {spec.name!r} in Polygraphy: {one_line(error)}") from error
        expected = dict(results[_REFERENCE][0])
        scales = {tensor.name: _magnitude(expected[tensor.name]) for tensor in spec.outputs}
        allowed = {output: tolerance * max(1.0, scale) for output, scale in scales.items()}
        compare = SimpleCompareFunc(atol=allowed, rtol=0.0, check_error_stat="max")
        accuracy = Comparator.compare_accuracy(results, compare_func=compare)
        if save is not None:
            Path(save).mkdir(parents=True, exist_ok=True)
            results.save(str(Path(save) / f"{spec.name}.json"))
    (verdicts,) = accuracy[0][_REFERENCE, name]  # one comparison, one iteration
    return [
        _check(
            spec.name, tensor.name, verdicts[tensor.name], scales[tensor.name], tolerance, expected[tensor.name].size
        )
        for tensor in spec.outputs
    ]


def _engine_runner(base: Any, load: Callable[[str], Engine], spec: StageSpec, name: str) -> Any:
    """Adapt one of this program's engines to Polygraphy's runner interface, `base`."""
    from polygraphy.common import TensorMetadata

    class EngineRunner(base):
        def activate_impl(self) -> None:
            self.engine = load(spec.name)

        def deactivate_impl(self) -> None:
            del self.engine

        def get_input_metadata_impl(self) -> Any:
            metadata = TensorMetadata()
            for tensor in spec.inputs:
                shape = tuple(axis if isinstance(axis, int) else None for axis in tensor.shape)
                metadata.add(tensor.name, np.dtype(tensor.dtype), shape)
            return metadata

        def infer_impl(self, feed_dict: Mapping[str, Array]) -> Any:
            started = time.perf_counter()
            outputs = OrderedDict(self.engine.run(dict(feed_dict)))
            self.inference_time = time.perf_counter() - started
            return outputs

    return EngineRunner(name)


def _magnitude(values: Array) -> float:
    return float(np.abs(values).max())


def _check(stage: str, output: str, verdict: Any, scale: float, tolerance: float, compared: int) -> Check:
    """Polygraphy's verdict on an output as a check."""
    passed = bool(verdict)
    return Check(
        stage,
        "values",
        output,
        passed=passed,
        found=verdict.max_absdiff / max(1.0, scale),
        allowed=tolerance,
        max_abs=verdict.max_absdiff,
        mean_abs=verdict.mean_absdiff,
        scale=scale,
        compared=compared,
        meaning="" if passed else _OTHERS,
    )
