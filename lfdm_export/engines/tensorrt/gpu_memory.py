"""Memory of the GPU and of the host that copies run between, given back when nobody holds it any more."""

from __future__ import annotations

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from lfdm_export.engines.cuda_driver import CudaDriver, DevicePointer, Handle
from lfdm_export.errors import EngineError


class DeviceBuffer:
    """Bytes on the GPU."""

    def __init__(self, driver: CudaDriver, size: int) -> None:
        """Take them.

        Raises:
            EngineError: there are not enough.
        """
        self.size = size
        self.pointer: DevicePointer = driver.allocate(max(size, 1))
        self._release = weakref.finalize(self, quietly, driver.free, self.pointer)
        self._release.atexit = False  # the driver may be gone by then, and gives all back itself


class PinnedArray:
    """An array in memory of the host that copies run from and to by themselves.

    Attributes:
        array: what is in it; not to be kept beyond this object.
    """

    def __init__(self, driver: CudaDriver, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        """Take the memory.

        Raises:
            EngineError: there is not enough.
        """
        size = byte_count(shape, dtype)
        self.address = driver.allocate_pinned(max(size, 1))
        self._release = weakref.finalize(self, quietly, driver.free_pinned, self.address)
        self._release.atexit = False
        raw = (ctypes.c_ubyte * size).from_address(self.address)
        self.array: NDArray[Any] = np.ndarray(shape, dtype, memoryview(raw))

    @property
    def size(self) -> int:
        """Bytes."""
        return self.array.nbytes


class PinnedRing:
    """Pinned arrays of one shape, taken in turn, so that a copy runs while the next array is filled.

    No more is waited for than the copy that last ran from the array whose turn it is.
    """

    def __init__(self, driver: CudaDriver, shape: tuple[int, ...], dtype: DTypeLike, slots: int) -> None:
        """Take the memory of all slots.

        Raises:
            EngineError: there is not enough.
        """
        self._driver = driver
        self._arrays = [PinnedArray(driver, shape, dtype) for _ in range(slots)]
        self._busy: list[Handle | None] = [None] * slots
        self._turn = 0

    @property
    def slots(self) -> int:
        """How many arrays there are."""
        return len(self._arrays)

    def settle(self) -> None:
        """The stream was waited for: no array is busy any more."""
        for turn, busy in enumerate(self._busy):
            if busy is not None:
                self._busy[turn] = None
                self._driver.forget(busy)

    def upload(self, target: DevicePointer, values: NDArray[Any], stream: Handle) -> None:
        """Queue a copy of `values`, which may be changed as soon as this returns."""
        slot, busy = self._arrays[self._turn], self._busy[self._turn]
        if busy is not None:
            self._busy[self._turn] = None
            self._driver.wait(busy)
        slot.array[...] = values
        self._driver.upload(target, slot.address, slot.size, stream)
        self._busy[self._turn] = self._driver.record(stream)
        self._turn = (self._turn + 1) % len(self._arrays)


def byte_count(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Bytes of an array."""
    return np.dtype(dtype).itemsize * math.prod(shape)


def quietly(release: Callable[[int], None], address: int) -> None:
    """Give something back while an error is on its way, or the driver may be gone."""
    with contextlib.suppress(EngineError):
        release(address)
