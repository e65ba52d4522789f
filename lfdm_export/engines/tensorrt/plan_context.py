"""An execution context of a loaded plan."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from lfdm_export.engines.tensorrt.gpu_session import GpuSession
from lfdm_export.errors import EngineError
from lfdm_export.stages import StageSpec

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]


class PlanContext:
    """An execution context of an engine: shapes, addresses, and the activation memory of the session."""

    def __init__(self, session: GpuSession, engine: Any, path: Path, spec: StageSpec) -> None:
        """Create the context, as `TensorRtEngine.context` describes."""
        self.session, self.spec = session, spec
        self._context = session.context(engine, path)
        self._shapes: Shapes = {}
        self._prepared_for = -1

    def prepare(self, shapes: Shapes) -> bool:
        """Set the shapes of the inputs, and give the context memory for them.

        Args:
            shapes: shapes of all inputs, by name.

        Returns:
            Whether anything changed.

        Raises:
            EngineError: a shape is outside the profile of the plan, or there is not enough memory.
        """
        if self._shapes == shapes and self._prepared_for == self.session.activations_moved:
            return False
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise self._failure(f"refuses the shape {shape} of {name}")
        memory = self.session.activations(self._context.update_device_memory_size_for_shapes())
        self._context.set_device_memory(memory.pointer, memory.size)
        self._shapes, self._prepared_for = dict(shapes), self.session.activations_moved
        return True

    def bind(self, pointers: Mapping[str, int]) -> None:
        """Set the GPU addresses of inputs and outputs.

        Raises:
            EngineError: TensorRT rejects an address.
        """
        for name, pointer in pointers.items():
            if not self._context.set_tensor_address(name, pointer):
                raise self._failure(f"refuses the address of {name}")

    def enqueue(self) -> None:
        """Queue one run with the bound tensors.

        Raises:
            EngineError: the run cannot be queued.
        """
        if not self._context.execute_async_v3(self.session.stream):
            raise self._failure("failed")

    def _failure(self, what: str) -> EngineError:
        api = self.session.api
        return EngineError(f"stage {self.spec.name!r} in {api.title} {what}: {api.take_errors()}")
