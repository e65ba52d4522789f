"""CUDA C++ to PTX with NVRTC, NVIDIA's run-time compiler; needs neither a GPU nor a CUDA toolkit.

The library comes from the pip package `nvidia-cuda-nvrtc-cu12` (extra `kernels`), from the package that torch's CUDA
builds install, or from an installed toolkit. Older compilers are preferred: TensorRT and the driver reject PTX that is
newer than they are, and these kernels need no new features.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.source import Kernel, headers

#: No contraction and IEEE division, as `shim.cuh` promises.
OPTIONS = ("--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true")

_PACKAGES = ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc-cu11", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu13")
_SONAMES = (
    ("nvrtc64_120_0.dll", "nvrtc64_130_0.dll")
    if sys.platform == "win32"
    else ("libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so")
)


@functools.cache
def compile_ptx(kernel: Kernel) -> str:
    """The kernel's PTX, for its architecture and every later one.

    Args:
        kernel: kernel to compile.

    Raises:
        EngineError: NVRTC is not available, or fails.
    """
    ptx = _compile(kernel, kernel.architecture, "PTX")
    return ptx.rstrip(b"\0").decode()


def compile_cubin(kernel: Kernel, architecture: str) -> bytes:
    """The kernel's machine code for a real architecture, such as "sm_90"; shows that the assembler accepts the PTX.

    Raises:
        EngineError: NVRTC is not available, or fails.
    """
    return _compile(kernel, architecture, "CUBIN")


def version() -> tuple[int, int]:
    """Major and minor version of the compiler.

    Raises:
        EngineError: NVRTC is not available.
    """
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check("nvrtcVersion", _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def _compile(kernel: Kernel, architecture: str, form: str) -> bytes:
    # NVRTC 12.4 leaves its calling thread's locale at "C", in which open() reads ASCII, so it runs in its own thread.
    with ThreadPoolExecutor(1) as compiler:
        return compiler.submit(_compile_here, kernel, architecture, form).result()


def _compile_here(kernel: Kernel, architecture: str, form: str) -> bytes:
    library, program = _library(), ctypes.c_void_p()
    included = headers(kernel)
    texts, names = _strings(list(included.values())), _strings(list(included))
    text, name = kernel.text.encode(), f"{kernel.name}.cu".encode()
    created = library.nvrtcCreateProgram(ctypes.byref(program), text, name, len(included), texts, names)
    _check("nvrtcCreateProgram", created)
    try:
        options = (f"--gpu-architecture={architecture}", *OPTIONS)
        if library.nvrtcCompileProgram(program, len(options), _strings(options)):
            log = _get(library, program, "ProgramLog").rstrip(b"\0").decode(errors="replace").strip()
            raise EngineError(f"NVRTC {'.'.join(map(str, version()))} cannot compile {kernel.name}: {log}")
        return _get(library, program, form)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _get(library: Any, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(f"nvrtcGet{what}Size", getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(f"nvrtcGet{what}", getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _strings(texts: Sequence[str]) -> Any:
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts))


def _check(function: str, code: int) -> None:
    if code:
        library = _library()
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise EngineError(f"NVRTC failed in {function}: {library.nvrtcGetErrorString(code).decode()}")


@functools.cache
def _library() -> Any:
    errors = []
    for path in _candidates():
        try:
            return ctypes.CDLL(path)
        except OSError as error:
            errors.append(str(error))
    raise EngineError(
        f"CUDA kernels need NVRTC, which is not available ({'; '.join(errors)}); "
        "install it with: pip install 'lfdm-export[kernels]'"
    )


def _candidates() -> Iterator[str]:
    for package in _PACKAGES:
        try:
            files = importlib.metadata.distribution(package).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name.startswith(("libnvrtc.so", "nvrtc64_")) and ".alt." not in file.name:
                yield str(file.locate())
    yield from _SONAMES
    compiler = shutil.which("nvcc")
    if compiler is not None:
        yield str(Path(compiler).resolve().parents[1] / "lib64" / "libnvrtc.so")
