"""A running server's own folder: private, and removed by the next start where its server was killed."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "lfdm-serve-"
#: Held by who uses the folder; the system lets it go however a process ends.
_LOCK = "lock"


@contextmanager
def run_folder() -> Iterator[Path]:
    """A folder that only this user can read, in the system's folder for such; removed at the end.

    Raises:
        OSError: it cannot be made.
    """
    import fcntl  # which not every system has that runs the other commands

    remove_leftovers()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))  # of mode 0700
    try:
        # Until it is locked it has no lock file, and so counts as nobody's leftover.
        unnamed = folder / f".{_LOCK}"
        with unnamed.open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            unnamed.rename(folder / _LOCK)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_leftovers() -> None:
    """Remove this user's folders of servers that were killed: those whose lock nobody holds."""
    import fcntl

    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, in use, or gone meanwhile
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / _LOCK).open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
