"""Sampling in ONNX Runtime with the state in device memory: between steps only fresh noise leaves the host.

Works on any device of ONNX Runtime; on a CPU it saves two copies per step. Not measured on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.checks import Array, check_feeds
from lfdm_export.engines.device_batch import EACH_STEP, STATE, fixed_inputs
from lfdm_export.engines.onnxruntime.engine import MEMORY, OnnxRuntimeEngine
from lfdm_export.engines.onnxruntime.target import Device
from lfdm_export.engines.target_spec import Target
from lfdm_export.errors import EngineError
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import BATCH, COEFFICIENTS
from lfdm_export.wording import one_line

Float32: TypeAlias = NDArray[np.float32]


class BoundOnnxRuntimeEngine(OnnxRuntimeEngine):
    """An engine that can keep the sampling state on its device."""

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
        self._fixed = {name: self._empty(name) for name in fixed_inputs(self._spec)}
        self._each = {name: self._empty(name) for name in EACH_STEP}
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
        changing = {name: self._zeros(name) for name in EACH_STEP}
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
            raise EngineError(f"stage {self._spec.name!r} failed in ONNX Runtime: {one_line(error)}") from error
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


def open_engine(bundle: Bundle, stage: str, _target: Target, threads: int | None, device: str) -> OnnxRuntimeEngine:
    """The engine of a stage; on a GPU, one that keeps the state of sampling there.

    Raises:
        EngineError: the graph cannot be loaded, or the device is missing or cannot run all of it.
        MissingDependencyError: a package is not installed.
    """
    path, spec = bundle.stage_path(stage), bundle.stages[stage]
    # On a CPU it is better to stop a chain with non-finite values at once than to keep its state in place.
    on_gpu = device != "cpu" and set(STATE) <= {tensor.name for tensor in spec.outputs}
    kind = BoundOnnxRuntimeEngine if on_gpu else OnnxRuntimeEngine
    tf32 = bundle.manifest.precision == "tf32"
    return kind(path, spec, threads=threads, device=cast(Device, device), tf32=tf32)
