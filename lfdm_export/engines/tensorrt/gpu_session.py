"""What all plans in one process share: GPU, stream, memory for activations, compiled kernels."""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lfdm_export.engines.cuda_driver import CudaDriver, Gpu, load_driver
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.tensorrt.api import Api, load_api
from lfdm_export.engines.tensorrt.gpu_memory import DeviceBuffer
from lfdm_export.engines.tensorrt.target import TENSORRT_RTX
from lfdm_export.errors import EngineError
from lfdm_export.files.atomic import write_file

_log = logging.getLogger(__name__)
_one_session = threading.Lock()


class GpuSession:
    """The first GPU, one stream on it, and the TensorRT runtime; for any thread, one at a time.

    Everything runs on the one stream, so the activations of all engines use the same memory, one engine at a time.
    Code that uses the session, its driver, or objects made from them holds `owned` meanwhile. Engines and loops of this
    package do so in each public method.

    Attributes:
        api: TensorRT, or TensorRT for RTX.
        driver: driver of the GPU.
        gpu: the GPU in use.
        stream: stream of all work.
        activations_moved: how often the memory for activations was replaced; a CUDA graph captured before
            refers to the old memory and must be captured again.
    """

    def __init__(self, api: Api, driver: CudaDriver) -> None:
        """Start using the GPU.

        Raises:
            EngineError: there is no GPU.
        """
        self.api, self.driver = api, driver
        self._lock = threading.RLock()
        gpus = driver.gpus()
        if not gpus:
            raise EngineError(f"{api.title} runs on a GPU, and the NVIDIA driver sees none; use --target onnxruntime")
        self.gpu: Gpu = gpus[0]
        driver.use_first_gpu()
        self.stream = driver.create_stream()
        self.runtime = api.module.Runtime(api.logger)
        if self.runtime is None:
            raise EngineError(f"{api.title} cannot start on {self.gpu.name}: {api.take_errors()}")
        self.activations_moved = 0
        self._activations: DeviceBuffer | None = None
        self._kernels: Any = None
        self._kernels_path: Path | None = None
        self._kernels_bytes = 0

    @contextlib.contextmanager
    def owned(self) -> Iterator[None]:
        """Keep other threads out, and make the context of the GPU current in the calling thread.

        A thread that waits for the GPU meanwhile makes the others wait too: all work is on one stream anyway.

        Raises:
            EngineError: the driver reports an error.
        """
        with self._lock:
            self.driver.bind()
            yield

    def activations(self, size: int) -> DeviceBuffer:
        """Memory of at least `size` bytes, shared by all engines."""
        if self._activations is None or self._activations.size < size:
            if self._activations is not None:
                self.driver.synchronize(self.stream)  # the memory may be in use
            self._activations = None  # free before allocating more
            self._activations = DeviceBuffer(self.driver, size)
            self.activations_moved += 1
        return self._activations

    def load(self, plan: Path, *, host_code: bool) -> Any:
        """Load a plan as an engine.

        Args:
            plan: the file.
            host_code: whether it holds its own runtime, as version-compatible plans do.

        Raises:
            EngineError: the plan cannot be loaded.
        """
        if host_code:
            self.runtime.engine_host_code_allowed = True
        engine = self.runtime.deserialize_cuda_engine(plan.read_bytes())
        if engine is None:
            raise EngineError(f"{self.api.title} cannot load {plan} on {self.gpu.name}: {self.api.take_errors()}")
        return engine

    def context(self, engine: Any, plan: Path) -> Any:
        """Make an execution context whose activations use the memory of the session.

        Raises:
            EngineError: for example, there is not enough memory.
        """
        trt = self.api.module
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if self.api.target == TENSORRT_RTX.name:
            # RTX compiles kernels for a new shape: eager, so that the first run does not differ from later ones.
            config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
            config.cuda_graph_strategy = trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config.set_runtime_cache(
                self._runtime_cache(config, plan.parent / f"kernels-{self.gpu.architecture}.cache")
            )
        context = engine.create_execution_context(config)
        if context is None:
            raise EngineError(f"{self.api.title} cannot run {plan} on {self.gpu.name}: {self.api.take_errors()}")
        return context

    def _runtime_cache(self, config: Any, path: Path) -> Any:
        """Kernels that RTX compiled for this GPU in earlier processes; one cache for all engines."""
        if self._kernels is None:
            self._kernels, self._kernels_path = config.create_runtime_cache(), path
            with contextlib.suppress(OSError):
                known = path.read_bytes()
                self._kernels_bytes = len(known)
                if not self._kernels.deserialize(known):
                    _log.info("%s is of another version and is made again: %s", path, self.api.take_errors())
        return self._kernels

    def keep_kernels(self) -> None:
        """Write the runtime cache if it has grown and the bundle is writable."""
        if self._kernels is None or self._kernels_path is None:
            return
        data = bytes(self._kernels.serialize())
        if len(data) == self._kernels_bytes:
            return
        try:
            write_file(self._kernels_path, data)
            self._kernels_bytes = len(data)
        except OSError as error:
            _log.info("compiled kernels cannot be kept in %s: %s", self._kernels_path, error.strerror or error)


def gpu_session(target: Target) -> GpuSession:
    """The session of this process for a target; any thread may call this.

    Raises:
        EngineError: no driver, no GPU, or the target cannot be loaded.
        MissingDependencyError: a package is not installed.
    """
    with _one_session:  # two threads that call this first get the same session
        return _session(target)


@functools.cache
def _session(target: Target) -> GpuSession:
    return GpuSession(load_api(target), load_driver())
