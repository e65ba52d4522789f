"""The shared memory of servers: private, and removed by the next server once its owner has ended.

Each server's regions begin with their own prefix. The owner holds a lock on a file with that prefix, which the system
releases however the process ends. Process ids would not work: a container that shares /dev/shm has other ids.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = Path("/dev/shm")
#: Prefix of the names of all servers' regions; lfdm-serve's process id follows, for readers of a listing.
_PREFIX = "lfdm_serve_"
_LOCK = "lock"


@contextmanager
def own_prefix() -> Iterator[str]:
    """Yield a name prefix for one server's regions; all regions with it are removed at the end."""
    import fcntl  # missing on some systems that import this module

    remove_orphans()
    prefix = f"{_PREFIX}{os.getpid()}_{secrets.token_hex(4)}_"
    # Until it is locked the file has another name, so it does not count as an orphan's.
    unnamed = _FOLDER / f".{prefix}{_LOCK}"
    with open(unnamed, "w", opener=_privately) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(_FOLDER / f"{prefix}{_LOCK}")
        try:
            yield prefix
        finally:
            _remove_all(prefix)


def remove_shared_memory(prefix: str, keep: Sequence[str] = ()) -> None:
    """Remove the regions of killed processes; the lock stays.

    Args:
        prefix: prefix of the names of the server's regions.
        keep: names of regions in use.
    """
    for path in regions(prefix):
        if path.name not in keep:
            with suppress(OSError):
                path.unlink()


def regions(prefix: str) -> list[Path]:
    """The regions of a server."""
    return [path for path in _FOLDER.glob(f"{prefix}*") if path.name != f"{prefix}{_LOCK}"]


def make_private(prefix: str) -> None:
    """Let only this user read a server's regions, if the kernel let the server make them readable for all."""
    for path in regions(prefix):
        with suppress(OSError):
            path.chmod(0o600)


def remove_orphans() -> None:
    """Remove the regions of ended (for example killed) servers: those whose lock no process holds."""
    import fcntl

    for path in _FOLDER.glob(f"{_PREFIX}*_{_LOCK}"):
        with suppress(OSError), path.open("r+") as lock:  # another user's, in use, or already removed
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_all(path.name.removesuffix(_LOCK))


def _remove_all(prefix: str) -> None:
    """Remove a server's regions, then its lock."""
    remove_shared_memory(prefix)
    with suppress(OSError):
        (_FOLDER / f"{prefix}{_LOCK}").unlink()


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
