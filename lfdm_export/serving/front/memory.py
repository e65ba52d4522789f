"""Returning the memory of past requests to the system; glibc's allocator would keep it."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

# Source: mallopt(3), malloc_trim(3); setting M_MMAP_THRESHOLD turns off its dynamic adjustment.
_MMAP_THRESHOLD = -3
#: Blocks of at least this many bytes are mapped one by one, and unmapped when freed.
_LARGE = 256 << 10
#: Seconds between two checks.
_LOOK = 1.0


def map_large_blocks() -> None:
    """Map this process's large blocks one by one; does nothing with a C library other than glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)


async def give_back(bytes_read: Callable[[], int]) -> None:
    """Return small blocks too, while requests use many bytes and once after that.

    Args:
        bytes_read: returns the total bytes of all requests so far.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    seen, quiet = bytes_read(), True
    while trim is not None:
        await asyncio.sleep(_LOOK)
        read = bytes_read()
        if read - seen > _LARGE or not quiet:  # once more when requests pause: gRPC frees later than the front
            quiet = read == seen
            await asyncio.to_thread(trim, 0)
        seen = read
