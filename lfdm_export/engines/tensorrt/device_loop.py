"""The denoising loop with its state on the GPU: the host only draws noise and queues work."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.engines.checks import Array
from lfdm_export.engines.cuda_driver import CudaDriver, Handle
from lfdm_export.engines.device_batch import STATE
from lfdm_export.engines.tensorrt.captured_run import CapturedRun
from lfdm_export.engines.tensorrt.gpu_memory import DeviceBuffer, PinnedArray, PinnedRing, byte_count, staged
from lfdm_export.engines.tensorrt.gpu_session import GpuSession
from lfdm_export.engines.tensorrt.plan_context import PlanContext
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import StageSpec

Float32: TypeAlias = NDArray[np.float32]

#: Maximum pinned host memory for noise that waits for its step. Ten steps of 32 published-size clips take 157 MB.
NOISE_BYTES = 256 << 20


class DeviceLoop:
    """Chains of `step` or `step_guided` for one batch size, one after the other.

    Any thread may call any method, and waits while another uses an engine or loop of the same session; the caller is
    responsible for the order of calls in a chain.

    Between `begin` and `latent` only noise is copied from the host, and nothing waits: noise is drawn into pinned
    memory while the GPU runs earlier steps. A step and the copies that make its results the next inputs are one
    `CapturedRun`.
    """

    def __init__(self, session: GpuSession, context: PlanContext, spec: StageSpec, batch: int) -> None:
        """Allocate memory for the state.

        Args:
            session: session of the GPU.
            context: context of the stage's engine, not used by others.
            spec: the stage.
            batch: number of samples per chain; at most the maximum of the stage.

        Raises:
            EngineError: there is not enough memory.
        """
        self._session, self._batch = session, batch
        self._driver, self._stream = self._session.driver, self._session.stream
        self._inputs = {tensor.name: tensor.concrete(batch=batch) for tensor in spec.inputs}
        self._dtypes = {tensor.name: tensor.dtype for tensor in spec.inputs}
        with session.owned():
            self._memory = {
                tensor.name: DeviceBuffer(self._driver, byte_count(tensor.concrete(batch=batch), tensor.dtype))
                for tensor in (*spec.inputs, *spec.outputs)
            }
        self._rows: dict[str, DeviceBuffer] = {}
        self._staging: dict[str, PinnedArray] = {}
        self._noise: PinnedRing | None = None
        pointers = {name: memory.pointer for name, memory in self._memory.items()}
        # Without a reference to the loop: it would keep the memory until the garbage collector finds the circle.
        keep_state = functools.partial(_keep_state, self._driver, self._stream, self._memory)
        self._advance = CapturedRun(session, context, self._inputs, pointers, keep_state)
        self._silent = self._running = False

    def begin(self, start: Float32, fixed: Mapping[str, Array], table: SamplerTable) -> None:
        """Queue the start of a chain, and drop an incomplete one.

        Args:
            start: (batch, 3, T, h, w).
            fixed: the inputs that no step changes, by name.
            table: the sampler; each of its rows applies to all samples.
        """
        with self._session.owned():
            self._begin(start, fixed, table)

    def _begin(self, start: Float32, fixed: Mapping[str, Array], table: SamplerTable) -> None:
        if self._running:
            self._driver.synchronize(self._stream)
            self._settle()
        self._running = True
        for name, values in {"noisy_latent": start, **fixed}.items():
            self._upload(name, self._memory[name], np.asarray(values, self._dtypes[name]))
        history = self._memory["history"]
        self._driver.clear(history.pointer, history.size, self._stream)
        self._silent = False
        for name, rows in (("timestep", table.timesteps), ("coefficients", table.coefficients)):
            values = np.repeat(np.asarray(rows, self._dtypes[name])[:, None], self._batch, axis=1)
            if name not in self._rows or self._rows[name].size < values.nbytes:
                self._rows[name] = DeviceBuffer(self._driver, values.nbytes)
            self._upload(f"{name} of all steps", self._rows[name], values)
        draws = int(np.count_nonzero(table.draws_noise))
        slots = min(draws, max(2, NOISE_BYTES // self._memory["noise"].size))
        if self._noise is None or self._noise.slots < slots:
            self._noise = PinnedRing(self._driver, self._inputs["noise"], np.float32, slots)

    def step(self, index: int, noise: Float32 | None) -> None:
        """Queue one step.

        Args:
            index: row of the sampler.
            noise: (batch, 3, T, h, w), which may change as soon as this returns; None for none.
        """
        with self._session.owned():
            self._take_step(index, noise)

    def _take_step(self, index: int, noise: Float32 | None) -> None:
        for name, rows in self._rows.items():
            target = self._memory[name]
            self._driver.copy(target.pointer, rows.pointer + index * target.size, target.size, self._stream)
        memory = self._memory["noise"]
        if noise is not None:
            assert self._noise is not None
            self._noise.upload(memory.pointer, noise, self._stream)
            self._silent = False
        elif not self._silent:
            self._driver.clear(memory.pointer, memory.size, self._stream)
            self._silent = True
        self._advance()

    def latent(self) -> Float32:
        """Wait for all queued work; return the latent (batch, 3, T, h, w) after the last step."""
        memory = self._memory["noisy_latent"]
        with self._session.owned():
            staging = staged(
                self._staging, self._driver, "the latent", self._inputs["noisy_latent"], np.dtype(np.float32)
            )
            self._driver.download(staging.address, memory.pointer, memory.size, self._stream)
            self._driver.synchronize(self._stream)
            return staging.array.copy()

    def finish(self) -> Float32:
        """Return the `latent` of a complete chain."""
        with self._session.owned():
            latent = self.latent()
            self._settle()
            self._session.keep_kernels()
            return latent

    def _settle(self) -> None:
        """Record that all queued work is done."""
        self._running = False
        if self._noise is not None:
            self._noise.settle()

    def _upload(self, name: str, target: DeviceBuffer, values: Array) -> None:
        staging = staged(self._staging, self._driver, name, values.shape, values.dtype)
        staging.array[...] = values
        self._driver.upload(target.pointer, staging.address, staging.size, self._stream)


def _keep_state(driver: CudaDriver, stream: Handle, memory: Mapping[str, DeviceBuffer]) -> None:
    """Queue the copies of a step's results into the next state."""
    for result, name in STATE.items():
        target = memory[name]
        driver.copy(target.pointer, memory[result].pointer, target.size, stream)
