"""What glibc's allocator does with freed memory; nothing here has an effect with another C library."""

from __future__ import annotations

import ctypes

# Source: mallopt(3), malloc_trim(3).
TRIM_THRESHOLD, TOP_PAD, MMAP_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -2, -3, -4, -8
_NEVER = 2**31 - 1
#: Bytes by which the heap grows at least.
_STEP = 64 << 20
_C = ctypes.CDLL(None)


def set_allocator(option: int, value: int) -> None:
    """Set an option of this process's allocator, one of the constants above."""
    mallopt = getattr(_C, "mallopt", None)
    if mallopt is not None:
        mallopt(option, value)


def return_free_memory() -> None:
    """Return what is free to the system; it takes some milliseconds, in which other threads run."""
    trim = getattr(_C, "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Let this process keep freed memory, however large the block.

    By default glibc maps large blocks one by one, and unmaps them when they are freed. PyTorch on a CPU allocates all
    activations anew in every step, so each time the system has to clear their pages: about a third of a step of
    training. For processes that run PyTorch until they end: the system gets nothing back before.
    """
    set_allocator(MMAP_MAX, 0)
    set_allocator(TRIM_THRESHOLD, _NEVER)
    set_allocator(TOP_PAD, _STEP)
