"""Runs kernels on a GPU, on torch tensors and torch's current stream, through the CUDA driver API.

A CUDA graph records launches like any other work. The first launch loads the kernel, so it must come before a capture.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.dispatch import stand_in
from lfdm_export.ops.cuda.nvrtc import compile_ptx
from lfdm_export.ops.cuda.source import Kernel, Launch, Storage

STORAGES: dict[torch.dtype, Storage] = {
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# Alignment in bytes, of the widest access of a kernel.
_ALIGNMENT = 16
# Options of cuModuleLoadDataEx. Source: CUDA driver API, CUjit_option.
_ERROR_LOG, _ERROR_LOG_SIZE = 5, 6
_LOG_BYTES = 8192


def launch(kernel: Kernel, plan: Launch[int], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    """Launch a kernel on the current stream of its tensors' GPU; for host tensors, the stand-in runs it.

    Args:
        kernel: kernel to run.
        plan: its grid and scalars.
        inputs: tensors on one GPU with the memory layout that the kernel expects, aligned to 16 bytes.
        outputs: likewise; they are written.

    Raises:
        EngineError: NVRTC or the driver fails, or the tensors are on the host without a stand-in.
    """
    tensors = (*inputs, *outputs)
    assert (len(inputs), len(outputs)) == kernel.pointers
    assert len(plan.scalars) == kernel.scalars
    assert all(map(is_aligned, tensors))
    device = tensors[0].device
    assert all(tensor.device == device for tensor in tensors)
    if device.type != "cuda":
        _run_on_host(kernel, plan, inputs, outputs)
        return
    values = [
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in inputs),
        *map(ctypes.c_int32, plan.scalars),
        *(ctypes.c_void_p(tensor.data_ptr()) for tensor in outputs),
    ]
    # The driver takes the address of each parameter.
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    with torch.cuda.device(device):
        stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
        function = _load(kernel, device.index)
        threads = (kernel.threads, 1, 1)
        _call("cuLaunchKernel", function, *map(ctypes.c_uint, (*plan.grid, *threads, 0)), stream, addresses, None)


def is_aligned(tensor: Tensor) -> bool:
    """Whether a tensor's address has the alignment that `launch` needs."""
    return tensor.data_ptr() % _ALIGNMENT == 0


def dense(tensor: Tensor, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
    """The tensor in that memory format, aligned to 16 bytes, which a view of another tensor may not be."""
    laid_out = tensor.contiguous(memory_format=memory_format)
    return laid_out if is_aligned(laid_out) else laid_out.clone(memory_format=memory_format)


def _run_on_host(kernel: Kernel, plan: Launch[int], inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
    kernels = stand_in()
    if kernels is None:
        raise EngineError(
            f"the kernel {kernel.name} was given tensors on {inputs[0].device}, expected a GPU's; "
            "move them to one, or call the operator, which needs no kernel on the host"
        )
    kernels.run(kernel.name, plan, [t.data_ptr() for t in inputs], [t.data_ptr() for t in outputs])


@functools.cache
def _load(kernel: Kernel, device: int) -> ctypes.c_void_p:
    """Load the kernel into the primary context of a GPU, which torch has made current."""
    log = ctypes.create_string_buffer(_LOG_BYTES)
    options = (ctypes.c_int * 2)(_ERROR_LOG, _ERROR_LOG_SIZE)
    values = (ctypes.c_void_p * 2)(ctypes.addressof(log), _LOG_BYTES)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    image = compile_ptx(kernel).encode()
    try:
        _call("cuModuleLoadDataEx", ctypes.byref(module), image, ctypes.c_uint(2), options, values)
    except EngineError as error:
        raise EngineError(
            f"GPU {device} cannot load {kernel.name}: {error} {log.value.decode(errors='replace')}"
        ) from None
    _call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
    return function


def _call(name: str, *arguments: Any) -> None:
    driver = _driver()
    code = getattr(driver, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver.cuGetErrorString(code, ctypes.byref(text))
        raise EngineError(f"the CUDA driver failed in {name}: {(text.value or b'').decode()} (error {code})")


@functools.cache
def _driver() -> Any:
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise EngineError(f"CUDA kernels need NVIDIA's driver, which is not available: {error}") from error
