"""Sampling in ONNX Runtime with the state in device memory: between steps only fresh noise leaves the host.

Works on any device of ONNX Runtime; on a CPU it saves two copies per step. Not measured on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.engines.checks import Array, check_feeds
from lfdm_export.engines.device_batch import STATE
from lfdm_export.engines.onnxruntime.engine import MEMORY, OnnxRuntimeEngine
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.errors import EngineError
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import BATCH, COEFFICIENTS, StageSpec

Float32: TypeAlias = NDArray[np.float32]

_EACH_STEP = ("timestep", "noise", "coefficients")


class BoundOnnxRuntimeEngine(OnnxRuntimeEngine):
    """An engine that can keep the sampling state on its device."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: StageSpec,
        *,
        threads: int | None = None,
        device: Device = "cuda",
        tf32: bool = False,
    ) -> None:
        """Load a graph, as `OnnxRuntimeEngine` does.

        Raises:
            EngineError: the file cannot be loaded, is another stage, or the device is missing or cannot run all of it.
            MissingDependencyError: onnxruntime is not installed.
        """
        super().__init__(path, spec, threads=threads, device=device, tf32=tf32)
        self.device: Device = device

    def denoise_loop(self, batch: int) -> BoundLoop:
        """Make a loop for a batch size.

        Raises:
            EngineError: the stage is not a sampling stage, or there is not enough memory.
        """
        if not set(STATE) <= {tensor.name for tensor in self.spec.outputs}:
            raise EngineError(
                f"stage {self.spec.name!r} keeps no state of sampling; loops are for step and step_guided"
            )
        return BoundLoop(self, self._session, batch)


class BoundLoop:
    """Chains of one batch size; implements `engines.interface.StateLoop`.

    There are two sets of state tensors: each step reads one and writes the other.
    """

    def __init__(self, engine: BoundOnnxRuntimeEngine, session: Any, batch: int) -> None:
        """Allocate the memory of all tensors."""
        self._engine, self._spec, self._session, self._batch = engine, engine.spec, session, batch
        self._inputs = {tensor.name: tensor for tensor in self._spec.inputs}
        self._fixed = {name: self._empty(name) for name in self._inputs if name not in (*STATE.values(), *_EACH_STEP)}
        self._each = {name: self._empty(name) for name in _EACH_STEP}
        self._silence = self._empty("noise")
        self._silence.update_inplace(self._zeros("noise"))
        self._state = [{name: self._empty(name) for name in STATE.values()} for _ in range(2)]
        self._bindings = [self._bind(self._state[turn], self._state[1 - turn]) for turn in range(2)]
        self._table: SamplerTable | None = None
        self._turn = 0

    def begin(self, start: Float32, fixed: Mapping[str, Array], table: SamplerTable) -> None:
        """Start a chain; see `StateLoop`.

        Raises:
            EngineError: the start or a fixed input does not match the stage.
        """
        state = {"noisy_latent": start, "history": self._zeros("history")}
        changing = {name: self._zeros(name) for name in _EACH_STEP}
        axes = check_feeds(self._spec, {**fixed, **state, **changing})
        if axes[BATCH] != self._batch:
            raise EngineError(f"the loop is for a batch of {self._batch}, found {axes[BATCH]}; make another")
        for values, arrays in ((self._fixed, fixed), (self._state[0], state)):
            for name, value in values.items():
                value.update_inplace(np.ascontiguousarray(arrays[name]))
        self._table, self._turn = table, 0

    def step(self, index: int, noise: Float32 | None) -> None:
        """Run a step; see `StateLoop`.

        Raises:
            EngineError: no chain was started, or the run fails.
        """
        if self._table is None:
            raise EngineError(
                f"stage {self._spec.name!r}: step {index} of a chain that has not begun; call begin first"
            )
        self._each["timestep"].update_inplace(np.full(self._batch, self._table.timesteps[index]))
        row = self._table.coefficients[index]
        self._each["coefficients"].update_inplace(np.tile(row, (self._batch, 1)).reshape(-1, COEFFICIENTS))
        if noise is not None:
            self._each["noise"].update_inplace(np.ascontiguousarray(noise))
        binding = self._bindings[self._turn]
        binding.bind_ortvalue_input("noise", self._silence if noise is None else self._each["noise"])
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # the exceptions of onnxruntime share no other base
            text = " ".join(str(error).split())[:500]
            raise EngineError(f"stage {self._spec.name!r} failed in ONNX Runtime: {text}") from error
        self._turn = 1 - self._turn

    def latent(self) -> Float32:
        """The latent after the last step; see `StateLoop`."""
        latent: Float32 = np.array(self._state[self._turn]["noisy_latent"].numpy())
        return latent

    def finish(self) -> Float32:
        """The latent of a complete chain; see `StateLoop`."""
        latent, self._table = self.latent(), None
        return latent

    def _bind(self, read: Mapping[str, Any], written: Mapping[str, Any]) -> Any:
        binding = self._session.io_binding()
        for name, value in {**self._fixed, **self._each, **read}.items():
            binding.bind_ortvalue_input(name, value)
        for output, name in STATE.items():
            binding.bind_ortvalue_output(output, written[name])
        return binding

    def _zeros(self, name: str) -> Array:
        tensor = self._inputs[name]
        return np.zeros(tensor.concrete(**{BATCH: self._batch}), tensor.dtype)

    def _empty(self, name: str) -> Any:
        """Memory on the device for an input."""
        import onnxruntime

        zeros = self._zeros(name)
        memory = MEMORY[self._engine.device]
        try:
            return onnxruntime.OrtValue.ortvalue_from_shape_and_type(zeros.shape, zeros.dtype, memory, 0)
        except Exception as error:  # the exceptions of onnxruntime share no other base
            raise EngineError(f"stage {self._spec.name!r}: no memory for {name} on {memory!r}") from error
