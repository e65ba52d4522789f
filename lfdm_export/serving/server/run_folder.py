"""A running server's private folder; the next start removes the folder of a killed server."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "lfdm-serve-"
#: Lock file held by the folder's user; the system releases it however the process ends.
_LOCK = "lock"


@contextmanager
def run_folder() -> Iterator[Path]:
    """A temporary folder that only this user can read; removed at the end.

    Raises:
        OSError: the folder cannot be created.
    """
    import fcntl  # missing on some systems that run the other commands

    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # of mode 0700
    try:
        # Until it is locked the folder has no lock file, so it does not count as a leftover.
        unnamed = folder / f".{_LOCK}"
        with unnamed.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unnamed.rename(folder / _LOCK)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove this user's folders of killed servers: those whose lock no process holds."""
    import fcntl

    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, in use, or already removed
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
