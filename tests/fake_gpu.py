"""Fakes of the CUDA driver and TensorRT in Python, strict about order, for tests without a GPU.

A context is current only for the thread that set it; calls from other threads fail, as with the driver.

Work on a stream runs when it is waited for, not when it is queued: reading too early, or changing the source of a
queued copy, gives wrong values. GPU memory is host memory with checked bounds; copies to and from the host require
pinned memory.
"""

from __future__ import annotations

import ctypes
import functools
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.cuda_driver import SIGNATURES, CudaDriver
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.tensorrt.api import Api
from lfdm_export.engines.tensorrt.gpu_session import GpuSession
from lfdm_export.ops.cuda.host import HostKernels
from lfdm_export.ops.cuda.source import Launch
from lfdm_export.stages import StageSpec

OUT_OF_MEMORY, NO_DEVICE, INVALID_CONTEXT, ILLEGAL_ADDRESS, CAPTURING = 2, 100, 201, 700, 900
_TEXTS = {
    OUT_OF_MEMORY: b"out of memory",
    INVALID_CONTEXT: b"invalid device context",
    ILLEGAL_ADDRESS: b"an illegal memory access was encountered",
}
#: Functions that need no context.
_WITHOUT_CONTEXT = ("cuInit", "cuGetErrorString", "cuDriverGetVersion", "cuDevice", "cuCtxSetCurrent")

Work = Callable[[], object]


@dataclass
class FakeStream:
    """Queued work, and the graph being captured, if any."""

    queue: list[Work] = field(default_factory=list)
    done: int = 0
    captured: list[Work] | None = None

    def submit(self, work: Work) -> None:
        (self.queue if self.captured is None else self.captured).append(work)

    def run(self, until: int | None = None) -> None:
        """Run the queued work, up to the `until`-th piece since the start."""
        count = len(self.queue) if until is None else max(0, until - self.done)
        for work in self.queue[:count]:
            work()
        del self.queue[:count]
        self.done += count


class FakeLibrary:
    """Fake of `ctypes.CDLL("libcuda.so.1")`; ``calls`` lists the calls in order."""

    def __init__(self, *gpus: tuple[str, tuple[int, int]], memory: int = 1 << 40) -> None:
        self.gpus, self.memory = gpus or (("NVIDIA L4", (8, 9)),), memory
        self.calls: list[str] = []
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, FakeStream] = {}
        self.graphs: dict[int, list[Work]] = {}
        self.events: dict[int, tuple[FakeStream, int]] = {}
        self.kernels: HostKernels | None = None
        self._functions: dict[int, str] = {}
        self._modules: dict[int, str] = {}
        self._handles = 1000
        self._contexts: dict[int, int] = {}
        self._thread = threading.local()
        self._kept: list[Any] = []
        for name, parameters in SIGNATURES.items():
            setattr(self, name, ctypes.CFUNCTYPE(ctypes.c_int, *parameters)(self._logged(name)))

    def _logged(self, name: str) -> Callable[..., int]:
        function = getattr(self, f"_{name}")

        def call(*arguments: Any) -> int:
            if name != "cuCtxSetCurrent":  # may be called any number of times
                self.calls.append(name)
            if not name.startswith(_WITHOUT_CONTEXT) and not self.has_context():
                return INVALID_CONTEXT
            try:
                return function(*arguments) or 0
            except MemoryError:
                return OUT_OF_MEMORY
            except IndexError:
                return ILLEGAL_ADDRESS

        return call

    def _handle(self) -> int:
        self._handles += 1
        return self._handles

    def has_context(self) -> bool:
        """Whether the calling thread has a context."""
        return getattr(self._thread, "context", 0) in self._contexts.values()

    def at(self, address: int, size: int, *, pinned: bool = False) -> Any:
        """Return the memory at an address; fails unless all of it is allocated."""
        for start, buffer in (self.pinned if pinned else self.device).items():
            if start <= address and address + size <= start + len(buffer):
                return (ctypes.c_ubyte * size).from_address(address)
        raise IndexError(address)

    def array(self, address: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
        """Return an array in GPU memory."""
        return np.ndarray(shape, dtype, memoryview(self.at(address, int(np.prod(shape)) * np.dtype(dtype).itemsize)))

    # ------------------------------------------------------------------------------------ the device

    def _cuInit(self, flags: int) -> int:
        return NO_DEVICE if self.gpus == (("none", (0, 0)),) else 0

    def _cuGetErrorString(self, code: int, text: Any) -> int:
        if code not in _TEXTS:
            return 1
        text[0] = _TEXTS[code]
        return 0

    def _cuDriverGetVersion(self, version: Any) -> None:
        version[0] = 13000

    def _cuDeviceGetCount(self, count: Any) -> None:
        count[0] = len(self.gpus)

    def _cuDeviceGet(self, device: Any, index: int) -> None:
        device[0] = index

    def _cuDeviceGetName(self, name: int, size: int, device: int) -> None:
        text = self.gpus[device][0].encode()[: size - 1] + b"\0"
        ctypes.memmove(name, text, len(text))

    def _cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> None:
        value[0] = self.gpus[device][1][{75: 0, 76: 1}[attribute]]

    def _cuDeviceTotalMem_v2(self, size: Any, device: int) -> None:
        size[0] = 24 << 30

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: int) -> None:
        context[0] = self._contexts.setdefault(device, self._handle())

    def _cuDevicePrimaryCtxRelease_v2(self, device: int) -> None:
        pass

    def _cuCtxSetCurrent(self, context: int | None) -> int:
        if context not in self._contexts.values():
            return INVALID_CONTEXT
        self._thread.context = context
        return 0

    # ---------------------------------------------------------------------------------------- memory

    def _allocate(self, kept: dict[int, Any], size: int) -> int:
        if size > self.memory:
            raise MemoryError
        buffer = (ctypes.c_ubyte * size)(*b"\xff" * size) if size < 1 << 16 else (ctypes.c_ubyte * size)()
        kept[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def _cuMemAlloc_v2(self, pointer: Any, size: int) -> None:
        pointer[0] = self._allocate(self.device, size)

    def _cuMemFree_v2(self, pointer: int) -> None:
        for stream in self.streams.values():  # the driver, too, waits for the work that uses the memory
            stream.run()
        del self.device[pointer]

    def _cuMemAllocHost_v2(self, address: Any, size: int) -> None:
        address[0] = self._allocate(self.pinned, size)

    def _cuMemFreeHost(self, address: int) -> None:
        del self.pinned[address]

    def _submit_copy(self, stream: int, target: Any, source: Any) -> None:
        self.streams[stream].submit(lambda: ctypes.memmove(target, source, len(source)))

    def _cuMemcpyHtoDAsync_v2(self, target: int, source: int, size: int, stream: int) -> None:
        self._submit_copy(stream, self.at(target, size), self.at(source, size, pinned=True))

    def _cuMemcpyDtoHAsync_v2(self, target: int, source: int, size: int, stream: int) -> None:
        self._submit_copy(stream, self.at(target, size, pinned=True), self.at(source, size))

    def _cuMemcpyDtoDAsync_v2(self, target: int, source: int, size: int, stream: int) -> None:
        self._submit_copy(stream, self.at(target, size), self.at(source, size))

    def _cuMemsetD8Async(self, target: int, value: int, size: int, stream: int) -> None:
        memory = self.at(target, size)
        self.streams[stream].submit(lambda: ctypes.memset(memory, value, size))

    # --------------------------------------------------------------------------------------- kernels

    def _cuModuleLoadDataEx(self, module: Any, image: int, count: int, options: int, values: int) -> None:
        module[0] = handle = self._handle()
        self._modules[handle] = ctypes.string_at(image).decode()

    def _cuModuleGetFunction(self, function: Any, module: int, name: bytes) -> None:
        assert f".visible .entry {name.decode()}(" in self._modules[module]
        function[0] = handle = self._handle()
        self._functions[handle] = name.decode()

    def _cuLaunchKernel(self, function: int, x: int, y: int, z: int, *rest: int) -> None:
        """Queue the host build of the kernel; the values of its parameters are read now, as by the driver."""
        assert self.kernels is not None
        kernel, (*_, stream, parameters, _) = self.kernels.kernel(self._functions[function]), rest
        assert rest[:4] == (kernel.threads, 1, 1, 0)
        inputs, outputs = kernel.pointers
        addresses = (ctypes.c_void_p * (inputs + kernel.scalars + outputs)).from_address(parameters)
        kinds = [ctypes.c_void_p] * inputs + [ctypes.c_int32] * kernel.scalars + [ctypes.c_void_p] * outputs
        values: list[Any] = [kind.from_address(at).value for kind, at in zip(kinds, addresses, strict=True)]
        for address in (*values[:inputs], *values[inputs + kernel.scalars :]):
            self.at(address, 1)
        launch = Launch((x, y, z), tuple(values[inputs : inputs + kernel.scalars]))
        given, made = values[:inputs], values[inputs + kernel.scalars :]
        run = functools.partial(self.kernels.run, kernel.name, launch, given, made)
        self.streams[stream].submit(run)

    # ------------------------------------------------------------------------ streams, graphs, events

    def _cuStreamCreate(self, stream: Any, flags: int) -> None:
        assert flags == 1, "a stream that waits for the default one"
        stream[0] = handle = self._handle()
        self.streams[handle] = FakeStream()

    def _cuStreamDestroy_v2(self, stream: int) -> None:
        del self.streams[stream]

    def _cuStreamSynchronize(self, stream: int) -> int:
        if self.streams[stream].captured is not None:
            return CAPTURING
        self.streams[stream].run()
        return 0

    def _cuStreamBeginCapture_v2(self, stream: int, mode: int) -> int:
        if self.streams[stream].captured is not None:
            return CAPTURING
        self.streams[stream].captured = []
        return 0

    def _cuStreamEndCapture(self, stream: int, graph: Any) -> None:
        captured = self.streams[stream].captured
        assert captured is not None
        self.streams[stream].captured = None
        graph[0] = handle = self._handle()
        self.graphs[handle] = captured

    def _cuGraphInstantiateWithFlags(self, executable: Any, graph: int, flags: int) -> None:
        executable[0] = handle = self._handle()
        self.graphs[handle] = list(self.graphs[graph])

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        for work in self.graphs[graph]:
            self.streams[stream].submit(work)

    def _cuGraphDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cuGraphExecDestroy(self, graph: int) -> None:
        del self.graphs[graph]

    def _cuEventCreate(self, event: Any, flags: int) -> None:
        event[0] = self._handle()

    def _cuEventRecord(self, event: int, stream: int) -> None:
        at = self.streams[stream]
        self.events[event] = at, at.done + len(at.queue)

    def _cuEventSynchronize(self, event: int) -> None:
        stream, until = self.events[event]
        stream.run(until)

    def _cuEventDestroy_v2(self, event: int) -> None:
        del self.events[event]


# ------------------------------------------------------------------------------------------ TensorRT


class _Strategy(Enum):
    STATIC = 0
    USER_MANAGED = 2


class _Mode(Enum):
    INPUT = 1
    OUTPUT = 2


class _Type(Enum):
    FLOAT = 0
    INT64 = 8
    HALF = 1


class _Specialization(Enum):
    LAZY = 0
    EAGER = 1


class _GraphStrategy(Enum):
    DISABLED = 0
    WHOLE_GRAPH_CAPTURE = 1


class Severity(Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3


class FakeRuntimeCache:
    def __init__(self) -> None:
        self.data = b""

    def serialize(self) -> bytes:
        return self.data

    def deserialize(self, data: bytes) -> bool:
        self.data = data
        return True


class FakeRuntimeConfig:
    def __init__(self) -> None:
        self.cuda_graph_strategy = _GraphStrategy.DISABLED
        self.dynamic_shapes_kernel_specialization_strategy = _Specialization.LAZY
        self.strategy = _Strategy.STATIC
        self.cache: FakeRuntimeCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: _Strategy) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> FakeRuntimeCache:
        return FakeRuntimeCache()

    def set_runtime_cache(self, cache: FakeRuntimeCache) -> bool:
        self.cache = cache
        return True


class FakeContext:
    """Runs the stage's graph with ONNX Runtime when the stream reaches it."""

    def __init__(self, engine: FakeEngine, config: FakeRuntimeConfig) -> None:
        self.engine, self.config = engine, config
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None

    def _log(self, what: str) -> None:
        self.engine.gpu.log.append(f"{self.engine.spec.name}: {what}")

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        smallest, _, largest = self.engine.spec.batch
        if not smallest <= shape[0] <= largest:
            self.engine.gpu.logger.log(Severity.ERROR, "the shape is outside the profile")
            return False
        self.shapes[name], self.memory = shape, None
        self._log("shape")
        return True

    def update_device_memory_size_for_shapes(self) -> int:
        assert set(self.shapes) == {tensor.name for tensor in self.engine.spec.inputs}, "not all shapes are set"
        self._log("size")
        return self.engine.gpu.activation_bytes * self.batch

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self.engine.gpu.activation_bytes * self.batch, "too little memory for activations"
        self.memory = memory, size
        self._log("memory")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        self._log("address")
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        gpu, spec = self.engine.gpu, self.engine.spec
        self._log("execute")
        assert gpu.library.has_context(), "no context on this thread"
        if gpu.failing:
            gpu.logger.log(Severity.ERROR, "the kernel\nfailed")
            return False
        assert self.config.strategy == _Strategy.USER_MANAGED
        assert self.memory is not None, "no memory for activations"
        gpu.library.at(*self.memory)  # must still be allocated
        arrays = {
            tensor.name: gpu.library.array(self.addresses[tensor.name], tensor.concrete(batch=self.batch), tensor.dtype)
            for tensor in (*spec.inputs, *spec.outputs)
        }
        stream = gpu.library.streams[stream_handle]
        if stream.captured is not None:
            assert self.config.cuda_graph_strategy == _GraphStrategy.DISABLED, "captured twice"

        def compute() -> None:
            outputs = self.engine.graph.run({tensor.name: arrays[tensor.name] for tensor in spec.inputs})
            for name, values in outputs.items():
                arrays[name][...] = values
            if self.config.cache is not None:
                self.config.cache.data = b"kernels of " + ", ".join(sorted(gpu.loaded)).encode()

        stream.submit(compute)
        return True

    @property
    def batch(self) -> int:
        return self.shapes[self.engine.spec.inputs[0].name][0]


class FakeEngine:
    def __init__(self, gpu: FakeGpu, spec: StageSpec, graph: OnnxRuntimeEngine) -> None:
        self.gpu, self.spec, self.graph = gpu, spec, graph
        self.contexts: list[FakeContext] = []
        self.refitted: list[bytes] = []
        self._tensors = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors)

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_mode(self, name: str) -> _Mode:
        return _Mode.INPUT if name in {tensor.name for tensor in self.spec.inputs} else _Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> _Type:
        return _Type.INT64 if self._tensors[name].dtype == "int64" else _Type.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].concrete(batch=-1, tokens=-1)

    def create_runtime_config(self) -> FakeRuntimeConfig:
        return FakeRuntimeConfig()

    def create_execution_context(self, runtime_config: FakeRuntimeConfig) -> FakeContext:
        context = FakeContext(self, runtime_config)
        self.contexts.append(context)
        return context


class FakeRuntime:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> FakeEngine | None:
        gpu = self._gpu
        try:
            plan = json.loads(serialized_engine)
        except ValueError:
            gpu.logger.log(Severity.ERROR, "the plan is damaged")
            return None
        spec = gpu.specs[plan["stage"]]
        engine = FakeEngine(gpu, spec, OnnxRuntimeEngine(plan["graph"], spec, threads=1))
        gpu.loaded[spec.name] = engine
        return engine


class FakeRefitter:
    def __init__(self, engine: FakeEngine, logger: Any) -> None:
        self.engine, self.graph = engine, b""

    def refit_cuda_engine(self) -> bool:
        self.engine.refitted.append(self.graph)
        return bool(self.graph)


class FakeParserRefitter:
    def __init__(self, refitter: FakeRefitter, logger: Any) -> None:
        self._refitter = refitter

    def refit_from_bytes(self, model: bytes, path: str) -> bool:
        self._refitter.graph = model
        return True


class FakeLogger:
    def __init__(self) -> None:
        self.errors: list[str] = []

    def log(self, level: Severity, message: str) -> None:
        self.errors.append(message)


class FakeGpu:
    """A session with fakes of driver and TensorRT.

    Attributes:
        library: fake driver.
        log: calls of TensorRT's contexts, in order.
        loaded: engines by stage.
        activation_bytes: activation memory of an engine per sample.
        failing: whether executions fail.
    """

    def __init__(self, target: Target, specs: Mapping[str, StageSpec], *gpus: tuple[str, tuple[int, int]]) -> None:
        self.library, self.specs = FakeLibrary(*gpus), dict(specs)
        self.log: list[str] = []
        self.loaded: dict[str, FakeEngine] = {}
        self.activation_bytes, self.failing = 4096, False
        self.logger = FakeLogger()
        self.module = SimpleNamespace(
            Runtime=lambda logger: FakeRuntime(self),
            Refitter=FakeRefitter,
            OnnxParserRefitter=FakeParserRefitter,
            ExecutionContextAllocationStrategy=_Strategy,
            TensorIOMode=_Mode,
            DataType=_Type,
            DynamicShapesKernelSpecializationStrategy=_Specialization,
            CudaGraphStrategy=_GraphStrategy,
        )
        self.session = GpuSession(Api(target, self.module, "11.4.0", self.logger), CudaDriver(self.library))


def fake_plan(bundle: Bundle, stage: str, path: Path) -> Path:
    """Write a plan of a stage for `FakeRuntime`."""
    path.write_text(json.dumps({"stage": stage, "graph": str(bundle.stage_path(stage))}), encoding="utf-8")
    return path
