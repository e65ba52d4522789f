"""Runs the plan of a stage in TensorRT or TensorRT for RTX, and makes denoising loops that stay on the GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.checks import Array, check_feeds, check_tensors
from lfdm_export.engines.device import Pool
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.tensorrt.api import refit_engine
from lfdm_export.engines.tensorrt.device_loop import DeviceLoop
from lfdm_export.engines.tensorrt.gpu_memory import DeviceBuffer, PinnedArray, byte_count, staged
from lfdm_export.engines.tensorrt.gpu_session import GpuSession, gpu_session
from lfdm_export.engines.tensorrt.plan_checks import plan_to_run
from lfdm_export.engines.tensorrt.plan_context import PlanContext
from lfdm_export.engines.tensorrt.plan_graph import builder_graph
from lfdm_export.engines.tensorrt.plans import remake
from lfdm_export.errors import EngineError
from lfdm_export.graphs.file import TYPES, Value, compare_interface
from lfdm_export.stages import BATCH, StageSpec, TensorSpec


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
        self._kept: dict[tuple[int, tuple[str, ...]], Pool[dict[str, DeviceBuffer]]] = {}

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
        """Run the stage once; see `lfdm_export.engines.interface.Engine`."""
        axes = check_feeds(self.spec, feeds)
        with self.session.owned():
            return self._run(feeds, axes, {})

    def keep(self, inputs: Mapping[str, Array], rows: int) -> KeptOnGpu:
        """Upload inputs for several runs.

        Args:
            inputs: some inputs of the stage, (batch, …) each, by name.
            rows: rows per sample: each sample is repeated so many times.

        Raises:
            EngineError: an input does not match the stage; `DeviceMemoryError` if memory is lacking.
        """
        specs = tuple(tensor for tensor in self.spec.inputs if tensor.name in inputs)
        samples = check_tensors(self.spec, specs, inputs, "input")[BATCH]
        batch, driver, stream = samples * rows, self.session.driver, self.session.stream
        key = batch, tuple(tensor.name for tensor in specs)
        with self.session.owned():
            if key not in self._kept:
                self._kept[key] = Pool(lambda: {one.name: self._memory(one, batch) for one in specs})
            memory = self._kept[key].take()
            for tensor in specs:
                staging = self._staged(f"{tensor.name} kept", tensor.concrete(batch=samples), tensor.dtype)
                staging.array[...] = inputs[tensor.name]
                each, start = staging.size // samples, memory[tensor.name].pointer
                for sample in range(samples):
                    first = start + sample * rows * each
                    driver.upload(first, staging.address + sample * each, each, stream)
                    for row in range(1, rows):
                        driver.copy(first + row * each, first, each, stream)
            driver.synchronize(stream)  # the staging memory is used again
        return self._kept[key].lend(KeptOnGpu(self, memory, batch), memory)

    def run_with(self, kept: Mapping[str, DeviceBuffer], feeds: Mapping[str, Array], batch: int) -> dict[str, Array]:
        """`run`, with some inputs of that batch size on the GPU already.

        Raises:
            EngineError: as for `run`; `DeviceMemoryError` if memory is lacking.
        """
        given = tuple(tensor for tensor in self.spec.inputs if tensor.name not in kept)
        axes = check_tensors(self.spec, given, feeds, "input")
        if axes[BATCH] != batch:
            raise EngineError(f"stage {self.spec.name!r}: expected batch {batch}, found {axes[BATCH]}")
        with self.session.owned():
            return self._run(feeds, axes, kept)

    def _run(
        self, feeds: Mapping[str, Array], axes: Mapping[str, int], kept: Mapping[str, DeviceBuffer]
    ) -> dict[str, Array]:
        driver, stream = self.session.driver, self.session.stream
        tensors = (*self.spec.inputs, *self.spec.outputs)
        staged = {
            tensor.name: self._staged(tensor.name, tensor.concrete(**axes), tensor.dtype)
            for tensor in tensors
            if tensor.name not in kept
        }
        pointers = {name: self._pointer(name, staging.size) for name, staging in staged.items()}
        pointers |= {name: buffer.pointer for name, buffer in kept.items()}
        fresh = self._own.prepare({tensor.name: tensor.concrete(**axes) for tensor in self.spec.inputs})
        self._own.bind(pointers)
        for name, values in feeds.items():
            staging = staged[name]
            staging.array[...] = values
            driver.upload(pointers[name], staging.address, staging.size, stream)
        self._own.enqueue()
        for tensor in self.spec.outputs:
            staging = staged[tensor.name]
            driver.download(staging.address, pointers[tensor.name], staging.size, stream)
        driver.synchronize(stream)
        if fresh:
            self.session.keep_kernels()
        return {tensor.name: staged[tensor.name].array.copy() for tensor in self.spec.outputs}

    def _memory(self, tensor: TensorSpec, batch: int) -> DeviceBuffer:
        return DeviceBuffer(self.session.driver, byte_count(tensor.concrete(batch=batch), tensor.dtype))

    def _staged(self, name: str, shape: tuple[int, ...], dtype: str) -> PinnedArray:
        return staged(self._staging, self.session.driver, name, shape, dtype)

    def _pointer(self, name: str, size: int) -> int:
        found = self._buffers.get(name)
        if found is None or found.size < size:
            found = self._buffers[name] = DeviceBuffer(self.session.driver, size)
        return found.pointer


class KeptOnGpu:
    """Inputs of a stage on the GPU, for several runs. Any thread may use it, as it may use the engine."""

    def __init__(self, engine: TensorRtEngine, memory: Mapping[str, DeviceBuffer], batch: int) -> None:
        """Made by `TensorRtEngine.keep`."""
        self._engine, self._memory, self._batch = engine, memory, batch

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stage with these inputs and the others.

        Raises:
            EngineError: the feeds do not match, or the run fails; `DeviceMemoryError` if memory is lacking.
        """
        return self._engine.run_with(self._memory, feeds, self._batch)


def open_engine(
    bundle: Bundle, stage: str, target: Target, _threads: int | None = None, _device: str = "cpu"
) -> TensorRtEngine:
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
