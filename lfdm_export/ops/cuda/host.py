"""The host build: the same kernels through a C++ compiler, to test their arithmetic without a GPU.

Blocks of a grid run one after the other, and so do threads of a block between barriers. It is too slow for real work.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.source import ROOT, Kernel, Launch, program

#: As on the GPU, multiplications and additions are not contracted. Unrolling uses CUDA's own pragmas.
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
#: Orders in which a block's threads can run, defined in `shim.cuh`.
THREAD_ORDERS = (0, 1, 2)

_LAUNCH = """
extern "C" void lfdm_launch(int x, int y, int z, int blocks_x, int order) {
    lfdm::launch() = {x, y, z, blocks_x, order};
}
"""


class HostKernels:
    """Kernels that are built for the host."""

    def __init__(self, library: Path, kernels: Sequence[Kernel]) -> None:
        """Load the library that `build` made of these kernels."""
        self._library = ctypes.CDLL(str(library))
        self._kernels = {kernel.name: kernel for kernel in kernels}

    def kernel(self, name: str) -> Kernel:
        """The description of a kernel.

        Raises:
            KeyError: the kernel was not built.
        """
        return self._kernels[name]

    def run(
        self, name: str, launch: Launch[int], inputs: Sequence[int], outputs: Sequence[int], order: int = 0
    ) -> None:
        """Run a kernel's whole grid.

        Args:
            name: name of the kernel.
            launch: its grid and scalars.
            inputs: addresses of the inputs.
            outputs: addresses of the outputs.
            order: order of a block's threads, one of `THREAD_ORDERS`.

        Raises:
            KeyError: the kernel was not built.
        """
        kernel = self._kernels[name]
        assert (len(inputs), len(outputs)) == kernel.pointers
        assert len(launch.scalars) == kernel.scalars
        function = getattr(self._library, name)
        function.restype = None
        arguments = [
            *map(ctypes.c_void_p, inputs),
            *map(ctypes.c_int32, launch.scalars),
            *map(ctypes.c_void_p, outputs),
        ]
        for z, y, x in itertools.product(*(range(size) for size in reversed(launch.grid))):
            self._library.lfdm_launch(x, y, z, launch.grid[0], order)
            function(*arguments)


def build(kernels: Sequence[Kernel], library: Path, *, flags: Sequence[str] = (), main: str = "") -> Path:
    """Compile kernels for the host.

    Args:
        kernels: kernels to build.
        library: output file: a shared library, or a program if `main` is given.
        flags: further compiler flags.
        main: C++ text appended to the kernels.

    Returns:
        `library`.

    Raises:
        EngineError: no C++ compiler is available, or it fails.
    """
    compiler = find_compiler()
    source = library.with_suffix(".cpp")
    source.write_text(program(kernels) + _LAUNCH + main, encoding="utf-8")
    kind = () if main else ("-shared", "-fPIC")
    command = [compiler, *FLAGS, *flags, *kind, f"-I{ROOT}", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"{compiler} cannot compile the kernels: {done.stderr.strip()}")
    return library


def find_compiler() -> str:
    """Find a C++17 compiler: the one in the variable CXX, else g++, clang++ or c++.

    Raises:
        EngineError: none is available.
    """
    named = os.environ.get("CXX")
    for name in (named,) if named else ("g++", "clang++", "c++"):
        found = shutil.which(name)
        if found is not None:
            return found
    raise EngineError(
        f"building kernels for the host needs a C++17 compiler, found no {named or 'g++, clang++ or c++'}; "
        "install one (Debian: apt-get install g++), or name it in CXX"
    )
