"""The stages of one bundle as functions of arrays, each over an engine that is loaded when first needed."""

from __future__ import annotations

from typing import TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle import Bundle
from lfdm_export.engines.onnxruntime import Device, OnnxRuntimeEngine
from lfdm_export.errors import EngineError

Float32: TypeAlias = NDArray[np.float32]


class StageRunner:
    """Runs stages; engines are kept once loaded. Not for several threads at once."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: Device = "cpu") -> None:
        self.bundle = bundle
        self._specs = bundle.stages
        self._threads, self._device = threads, device
        self._engines: dict[str, OnnxRuntimeEngine] = {}

    def run(self, stage: str, *tensors: NDArray[np.generic]) -> tuple[Float32, ...]:
        """Run one stage.

        Args:
            stage: its name.
            tensors: its inputs, in the order of its `StageSpec`; a batch beyond the stage's largest is
                run in parts.

        Returns:
            Its outputs, in the order of its `StageSpec`.

        Raises:
            EngineError: the engine cannot be loaded, the inputs do not fit, or the run fails.
        """
        engine = self.engine(stage)
        spec = engine.spec
        if len(tensors) != len(spec.inputs):
            raise EngineError(f"stage {stage!r} takes {len(spec.inputs)} inputs, found {len(tensors)}")
        largest = spec.batch[2]
        parts = []
        for start in range(0, max(map(len, tensors)), largest):
            feeds = {
                spec.name: array[start : start + largest] for spec, array in zip(spec.inputs, tensors, strict=True)
            }
            outputs = engine.run(feeds)
            parts.append([outputs[tensor.name] for tensor in spec.outputs])
        joined = (some[0] if len(some) == 1 else np.concatenate(some) for some in zip(*parts, strict=True))
        return cast(tuple[Float32, ...], tuple(joined))

    @property
    def loaded(self) -> tuple[str, ...]:
        """The stages whose engines are loaded."""
        return tuple(self._engines)

    def engine(self, stage: str) -> OnnxRuntimeEngine:
        """The stage's engine.

        Raises:
            BundleError: the bundle has no such stage.
            EngineError: the engine cannot be loaded.
        """
        if stage not in self._engines:
            path = self.bundle.stage_path(stage)
            self._engines[stage] = OnnxRuntimeEngine(
                path, self._specs[stage], threads=self._threads, device=self._device
            )
        return self._engines[stage]
