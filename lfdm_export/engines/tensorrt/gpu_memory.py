"""GPU memory and pinned host memory, freed when no object uses it any more."""

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
        """Allocate them.

        Raises:
            EngineError: there is not enough memory.
        """
        self.size = size
        self.pointer: DevicePointer = driver.allocate(max(size, 1))
        self._release = weakref.finalize(self, quietly, driver.free, self.pointer)
        self._release.atexit = False  # the driver may be gone by then, and frees everything itself


class PinnedArray:
    """An array in pinned host memory, for asynchronous copies.

    Attributes:
        array: its content; do not use it after this object is gone.
    """

    def __init__(self, driver: CudaDriver, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        """Allocate the memory.

        Raises:
            EngineError: there is not enough memory.
        """
        size = byte_count(shape, dtype)
        self.address = driver.allocate_pinned(max(size, 1))
        self._release = weakref.finalize(self, quietly, driver.free_pinned, self.address)
        self._release.atexit = False
        raw = (ctypes.c_ubyte * size).from_address(self.address)
        self.array: NDArray[Any] = np.ndarray(shape, dtype, memoryview(raw))

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.array.nbytes


def staged(
    held: dict[str, PinnedArray], driver: CudaDriver, name: str, shape: tuple[int, ...], dtype: DTypeLike
) -> PinnedArray:
    """The array of this name in `held`; made again when its shape changes."""
    found = held.get(name)
    if found is None or found.array.shape != shape:
        found = held[name] = PinnedArray(driver, shape, dtype)
    return found


class PinnedRing:
    """Pinned arrays of one shape, used in turn, so that a copy runs while the next array is filled.

    It waits only for the last copy from the array whose turn it is.
    """

    def __init__(self, driver: CudaDriver, shape: tuple[int, ...], dtype: DTypeLike, slots: int) -> None:
        """Allocate the memory of all slots.

        Raises:
            EngineError: there is not enough memory.
        """
        self._driver = driver
        self._arrays = [PinnedArray(driver, shape, dtype) for _ in range(slots)]
        self._busy: list[Handle | None] = [None] * slots
        self._turn = 0

    @property
    def slots(self) -> int:
        """Number of arrays."""
        return len(self._arrays)

    def settle(self) -> None:
        """Record that the stream is idle: no array is in use any more."""
        for turn, busy in enumerate(self._busy):
            if busy is not None:
                self._busy[turn] = None
                self._driver.forget(busy)

    def upload(self, target: DevicePointer, values: NDArray[Any], stream: Handle) -> None:
        """Queue a copy of `values`, which may change as soon as this returns."""
        slot, busy = self._arrays[self._turn], self._busy[self._turn]
        if busy is not None:
            self._busy[self._turn] = None
            self._driver.wait(busy)
        slot.array[...] = values
        self._driver.upload(target, slot.address, slot.size, stream)
        self._busy[self._turn] = self._driver.record(stream)
        self._turn = (self._turn + 1) % len(self._arrays)


class PinnedPool:
    """Pinned memory for copies of any size: per power of two of bytes two blocks, used in turn."""

    def __init__(self, driver: CudaDriver) -> None:
        """Start without memory."""
        self._driver = driver
        self._blocks: dict[int, list[PinnedArray]] = {}
        self._busy: dict[int, Handle] = {}

    def upload(self, target: DevicePointer, values: NDArray[Any], stream: Handle) -> None:
        """Queue a copy of `values`, which may change as soon as this returns.

        Raises:
            EngineError: there is not enough memory.
        """
        block = self._turn(values.nbytes)
        block.array[: values.nbytes] = np.frombuffer(np.ascontiguousarray(values), np.uint8)
        self._driver.upload(target, block.address, values.nbytes, stream)
        self._busy[block.address] = self._driver.record(stream)

    def download(self, source: DevicePointer, size: int, stream: Handle) -> NDArray[np.uint8]:
        """Queue a copy of `size` bytes; the result is valid when the stream is done, until the next copy but one."""
        block = self._turn(size)
        self._driver.download(block.address, source, size, stream)
        self._busy[block.address] = self._driver.record(stream)
        return block.array[:size]

    def _turn(self, size: int) -> PinnedArray:
        capacity = 1 << max(0, size - 1).bit_length()
        blocks = self._blocks.setdefault(capacity, [])
        block = PinnedArray(self._driver, (capacity,), np.uint8) if len(blocks) < 2 else blocks.pop(0)
        blocks.append(block)
        busy = self._busy.pop(block.address, None)
        if busy is not None:
            self._driver.wait(busy)
        return block


def byte_count(shape: tuple[int, ...], dtype: DTypeLike) -> int:
    """Size of an array in bytes."""
    return np.dtype(dtype).itemsize * math.prod(shape)


def quietly(release: Callable[[int], None], address: int) -> None:
    """Release something during an error, or when the driver may be gone."""
    with contextlib.suppress(EngineError):
        release(address)
