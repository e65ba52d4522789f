"""Files that come into being whole or not at all; the only place where this program replaces one.

What is written goes to a hidden name beside its place, is made durable, and is renamed. The hidden name is locked as
long as its writer lives, so that what a killed writer left behind is told from what another one is at, and removed by
the next writer into the same folder.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from lfdm_export.files.places import destination

try:
    import fcntl
except ImportError:  # Windows
    _flock = None
else:
    _flock = fcntl.flock

_MARK = ".lfdm-"
_LEFTOVER = re.compile(r"^\..*\.lfdm-[0-9a-f]{12}\.part$", re.DOTALL)
#: Of one component of a path, in bytes, where the file system does not say.
_LONGEST_NAME = 255
# Names that a write looks at, on average, for what killed writers left.
_NAMES_PER_WRITE = 100
# Writes of this process into large folders until these are looked through again.
_sweep_after: dict[Path, int] = {}
#: What file systems answer that have no fsync for folders, or none at all.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream whose content takes the place of a file once the context ends well; else nothing changes.

    Missing folders are made. A link stays, and the file that it leads to is replaced, or made. A device or a pipe is
    written to; the file's permissions stay.

    Args:
        path: the file, as the user names it (``~`` is expanded).

    Yields:
        A stream that can be written, read and positioned.

    Raises:
        OSError: the file cannot be written.
        InputError: see `lfdm_export.files.places.user_path`.
    """
    place = destination(path)
    if place.direct:
        buffer = io.BytesIO()
        yield buffer
        with place.open() as out:
            out.write(buffer.getbuffer())
        return
    if place.path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(place.path))
    with folder_made(place.path.parent), _claimed(place.path, _new_file) as (part, descriptor):
        assert descriptor is not None  # every file has one
        with os.fdopen(os.dup(descriptor), "w+b") as stream:
            yield stream
        _keep_permissions(descriptor, place.path)
        sync(descriptor)
        part.replace(place.path)
        sync_path(place.path.parent)


def write_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file, whole or not at all; see `replacing`.

    Raises:
        OSError: it cannot be written.
        InputError: see `lfdm_export.files.places.user_path`.
    """
    with replacing(path) as stream:
        stream.write(content)


def rehearse(path: str | os.PathLike[str], *, as_folder: bool = False) -> None:
    """Find out whether `replacing` could write a file, or a folder could be made; what is there stays untouched.

    Raises:
        OSError: it could not: the folder cannot be written, for one, or the name is too long.
        InputError: see `lfdm_export.files.names.user_path`.
    """
    place = destination(path)
    if place.direct:
        if as_folder:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), os.fspath(place.path))
        return
    if not as_folder and place.path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(place.path))
    folder = next(above for above in place.path.parents if above.exists())
    with temporary_folder(folder / place.path.name):
        pass


@contextlib.contextmanager
def temporary_folder(place: Path) -> Iterator[Path]:
    """An empty folder beside `place`, on its file system, with a name that fits; gone when the context ends.

    Args:
        place: a path behind all links (see `lfdm_export.files.places.destination`).

    Raises:
        OSError: it cannot be made.
    """
    with folder_made(place.parent), _claimed(place, _new_folder) as (part, _):
        yield part


@contextlib.contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """A folder and its parents; those that were missing go again if the context fails and they are empty."""
    missing: list[Path] = []
    at = folder
    while not at.exists() and at != at.parent:
        missing.append(at)
        at = at.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for made in missing:
                made.rmdir()
        raise


class _RemovedByAnother(Exception):
    """A new folder was gone before it could be opened."""


# --- Hidden names ---------------------------------------------------------------------------------


def hidden_name(place: Path, ending: str) -> Path:
    """A hidden name beside `place`: as much of its name as fits, then `ending`."""
    try:
        longest = os.pathconf(place.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        longest = _LONGEST_NAME
    kept = os.fsencode(place.name)[: longest - len(_MARK) - len(ending) - 1].decode("utf-8", "ignore")
    return place.with_name(f".{kept}{_MARK}{ending}")


def part_name(place: Path) -> Path:
    """A hidden name that nobody else has, and that is removed by later writers unless somebody holds it."""
    return hidden_name(place, f"{secrets.token_hex(6)}.part")


def leftovers(folder: Path) -> Iterator[Path]:
    """What killed writers left in a folder; each is locked while the caller looks at it."""
    yield from _abandoned(_look_through(folder)[0])


def _abandoned(found: Iterable[Path]) -> Iterator[Path]:
    """Those of some hidden names whose writers are gone."""
    for path in found:
        try:
            descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError:
            continue
        try:
            if _lock(descriptor) and _is_at(descriptor, path):
                yield path
        finally:
            os.close(descriptor)


def _look_through(folder: Path) -> tuple[list[Path], int]:
    """The hidden names in a folder, and how many names it has in all."""
    names = 0
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            names += 1
            if _LEFTOVER.match(entry.name):
                found.append(Path(entry.path))
    return found, names


def _sweep(folder: Path) -> None:
    """Remove what killed writers left in a folder.

    Looking through a folder of a hundred thousand clips takes longer than writing one: a large folder is looked through
    by the first write of a process, and then by one of so many that each pays for some hundred names.
    """
    waiting = _sweep_after.get(folder, 0)
    if waiting:
        _sweep_after[folder] = waiting - 1
        return
    found, names = _look_through(folder)
    for left in _abandoned(found):
        remove(left)
    if names > _NAMES_PER_WRITE:
        _sweep_after[folder] = names // _NAMES_PER_WRITE


def remove(path: Path) -> None:
    """Remove a file or a folder, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _claimed(place: Path, make: Callable[[Path], int | None]) -> Iterator[tuple[Path, int | None]]:
    """A hidden name that is ours, and its descriptor; what still has the name afterwards is removed."""
    _sweep(place.parent)
    part, descriptor = _claim(place, make)
    try:
        yield part, descriptor
    finally:
        remove(part)
        if descriptor is not None:
            os.close(descriptor)


def _claim(place: Path, make: Callable[[Path], int | None]) -> tuple[Path, int | None]:
    while True:
        part = part_name(place)
        # Another writer may take it for a leftover, and remove it, before it is locked.
        try:
            descriptor = make(part)
        except _RemovedByAnother:
            continue
        if descriptor is None or (_lock(descriptor) is not False and _is_at(descriptor, part)):
            return part, descriptor
        os.close(descriptor)


def _new_file(part: Path) -> int:
    return os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)


def _new_folder(part: Path) -> int | None:
    part.mkdir()
    if os.name != "posix":
        return None
    try:
        return os.open(part, os.O_RDONLY)
    except FileNotFoundError as error:
        raise _RemovedByAnother from error


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except OSError:
        return False


def _keep_permissions(descriptor: int, path: Path) -> None:
    """Give a new file the mode and owner of the one that it replaces, as far as that is allowed."""
    with contextlib.suppress(OSError, AttributeError):
        old, new = path.stat(), os.fstat(descriptor)
        if (old.st_uid, old.st_gid) != (new.st_uid, new.st_gid):
            os.fchown(descriptor, old.st_uid, old.st_gid)
        os.fchmod(descriptor, stat.S_IMODE(old.st_mode) & 0o777)


# --- Durability and locks -------------------------------------------------------------------------


def sync(descriptor: int) -> None:
    """Make an open file or folder durable, where its file system can.

    Raises:
        OSError: what was written did not reach the disk.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise


def sync_path(path: Path) -> None:
    """Make a file, or a folder's entries, durable.

    Raises:
        OSError: see `sync`.
    """
    if os.name != "posix" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder and everything in it durable.

    Raises:
        OSError: see `sync`.
    """
    for inside, _, names in os.walk(folder):
        for name in names:
            path = Path(inside, name)
            if path.is_file() and not path.is_symlink():
                sync_path(path)
        sync_path(Path(inside))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep others who lock the same folder waiting, where the system can lock folders.

    Some network file systems cannot; renames are atomic there as well.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        if _flock is not None:
            with contextlib.suppress(OSError):
                _flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def claimed(path: Path) -> BinaryIO:
    """A file that is this process's alone until it is closed, or the process ends; made if it is missing.

    Raises:
        BlockingIOError: another process has it.
        OSError: it cannot be made.
    """
    file = path.open("ab")
    if _lock(file.fileno()) is False:
        file.close()
        raise BlockingIOError(errno.EWOULDBLOCK, os.strerror(errno.EWOULDBLOCK), os.fspath(path))
    return file


def _lock(descriptor: int) -> bool | None:
    """Whether a lock was got: False where another holds it, None where there are no locks."""
    if _flock is None:
        return None
    try:
        _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
