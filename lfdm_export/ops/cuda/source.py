"""The description of a kernel: its name, the text that defines it, and its launch.

Kernels are templates in `.cuh` files, with macros that define one entry each. A `Kernel` names one such entry. NVRTC,
the host build and the TensorRT plugins all use it, so they cannot differ in what they build.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

#: Folder of the kernel files; their includes are relative to it.
ROOT = Path(__file__).resolve().parents[1]
#: Storage of a tensor's values; arithmetic is float32.
Storage = Literal["float32", "float16", "bfloat16"]
SHORT_NAMES: dict[Storage, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
ITEM_SIZES: dict[Storage, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

#: The oldest architecture that TensorRT 11 and CUDA 13 support; drivers compile its PTX for every later one.
OLDEST = "compute_75"


@dataclass(frozen=True)
class Kernel:
    """One kernel entry.

    Attributes:
        name: name of the `extern "C"` function.
        header: file of its macro, relative to `ROOT`.
        definition: use of the macro.
        threads: threads per block.
        pointers: number of inputs and of outputs; the int32 scalars are between them.
        scalars: number of int32 scalars.
        architecture: the oldest virtual architecture that has its instructions.
    """

    name: str
    header: str
    definition: str
    threads: int
    pointers: tuple[int, int]
    scalars: int
    architecture: str = OLDEST

    @property
    def text(self) -> str:
        """The whole program, for a compiler that finds `headers`."""
        return program([self])


Size = TypeVar("Size")


@dataclass(frozen=True)
class Launch(Generic[Size]):
    """One launch of a kernel; sizes are integers, or symbolic in a TensorRT plugin.

    Attributes:
        grid: blocks along x, y and z.
        scalars: in the order of the kernel's parameters.
    """

    grid: tuple[int | Size, int | Size, int | Size]
    scalars: tuple[int | Size, ...]


def program(kernels: Sequence[Kernel]) -> str:
    """A translation unit that defines these kernels."""
    headers = dict.fromkeys(kernel.header for kernel in kernels)
    return "".join(
        [*(f'#include "{header}"\n' for header in headers), *(f"{kernel.definition}\n" for kernel in kernels)]
    )


def headers(kernel: Kernel) -> dict[str, str]:
    """Texts of all files that a kernel includes, by their names in the includes."""
    texts: dict[str, str] = {}
    names = [kernel.header]
    while names:
        name = names.pop()
        texts[name] = (ROOT / name).read_text(encoding="utf-8")
        names += re.findall(r'^#include "(.+)"$', texts[name], re.MULTILINE)
    return texts
