"""Keeping the memory of freed tensors for the next ones, on a CPU."""

from __future__ import annotations

import ctypes

# Source: mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
#: Bytes by which the heap grows at least.
_STEP = 64 << 20


def keep_freed_memory() -> None:
    """Let this process keep freed memory, however large the block; does nothing with a C library other than glibc.

    By default glibc maps large blocks one by one, and unmaps them when they are freed. PyTorch on a CPU allocates all
    activations anew in every step, so each time the system has to clear their pages: about a third of a step of
    training. For processes that run PyTorch until they end: the system gets nothing back before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)
        mallopt(_TOP_PAD, _STEP)
