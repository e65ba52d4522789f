"""The GPU of a session as a `lfdm_export.engines.device.Device`: memory, copies, our own kernels, plans."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.checks import Array
from lfdm_export.engines.cuda_driver import DevicePointer, Handle
from lfdm_export.engines.device import PICTURES, Layout
from lfdm_export.engines.device_chain import DeviceChain
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.tensorrt.captured_run import CapturedRun
from lfdm_export.engines.tensorrt.engine import TensorRtEngine, open_engine
from lfdm_export.engines.tensorrt.gpu_memory import DeviceBuffer, PinnedPool, byte_count
from lfdm_export.ops.cuda.nvrtc import compile_ptx
from lfdm_export.ops.cuda.source import Kernel, Launch
from lfdm_export.ops.pictures.kernels import not_finite_kernel, not_finite_launch, pictures_kernel, pictures_launch
from lfdm_export.ops.thresholded_step.kernels import noise_kernel, noise_launch


@dataclass(frozen=True, eq=False)
class GpuArray:
    """An array in GPU memory, in C order.

    Attributes:
        memory: keeps the memory.
        pointer: its address.
        shape: its shape.
        dtype: its type.
    """

    memory: DeviceBuffer
    pointer: DevicePointer
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return byte_count(self.shape, self.dtype)

    def __getitem__(self, part: int | slice) -> GpuArray:
        """The element or the slice of the first axis, in the same memory."""
        each = byte_count(self.shape[1:], self.dtype)
        if isinstance(part, slice):
            start, stop, _ = part.indices(self.shape[0])
            shape = (max(0, stop - start), *self.shape[1:])
            return GpuArray(self.memory, self.pointer + start * each, shape, self.dtype)
        assert 0 <= part < self.shape[0]
        return GpuArray(self.memory, self.pointer + part * each, self.shape[1:], self.dtype)


class GpuDevice:
    """Implements `lfdm_export.engines.device.Device`."""

    def __init__(self, bundle: Bundle, target: Target, engines: Mapping[str, TensorRtEngine] | None = None) -> None:
        """Load the plans of a bundle, and our kernels.

        Args:
            bundle: the bundle.
            target: "tensorrt" or "tensorrt-rtx".
            engines: engines that are loaded already, by stage.

        Raises:
            EngineError: a plan is missing or cannot be loaded, or a kernel cannot be compiled.
            MissingDependencyError: a package is not installed.
        """
        stages = ("encode", "step", "step_guided", "decode")
        loaded = engines or {}
        self._engines = {stage: loaded.get(stage) or open_engine(bundle, stage, target) for stage in stages}
        self._specs = bundle.stages
        self._session = self._engines["encode"].session
        self._driver, self._stream = self._session.driver, self._session.stream
        self._kernels: dict[str, Handle] = {}
        self._pinned = PinnedPool(self._driver)
        with self.owned():  # before any capture
            for kernel in (noise_kernel(), pictures_kernel(), not_finite_kernel()):
                self._kernels[kernel.name] = self._driver.load_kernel(compile_ptx(kernel), kernel.name)

    def owned(self) -> AbstractContextManager[None]:
        """Keep other threads out, and make the GPU's context current."""
        return self._session.owned()

    def zeros(self, shape: Sequence[int], dtype: str) -> GpuArray:
        """New memory, filled with zeros."""
        kind = np.dtype(dtype)
        memory = DeviceBuffer(self._driver, byte_count(tuple(shape), kind))
        array = GpuArray(memory, memory.pointer, tuple(shape), kind)
        self.clear(array)
        return array

    def results(self, stage: str, batch: int) -> dict[str, GpuArray]:
        """New memory for the outputs of a stage."""
        return {one.name: self.zeros(one.concrete(batch=batch), one.dtype) for one in self._specs[stage].outputs}

    def upload(self, target: GpuArray, values: Array) -> None:
        """Copy from the host."""
        converted = np.asarray(values, target.dtype)
        assert converted.size == math.prod(target.shape)
        self._pinned.upload(target.pointer, converted, self._stream)

    def download(self, sources: Sequence[GpuArray]) -> list[Array]:
        """Wait for all queued work; return copies of the arrays."""
        found = []
        for one in sources:
            staged = self._pinned.download(one.pointer, one.nbytes, self._stream)
            self._driver.synchronize(self._stream)
            found.append(staged.copy().view(one.dtype).reshape(one.shape))
        return found

    def copy(self, target: GpuArray, source: GpuArray) -> None:
        """Copy between arrays of one size."""
        assert (target.nbytes, target.dtype) == (source.nbytes, source.dtype)
        self._driver.copy(target.pointer, source.pointer, target.nbytes, self._stream)

    def clear(self, target: GpuArray) -> None:
        """Fill with zeros."""
        self._driver.clear(target.pointer, target.nbytes, self._stream)

    def draw(self, noise: GpuArray, seeds: GpuArray, steps: GpuArray) -> None:
        """Fill noise with the values of `noise_for`."""
        plan = noise_launch(math.prod(noise.shape[1:]), noise.shape[0])
        self._launch(noise_kernel(), plan, [seeds, steps], [noise])

    def flag_not_finite(self, values: GpuArray, flag: GpuArray) -> None:
        """Set the flag to 1 if a value is not finite."""
        self._launch(not_finite_kernel(), not_finite_launch(math.prod(values.shape)), [values], [flag])

    def program(
        self,
        stage: str,
        inputs: Mapping[str, GpuArray],
        outputs: Mapping[str, GpuArray],
        flag: GpuArray | None = None,
    ) -> Callable[[], None]:
        """Prepare a stage; see `Device.program`."""
        engine = self._engines["decode" if stage == PICTURES else stage]
        batch = next(iter(inputs.values())).shape[0]
        taken = {array.pointer for array in inputs.values()}
        results, later = dict(outputs), []
        for one in engine.spec.outputs:
            if stage == PICTURES or results[one.name].pointer in taken:
                results[one.name] = self.zeros(one.concrete(batch=batch), one.dtype)
                later.append(one.name)

        def after() -> None:
            for name in later:
                if stage == PICTURES:
                    assert flag is not None
                    pixels = math.prod(results[name].shape[2:])
                    launch = pictures_launch(pixels, batch)
                    self._launch(pictures_kernel(), launch, [results[name]], [outputs[name], flag])
                else:
                    self.copy(outputs[name], results[name])

        shapes = {name: array.shape for name, array in inputs.items()}
        pointers = {name: array.pointer for name, array in {**inputs, **results}.items()}
        return CapturedRun(self._session, engine.context(), shapes, pointers, after)

    def mark(self) -> Callable[[], None]:
        """A function that waits for the work queued until now."""
        event = self._driver.record(self._stream)
        return lambda: self._driver.wait(event)

    def layouts(self, frames: int) -> Sequence[Layout]:
        """Rows of the plan's profile, each with the frames that the plan was built for."""
        spec = self._specs["decode"]
        each = next(one.shape[2] for one in spec.inputs if one.name == "latent")
        assert isinstance(each, int)
        most = min(spec.batch[2], -(-frames // each))
        return [Layout(rows, each) for rows in range(most, 0, -1)]

    def _launch(
        self, kernel: Kernel, plan: Launch[int], inputs: Sequence[GpuArray], outputs: Sequence[GpuArray]
    ) -> None:
        assert (len(inputs), len(outputs)) == kernel.pointers
        arguments = [
            *(ctypes.c_void_p(array.pointer) for array in inputs),
            *map(ctypes.c_int32, plan.scalars),
            *(ctypes.c_void_p(array.pointer) for array in outputs),
        ]
        self._driver.launch_kernel(self._kernels[kernel.name], plan.grid, kernel.threads, arguments, self._stream)


def device_chain(bundle: Bundle, target: Target, _threads: int | None) -> DeviceChain[GpuArray]:
    """Whole clips of a bundle on the GPU.

    Raises:
        EngineError: a plan is missing or cannot be loaded, or there is not enough memory.
        MissingDependencyError: a package is not installed.
    """
    manifest = bundle.manifest
    return DeviceChain(GpuDevice(bundle, target), bundle.stages, manifest.geometry, manifest.config.dm.training_steps)
