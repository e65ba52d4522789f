"""What a kernel is: a name, the text that defines it, and how it is launched.

Kernels lie in `.cuh` files, as templates with macros that define one entry each. A `Kernel` names one such entry;
NVRTC, the host build and the TensorRT plugins all start from it, so that they cannot mean different things by it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

#: Folder that includes in kernel files are relative to.
ROOT = Path(__file__).resolve().parents[1]
#: Storage of a tensor's values; arithmetic is float32.
Storage = Literal["float32", "float16", "bfloat16"]
SHORT_NAMES: dict[Storage, str] = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
ITEM_SIZES: dict[Storage, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

#: The oldest architecture that TensorRT 11 and CUDA 13 still serve; drivers compile its PTX for every later one.
OLDEST = "compute_75"


@dataclass(frozen=True)
class Kernel:
    """One entry.

    Attributes:
        name: of the `extern "C"` function.
        header: the file that its macro is in, below `ROOT`.
        definition: use of the macro.
        threads: of a block.
        pointers: how many inputs and outputs it takes; the int32 scalars stand between them.
        scalars: how many int32 scalars.
        architecture: the oldest virtual one that has its instructions.
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
        """The whole program for a compiler that finds `headers`."""
        return program([self])


Size = TypeVar("Size")


@dataclass(frozen=True)
class Launch(Generic[Size]):
    """One run of a kernel; sizes are integers, or a TensorRT plugin's symbolic ones.

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
    """Texts of the files that a kernel includes, by the names by which it does."""
    texts: dict[str, str] = {}
    names = [kernel.header]
    while names:
        name = names.pop()
        texts[name] = (ROOT / name).read_text(encoding="utf-8")
        names += re.findall(r'^#include "(.+)"$', texts[name], re.MULTILINE)
    return texts
