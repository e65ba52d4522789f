"""Files that are written completely or not at all; the only place where this program replaces a file.

The content goes to a hidden name beside its place, is made durable, and is renamed. The hidden name stays locked while
its writer lives. The next writer into the same folder removes unlocked hidden names: killed writers left them.
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
#: Longest name of one component of a path, in bytes, where the file system does not report it.
_LONGEST_NAME = 255
# Names that one write checks, on average, to find files that killed writers left.
_NAMES_PER_WRITE = 100
# Writes of this process into a large folder until it is looked through again.
_sweep_after: dict[Path, int] = {}
#: Error codes of file systems that have no fsync for folders, or none at all.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EROFS)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A stream whose content replaces a file when the context ends without an error; otherwise nothing changes.

    Missing folders are created. A link stays, and its target is replaced or created. A device or a pipe is written to.
    The file's permissions stay.

    Args:
        path: the file, as the user names it (``~`` is expanded).

    Yields:
        A stream that supports write, read and seek.

    Raises:
        OSError: the file cannot be written.
        InputError: the home folder is unknown, or the path has a null character.
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
    """Write a file completely or not at all, as `replacing` does.

    Raises:
        OSError: it cannot be written.
        InputError: the home folder is unknown, or the path has a null character.
    """
    with replacing(path) as stream:
        stream.write(content)


def rehearse(path: str | os.PathLike[str], *, as_folder: bool = False) -> None:
    """Check that `replacing` could write a file, or that a folder could be created; existing files stay untouched.

    Raises:
        OSError: it could not, for example because the folder is not writable or the name is too long.
        InputError: the home folder is unknown, or the path has a null character.
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
    """An empty folder beside `place`, on its file system, with a name that fits; removed when the context ends.

    Args:
        place: a path with all links resolved, as by `lfdm_export.files.places.destination`.

    Raises:
        OSError: it cannot be made.
    """
    with folder_made(place.parent), _claimed(place, _new_folder) as (part, _):
        yield part


@contextlib.contextmanager
def folder_made(folder: Path) -> Iterator[None]:
    """Create a folder and its missing parents; if the context fails, those that are empty are removed again."""
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
    """Another process removed a new folder before it could be opened."""


# --- Hidden names ---------------------------------------------------------------------------------


def hidden_name(place: Path, ending: str) -> Path:
    """A hidden name beside `place`: as much of its name as fits, then `ending`."""
    try:
        longest = os.pathconf(place.parent, "PC_NAME_MAX")
    except (AttributeError, OSError, ValueError):
        longest = _LONGEST_NAME
    kept = os.fsencode(place.name)[: longest - len(_MARK) - len(ending) - 1].decode("utf-8", "ignore")
    # The locale's encoding, such as ASCII, may be smaller than the file system's names.
    return place.with_name(f".{os.fsdecode(kept.encode())}{_MARK}{ending}")


def part_name(place: Path) -> Path:
    """A unique hidden name, which later writers remove unless a process holds its lock."""
    return hidden_name(place, f"{secrets.token_hex(6)}.part")


def leftovers(folder: Path) -> Iterator[Path]:
    """The files that killed writers left in a folder; each is locked while the caller uses it."""
    yield from _abandoned(_look_through(folder)[0])


def _abandoned(found: Iterable[Path]) -> Iterator[Path]:
    """Those hidden names whose writers are gone."""
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
    """The hidden names in a folder, and the number of all its names."""
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

    Looking through a folder of a hundred thousand clips takes longer than writing one. Therefore a process looks
    through a large folder at its first write, and then only so often that each write pays for some hundred names.
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
    """A hidden name of this process, and its descriptor; what still has the name afterwards is removed."""
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
        # Before it is locked, another writer may take it for a leftover and remove it.
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
    """Give a new file the mode and owner of the file that it replaces, as far as the system permits."""
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
        OSError: what was written did not reach the disk.
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
        OSError: what was written did not reach the disk.
    """
    for inside, _, names in os.walk(folder):
        for name in names:
            path = Path(inside, name)
            if path.is_file() and not path.is_symlink():
                sync_path(path)
        sync_path(Path(inside))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Exclude other processes that lock the same folder, where the system can lock folders.

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
    """Open a file that only this process holds until it is closed or the process ends; created if missing.

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
    """Whether a lock was acquired: False where another holds it, None where locks are not available."""
    if _flock is None:
        return None
    try:
        _flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
