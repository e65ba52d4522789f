"""The few calls of the NVIDIA driver that plans need, through `ctypes`: no package besides the driver.

The driver API and the runtime API, which TensorRT uses, share the primary context, streams and pointers.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from lfdm_export.engines.device import DeviceMemoryError
from lfdm_export.errors import EngineError

#: Address in GPU memory.
DevicePointer: TypeAlias = int
#: A stream, event or executable graph, as a handle of the driver.
Handle: TypeAlias = int

_int, _uint, _size = ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
_device_pointer, _handle = ctypes.c_uint64, ctypes.c_void_p
_out_int, _out_handle = ctypes.POINTER(_int), ctypes.POINTER(_handle)

#: Parameters of each call; all return an error code. Source: CUDA driver API reference, `cuda.h`.
SIGNATURES: Mapping[str, tuple[Any, ...]] = {
    "cuInit": (_uint,),
    "cuGetErrorString": (_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuDriverGetVersion": (_out_int,),
    "cuDeviceGetCount": (_out_int,),
    "cuDeviceGet": (_out_int, _int),
    "cuDeviceGetName": (_handle, _int, _int),
    "cuDeviceGetAttribute": (_out_int, _int, _int),
    "cuDeviceTotalMem_v2": (ctypes.POINTER(_size), _int),
    "cuDevicePrimaryCtxRetain": (_out_handle, _int),
    "cuDevicePrimaryCtxRelease_v2": (_int,),
    "cuCtxSetCurrent": (_handle,),
    "cuMemAlloc_v2": (ctypes.POINTER(_device_pointer), _size),
    "cuMemFree_v2": (_device_pointer,),
    "cuMemAllocHost_v2": (_out_handle, _size),
    "cuMemFreeHost": (_handle,),
    "cuModuleLoadDataEx": (_out_handle, _handle, _uint, _handle, _handle),
    "cuModuleGetFunction": (_out_handle, _handle, ctypes.c_char_p),
    "cuLaunchKernel": (_handle, *[_uint] * 7, _handle, _handle, _handle),
    "cuMemcpyHtoDAsync_v2": (_device_pointer, _handle, _size, _handle),
    "cuMemcpyDtoHAsync_v2": (_handle, _device_pointer, _size, _handle),
    "cuMemcpyDtoDAsync_v2": (_device_pointer, _device_pointer, _size, _handle),
    "cuMemsetD8Async": (_device_pointer, ctypes.c_ubyte, _size, _handle),
    "cuStreamCreate": (_out_handle, _uint),
    "cuStreamDestroy_v2": (_handle,),
    "cuStreamSynchronize": (_handle,),
    "cuStreamBeginCapture_v2": (_handle, _int),
    "cuStreamEndCapture": (_handle, _out_handle),
    "cuGraphInstantiateWithFlags": (_out_handle, _handle, ctypes.c_ulonglong),
    "cuGraphLaunch": (_handle, _handle),
    "cuGraphDestroy": (_handle,),
    "cuGraphExecDestroy": (_handle,),
    "cuEventCreate": (_out_handle, _uint),
    "cuEventRecord": (_handle, _handle),
    "cuEventSynchronize": (_handle,),
    "cuEventDestroy_v2": (_handle,),
}

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NON_BLOCKING, _NO_TIMING = 1, 2
# During capture, only calls of the capturing thread are refused.
_CAPTURE_THREAD_LOCAL = 1
_OUT_OF_MEMORY, _NO_DEVICE = 2, 100


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: product name from NVIDIA.
        compute_capability: major and minor, such as (8, 9).
        memory: size of its memory in bytes.
        driver: newest CUDA version that the driver supports, such as "13.0".
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int
    driver: str

    @property
    def architecture(self) -> str:
        """Its compute capability in the notation of the NVIDIA tools: "SM89"."""
        major, minor = self.compute_capability
        return f"SM{major}{minor}"


class CudaDriver:
    """The driver calls that are needed, on the first GPU; an error code becomes an `EngineError`.

    The driver has one current context per thread. Every thread that calls methods for memory, streams, graphs or events
    calls `bind` first. Methods that release something call `bind` themselves, because garbage collection may run them
    on any thread.
    """

    def __init__(self, library: Any) -> None:
        """Use a loaded driver library, without calling it yet.

        Args:
            library: result of `ctypes.CDLL`.
        """
        self._library = library
        self._context: Handle = 0
        for name, parameters in SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = parameters, _int

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function by name.

        Raises:
            EngineError: the driver reports an error; `DeviceMemoryError` if memory is lacking.
        """
        code = getattr(self._library, name)(*arguments)
        if code:
            kind = DeviceMemoryError if code == _OUT_OF_MEMORY else EngineError
            raise kind(f"the GPU's driver failed in {name}: {self._describe(code)}")

    def gpus(self) -> tuple[Gpu, ...]:
        """All visible GPUs, as ``CUDA_VISIBLE_DEVICES`` selects them.

        Raises:
            EngineError: the driver does not work.
        """
        code = self._library.cuInit(0)
        if code == _NO_DEVICE:
            return ()
        if code:
            raise EngineError(f"the GPU's driver failed in cuInit: {self._describe(code)}")
        version = self._integer("cuDriverGetVersion")
        driver = f"{version // 1000}.{version % 1000 // 10}"
        return tuple(self._gpu(index, driver) for index in range(self._integer("cuDeviceGetCount")))

    def _gpu(self, index: int, driver: str) -> Gpu:
        device = self._integer("cuDeviceGet", index)
        name, memory = ctypes.create_string_buffer(256), _size()
        self.call("cuDeviceGetName", name, len(name), device)
        self.call("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        major, minor = (
            self._integer("cuDeviceGetAttribute", attribute, device)
            for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR)
        )
        return Gpu(name.value.decode(errors="replace"), (major, minor), memory.value, driver)

    def use_first_gpu(self) -> None:
        """Use the primary context of the first GPU, and make it current in the calling thread.

        Raises:
            EngineError: there is no GPU, or it does not work.
        """
        self.call("cuInit", 0)
        if not self._context:
            self._context = self._made("cuDevicePrimaryCtxRetain", self._integer("cuDeviceGet", 0))
        self.bind()

    def bind(self) -> None:
        """Make the context of `use_first_gpu` current in the calling thread; cheap if it already is.

        Raises:
            EngineError: the driver reports an error.
        """
        self.call("cuCtxSetCurrent", self._context)

    def allocate(self, size: int) -> DevicePointer:
        """Allocate GPU memory, 256-byte aligned.

        Raises:
            EngineError: there is not enough memory.
        """
        pointer = _device_pointer()
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), size)
        return pointer.value

    def free(self, pointer: DevicePointer) -> None:
        """Free memory from `allocate`; waits for the work that uses it."""
        self._give_back("cuMemFree_v2", pointer)

    def allocate_pinned(self, size: int) -> int:
        """Allocate pinned host memory, for asynchronous copies; returns its address."""
        return self._made("cuMemAllocHost_v2", size)

    def free_pinned(self, address: int) -> None:
        """Free memory from `allocate_pinned`."""
        self._give_back("cuMemFreeHost", address)

    def upload(self, target: DevicePointer, source: int, size: int, stream: Handle) -> None:
        """Queue a copy of `size` bytes from pinned host memory."""
        self.call("cuMemcpyHtoDAsync_v2", target, source, size, stream)

    def download(self, target: int, source: DevicePointer, size: int, stream: Handle) -> None:
        """Queue a copy of `size` bytes into pinned host memory."""
        self.call("cuMemcpyDtoHAsync_v2", target, source, size, stream)

    def copy(self, target: DevicePointer, source: DevicePointer, size: int, stream: Handle) -> None:
        """Queue a copy of `size` bytes on the GPU."""
        self.call("cuMemcpyDtoDAsync_v2", target, source, size, stream)

    def clear(self, target: DevicePointer, size: int, stream: Handle) -> None:
        """Queue setting `size` bytes to zero."""
        self.call("cuMemsetD8Async", target, 0, size, stream)

    def load_kernel(self, ptx: str, name: str) -> Handle:
        """Compile the text of a kernel for the GPU; it stays loaded as long as the process runs.

        Raises:
            EngineError: the driver rejects it.
        """
        module = self._made("cuModuleLoadDataEx", ptx.encode(), 0, None, None)
        return self._made("cuModuleGetFunction", module, name.encode())

    def launch_kernel(
        self, function: Handle, grid: tuple[int, int, int], threads: int, arguments: Sequence[Any], stream: Handle
    ) -> None:
        """Queue a kernel from `load_kernel`; each argument is a value of `ctypes` with the type of the parameter."""
        # The driver takes the address of each, and copies the values.
        addresses = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
        self.call("cuLaunchKernel", function, *grid, threads, 1, 1, 0, stream, addresses, None)

    def create_stream(self) -> Handle:
        """Create a stream that does not wait for the default one."""
        return self._made("cuStreamCreate", _NON_BLOCKING)

    def destroy_stream(self, stream: Handle) -> None:
        """Destroy a stream."""
        self._give_back("cuStreamDestroy_v2", stream)

    def synchronize(self, stream: Handle) -> None:
        """Wait until all queued work is done."""
        self.call("cuStreamSynchronize", stream)

    def begin_capture(self, stream: Handle) -> None:
        """Record work queued from now on instead of running it."""
        self.call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)

    def end_capture(self, stream: Handle) -> Handle:
        """Return the work recorded since `begin_capture`, ready to launch."""
        graph = self._made("cuStreamEndCapture", leading=(stream,))
        try:
            return self._made("cuGraphInstantiateWithFlags", graph, 0)
        finally:
            self.call("cuGraphDestroy", graph)

    def abandon_capture(self, stream: Handle) -> None:
        """End a failed capture, so that the stream can be used again."""
        self.call("cuGraphDestroy", self._made("cuStreamEndCapture", leading=(stream,)))

    def launch(self, graph: Handle, stream: Handle) -> None:
        """Queue a recorded graph."""
        self.call("cuGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Handle) -> None:
        """Destroy a graph from `end_capture`."""
        self._give_back("cuGraphExecDestroy", graph)

    def record(self, stream: Handle) -> Handle:
        """Record an event that completes when all work queued so far is done."""
        event = self._made("cuEventCreate", _NO_TIMING)
        self.call("cuEventRecord", event, stream)
        return event

    def wait(self, event: Handle) -> None:
        """Wait for an event from `record`, and destroy it."""
        self.call("cuEventSynchronize", event)
        self.forget(event)

    def forget(self, event: Handle) -> None:
        """Destroy an event from `record`."""
        self._give_back("cuEventDestroy_v2", event)

    def _give_back(self, name: str, what: int) -> None:
        self.bind()
        self.call(name, what)

    def _integer(self, name: str, *arguments: Any) -> int:
        found = _int()
        self.call(name, ctypes.byref(found), *arguments)
        return found.value

    def _made(self, name: str, *arguments: Any, leading: tuple[Any, ...] = ()) -> Handle:
        handle = _handle()
        self.call(name, *leading, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def _describe(self, code: int) -> str:
        text = ctypes.c_char_p()
        known = self._library.cuGetErrorString(code, ctypes.byref(text)) == 0 and text.value is not None
        return f"{text.value.decode(errors='replace')} (error {code})" if known and text.value else f"error {code}"


def load_driver() -> CudaDriver:
    """Load the driver of this machine.

    Raises:
        EngineError: there is no driver.
    """
    try:
        return CudaDriver(ctypes.CDLL(_LIBRARY))
    except (OSError, AttributeError) as error:
        raise EngineError(f"there is no NVIDIA driver of CUDA 12 or newer ({_LIBRARY} cannot be loaded)") from error


@functools.cache
def find_gpus() -> tuple[tuple[Gpu, ...], str]:
    """All GPUs of this machine, and if there is none, the reason; queried once per process."""
    try:
        gpus = load_driver().gpus()
    except EngineError as error:
        return (), str(error)
    return gpus, "" if gpus else "the NVIDIA driver sees no GPU"
