"""Returning the memory of past requests to the system; glibc's allocator would keep it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from lfdm_models.memory import ARENA_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD, return_free_memory, set_allocator

#: Blocks of at least this many bytes are mapped one by one, and unmapped when freed: large pictures, but not clips of
#: the published size (2 MB), whose pages would cost more time than everything else that the front does (4 of 7 ms).
#: With 8 MB, 2,000 hostile requests left the front 21 MB larger, not 11.
_LARGE = 3 << 20
#: Free bytes at the end of a heap that `give_back` alone returns.
_KEPT = 16 << 20
#: Bytes of requests between two checks after which small blocks are returned.
_MANY = 256 << 10
#: Seconds between two checks.
_LOOK = 1.0


def share_heap() -> None:
    """Let all threads that are started from now on share the heaps there are; only glibc has one per thread.

    With a heap per thread, 2,000 hostile requests left the front 12 MB larger: each thread kept its own free blocks.
    """
    set_allocator(ARENA_MAX, 1)


def map_large_blocks() -> None:
    """Map this process's largest blocks one by one."""
    # Setting either turns off the dynamic adjustment of both.
    set_allocator(MMAP_THRESHOLD, _LARGE)
    set_allocator(TRIM_THRESHOLD, _KEPT)


async def give_back(bytes_read: Callable[[], int]) -> None:
    """Return small blocks too, while requests use many bytes and once after that.

    Args:
        bytes_read: returns the total bytes of all requests so far.
    """
    seen, quiet = bytes_read(), True
    while True:
        await asyncio.sleep(_LOOK)
        read = bytes_read()
        if read - seen > _MANY or not quiet:  # once more when requests pause: gRPC frees later than the front
            quiet = read == seen
            await asyncio.to_thread(return_free_memory)
        seen = read
