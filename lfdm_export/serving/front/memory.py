"""Memory that requests took goes back to the system: glibc's allocator would keep it for the next ones."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Callable

# Source: mallopt(3), malloc_trim(3); M_MMAP_THRESHOLD, which once set is not adjusted to what is freed.
_MMAP_THRESHOLD = -3
#: Blocks of so many bytes are mapped one by one, and unmapped when they are freed.
_LARGE = 256 << 10
#: Seconds between two looks.
_LOOK = 1.0


def map_large_blocks() -> None:
    """Have this process's large blocks mapped one by one; does nothing where the C library is another one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, _LARGE)


async def give_back(bytes_read: Callable[[], int]) -> None:
    """Give small blocks back too, while requests take many bytes and once after that.

    Args:
        bytes_read: of all requests up to now.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    seen, quiet = bytes_read(), True
    while trim is not None:
        await asyncio.sleep(_LOOK)
        read = bytes_read()
        if read - seen > _LARGE or not quiet:  # once more when it is quiet again: gRPC frees later than we do
            quiet = read == seen
            await asyncio.to_thread(trim, 0)
        seen = read
