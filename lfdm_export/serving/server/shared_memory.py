"""The shared memory of servers: private, and removed by whoever finds its owner gone.

Each server's regions begin with a prefix of its own. Its owner holds a lock on a file of that prefix among them, which
the system lets go however a process ends. Process numbers would not do: of another container that shares /dev/shm they
mean other processes here.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_FOLDER = Path("/dev/shm")
#: What the names of our servers' regions begin with; the process id of lfdm-serve follows, for people.
_PREFIX = "lfdm_serve_"
_LOCK = "lock"


@contextmanager
def own_prefix() -> Iterator[str]:
    """What the names of one server's regions are to begin with; all that begin with it are removed at the end."""
    import fcntl  # which not every system has that imports this module

    remove_orphans()
    prefix = f"{_PREFIX}{os.getpid()}_{secrets.token_hex(4)}_"
    # Until it is locked it has another name, and so counts as nobody's.
    unnamed = _FOLDER / f".{prefix}{_LOCK}"
    with open(unnamed, "w", opener=_privately) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        unnamed.rename(_FOLDER / f"{prefix}{_LOCK}")
        try:
            yield prefix
        finally:
            _remove_all(prefix)


def remove_shared_memory(prefix: str, keep: Sequence[str] = ()) -> None:
    """Remove regions that killed processes left behind; the lock stays.

    Args:
        prefix: what the names of the server's regions begin with.
        keep: names of those in use.
    """
    for path in regions(prefix):
        if path.name not in keep:
            with suppress(OSError):
                path.unlink()


def regions(prefix: str) -> list[Path]:
    """The regions of a server."""
    return [path for path in _FOLDER.glob(f"{prefix}*") if path.name != f"{prefix}{_LOCK}"]


def make_private(prefix: str) -> None:
    """Let only this user read a server's regions, where the kernel let the server open them to everybody."""
    for path in regions(prefix):
        with suppress(OSError):
            path.chmod(0o600)


def remove_orphans() -> None:
    """Remove regions whose lfdm-serve is gone, killed for instance: those whose lock nobody holds."""
    import fcntl

    for path in _FOLDER.glob(f"{_PREFIX}*_{_LOCK}"):
        with suppress(OSError), path.open("r+") as lock:  # another user's, in use, or gone meanwhile
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove_all(path.name.removesuffix(_LOCK))


def _remove_all(prefix: str) -> None:
    """Remove a server's regions, then the lock that says whose they are."""
    remove_shared_memory(prefix)
    with suppress(OSError):
        (_FOLDER / f"{prefix}{_LOCK}").unlink()


def _privately(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
