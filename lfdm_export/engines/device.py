"""What a backend offers so that whole clips stay on its device: memory, copies, programs. NumPy only.

`lfdm_export.engines.device_batch` and `device_chain` are made of this alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from lfdm_export.engines.checks import Array
from lfdm_export.errors import EngineError

#: The stage `decode` with 8-bit pictures (B, F, H, W, 3) as outputs.
PICTURES = "pictures"


class DeviceMemoryError(EngineError):
    """The device has not enough memory."""


class DeviceArray(Protocol):
    """An array on a device. Parts of its first axis are arrays in the same memory."""

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""

    def __getitem__(self, part: Any, /) -> Any:
        """The element or the slice of the first axis."""


A = TypeVar("A", bound=DeviceArray)
T = TypeVar("T")
H = TypeVar("H")


@dataclass(frozen=True)
class Layout:
    """How many frames a run of `decode` takes.

    Attributes:
        rows: samples of the run, all of the same clip.
        frames: frames per sample.
    """

    rows: int
    frames: int


class Device(Protocol[A]):
    """One device with the stages of a bundle. Everything is queued in order; only `download` and `wait` wait.

    Any thread may use it, one at a time: hold `owned` around every other call.
    """

    def owned(self) -> AbstractContextManager[None]:
        """Keep other threads out."""

    def zeros(self, shape: Sequence[int], dtype: str) -> A:
        """New memory, filled with zeros; see `DeviceMemoryError`."""

    def results(self, stage: str, batch: int) -> dict[str, A]:
        """New memory for the outputs of a stage, by name, as the stage stores them."""

    def upload(self, target: A, values: Array) -> None:
        """Copy from the host; `values` may change as soon as this returns."""

    def download(self, sources: Sequence[A]) -> list[Array]:
        """Wait for all queued work; return copies of the arrays."""

    def copy(self, target: A, source: A) -> None:
        """Copy between arrays of one shape."""

    def clear(self, target: A) -> None:
        """Fill with zeros."""

    def draw(self, noise: A, seeds: A, steps: A) -> None:
        """Fill noise (B, 3, T, h, w) with the values of `noise_for` for seeds (B,) and steps (B,), both int64."""

    def flag_not_finite(self, values: A, flag: A) -> None:
        """Set the flag, (1,) int32, to 1 if a value is not finite; else it stays."""

    def program(
        self, stage: str, inputs: Mapping[str, A], outputs: Mapping[str, A], flag: A | None = None
    ) -> Callable[[], None]:
        """Prepare a stage, or `PICTURES`, for memory that stays: each call of the result queues one run.

        Args:
            stage: its name.
            inputs: all inputs, by name.
            outputs: the outputs, by name. One may be the memory of an input: it is written when the stage is done.
            flag: for `PICTURES`, set to 1 if a picture has a value that is not finite, where the backend can tell.

        Raises:
            EngineError: the stage cannot be prepared; `DeviceMemoryError` if memory is lacking.
        """

    def mark(self) -> Callable[[], None]:
        """A function that waits for the work queued until now."""

    def layouts(self, frames: int) -> Sequence[Layout]:
        """The possible runs of `decode` for a clip of that many frames, the largest first."""


class Pool(Generic[T]):
    """Memory that is used again: allocating on a GPU is slow, and freeing waits for all work."""

    def __init__(self, make: Callable[[], T]) -> None:
        """Use a function that makes new memory."""
        self._make = make
        self._free: list[T] = []

    def take(self) -> T:
        """Free memory, else new memory; its content is arbitrary."""
        try:
            return self._free.pop()
        except IndexError:
            return self._make()

    def lend(self, holder: H, memory: T) -> H:
        """Return the holder; when nothing refers to it any more, its memory is free again."""
        weakref.finalize(holder, self._free.append, memory).atexit = False
        return holder
