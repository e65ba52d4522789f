"""Runs the plan of a stage in TensorRT or TensorRT for RTX, and makes denoising loops that stay on the GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.checks import Array, check_feeds
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.tensorrt.api import refit_engine
from lfdm_export.engines.tensorrt.device_loop import DeviceLoop
from lfdm_export.engines.tensorrt.gpu_memory import DeviceBuffer, PinnedArray
from lfdm_export.engines.tensorrt.gpu_session import GpuSession, gpu_session
from lfdm_export.engines.tensorrt.plan_checks import plan_to_run
from lfdm_export.engines.tensorrt.plan_context import PlanContext
from lfdm_export.engines.tensorrt.plans import remake
from lfdm_export.errors import EngineError
from lfdm_export.graphs.file import TYPES, Value, compare_interface
from lfdm_export.stages import StageSpec, TensorSpec


class TensorRtEngine:
    """One loaded plan. Any thread may use it, and waits while another uses an engine or loop of the same session.

    Attributes:
        path: path of the plan.
        spec: the stage.
        session: the state shared with the other engines.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: StageSpec,
        *,
        session: GpuSession,
        host_code: bool = False,
        weights: tuple[bytes, str] | None = None,
    ) -> None:
        """Load a plan and compare its interface with the stage.

        Args:
            path: the .plan file; `open_engine` checks that it matches the bundle.
            spec: the expected stage.
            session: session of the GPU.
            host_code: whether the plan holds its own runtime.
            weights: for a stripped plan, the graph with its weights, and the path of the stored graph, whose folder
                holds their files.

        Raises:
            EngineError: the plan cannot be loaded, or is another stage.
        """
        self.path, self.spec, self.session = Path(path), spec, session
        with session.owned():
            self._engine = session.load(self.path, host_code=host_code)
            if weights is not None:
                refit_engine(session.api, self._engine, *weights)
            _check_interface(session.api.module, self._engine, self.path, spec)
            self._own = self.context()
        self._buffers: dict[str, DeviceBuffer] = {}
        self._staging: dict[str, PinnedArray] = {}

    def context(self) -> PlanContext:
        """Make another execution context with the same weights: a captured CUDA graph needs its own.

        Raises:
            EngineError: there is not enough memory.
        """
        with self.session.owned():
            return PlanContext(self.session, self._engine, self.path, self.spec)

    def denoise_loop(self, batch: int) -> DeviceLoop:
        """Make a loop for this stage whose state remains on the GPU.

        Raises:
            EngineError: there is not enough memory.
        """
        return DeviceLoop(self.session, self.context(), self.spec, batch)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stage once: upload, compute, download.

        Args:
            feeds: exactly the inputs of the stage, by name, with its dtypes and shapes.

        Returns:
            The outputs of the stage, by name.

        Raises:
            EngineError: the feeds do not match the stage, or the run fails (for example, out of memory).
        """
        axes = check_feeds(self.spec, feeds)
        with self.session.owned():
            return self._run(feeds, axes)

    def _run(self, feeds: Mapping[str, Array], axes: Mapping[str, int]) -> dict[str, Array]:
        driver, stream = self.session.driver, self.session.stream
        tensors = (*self.spec.inputs, *self.spec.outputs)
        staged = {tensor.name: self._staged(tensor, tensor.concrete(**axes)) for tensor in tensors}
        pointers = {name: self._pointer(name, staging.size) for name, staging in staged.items()}
        fresh = self._own.prepare({tensor.name: tensor.concrete(**axes) for tensor in self.spec.inputs})
        self._own.bind(pointers)
        for tensor in self.spec.inputs:
            staging = staged[tensor.name]
            staging.array[...] = feeds[tensor.name]
            driver.upload(pointers[tensor.name], staging.address, staging.size, stream)
        self._own.enqueue()
        for tensor in self.spec.outputs:
            staging = staged[tensor.name]
            driver.download(staging.address, pointers[tensor.name], staging.size, stream)
        driver.synchronize(stream)
        if fresh:
            self.session.keep_kernels()
        return {tensor.name: staged[tensor.name].array.copy() for tensor in self.spec.outputs}

    def _staged(self, tensor: TensorSpec, shape: tuple[int, ...]) -> PinnedArray:
        found = self._staging.get(tensor.name)
        if found is None or found.array.shape != shape:
            found = self._staging[tensor.name] = PinnedArray(self.session.driver, shape, tensor.dtype)
        return found

    def _pointer(self, name: str, size: int) -> int:
        found = self._buffers.get(name)
        if found is None or found.size < size:
            found = self._buffers[name] = DeviceBuffer(self.session.driver, size)
        return found.pointer


def open_engine(bundle: Bundle, stage: str, target: Target) -> TensorRtEngine:
    """The engine of a stage, if its plan is for this bundle, this version and this GPU.

    Raises:
        EngineError: there is no such plan, or it cannot be loaded; the message says what to run.
        MissingDependencyError: a package is not installed.
    """
    session = gpu_session(target)
    path, record = plan_to_run(bundle, stage, target, session.api.title, session.gpu)
    options = record.fingerprint.options
    weights = None
    if options.strip:
        from lfdm_export.engines.tensorrt.plan_graph import builder_graph

        graph, structure, _ = builder_graph(bundle, stage, target)
        if structure != record.fingerprint.structure:
            raise EngineError(
                f"the plan {path} was made from a graph of another structure than the bundle's; "
                f"make it with: {remake(bundle.path, target)} --strip"
            )
        weights = graph, str(bundle.stage_path(stage).resolve())
    return TensorRtEngine(
        path, bundle.stages[stage], session=session, host_code=options.version_compatible, weights=weights
    )


def _check_interface(trt: Any, engine: Any, path: Path, spec: StageSpec) -> None:
    """Compare names, dtypes and shapes, but not the order: a plan lists its tensors in its own order."""
    types = {trt.DataType.FLOAT: TYPES["float32"], trt.DataType.INT64: TYPES["int64"]}
    order = {tensor.name: place for place, tensor in enumerate((*spec.inputs, *spec.outputs))}
    values: dict[Any, list[Value]] = {trt.TensorIOMode.INPUT: [], trt.TensorIOMode.OUTPUT: []}
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    for name in sorted(names, key=lambda name: order.get(name, len(order))):
        dtype = engine.get_tensor_dtype(name)
        value = Value(name, types.get(dtype, str(dtype)), tuple(engine.get_tensor_shape(name)))
        values[engine.get_tensor_mode(name)].append(value)
    compare_interface(path, spec, values[trt.TensorIOMode.INPUT], values[trt.TensorIOMode.OUTPUT])
