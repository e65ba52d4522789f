"""Folders that replace older ones in one step, and the repair of interrupted replacements."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from lfdm_export.files.atomic import hidden_name, leftovers, locked, part_name, remove, sync_path, sync_tree

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def publish(
    folder: Path,
    target: Path,
    *,
    carry: Sequence[str] = (),
    check: Callable[[], None] | None = None,
    replace: bool = True,
) -> None:
    """Make a folder durable and move it to `target`; an older folder there is exchanged for it.

    If this is interrupted, `target` is the old folder or the new one, or `give_back` restores the old one.

    Args:
        folder: from `lfdm_export.files.atomic.temporary_folder`; afterwards the old folder, if there was one.
        target: its place, with all links resolved.
        carry: entries of the old folder that move to the new one where it has none of the same name.
        check: raises if the folder at `target` must not be replaced; called while no other process can change it.
        replace: False keeps an existing folder at `target`, and `folder` where it is.

    Raises:
        OSError: it failed; the target is as before.
    """
    sync_tree(folder)
    with locked(target.parent):
        settle(target, carry=carry)
        if check is not None:
            check()
        if not target.exists():
            _rename(folder, target)
        elif replace:
            shutil.copymode(target, folder)
            # The old one gets a leftover's name: without this lock, others would remove it before its entries move.
            with locked(target):
                try:
                    if not _exchange(folder, target):
                        _take_turns(folder, target)
                finally:
                    _carry(folder, target, carry)
        sync_path(target.parent)


def give_back(target: Path) -> bool:
    """Restore a folder whose exchange was interrupted between two renames.

    Returns:
        Whether something is at `target`.
    """
    if _aside(target).exists():
        with locked(target.parent), contextlib.suppress(OSError):
            if not target.exists():
                _rename(_aside(target), target)
    return target.exists()


def settle(target: Path, *, carry: Sequence[str] = ()) -> None:
    """Finish what killed runs left at `target`, and remove what they left beside it.

    Args:
        target: its place.
        carry: entries of an old folder that move to `target` where it has none of the same name.
    """
    aside = _aside(target)
    with contextlib.suppress(OSError):
        if aside.exists():
            _rename(aside, part_name(target) if target.exists() else target)
    prefix = hidden_name(target, "").name
    for left in leftovers(target.parent):
        if left.name.startswith(prefix) and target.exists():
            _carry(left, target, carry)
        remove(left)


def _aside(target: Path) -> Path:
    """The place of the old folder between the two renames; never removed under this name."""
    return hidden_name(target, f"{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:12]}.old")


def _take_turns(folder: Path, target: Path) -> None:
    """The exchange in three renames, for systems without an atomic exchange."""
    aside = _aside(target)
    try:
        _rename(target, aside)
        _rename(folder, target)
    except BaseException:
        if aside.exists() and not target.exists():
            _rename(aside, target)
        raise
    _rename(aside, folder)


def _carry(old: Path, new: Path, names: Sequence[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError):  # most often it is missing
            if not (new / name).exists():
                _rename(old / name, new / name)


def _rename(old: Path, new: Path) -> None:
    os.rename(old, new)  # noqa: PTH104  # Path.rename may replace a file on some systems


def _exchange(first: Path, second: Path) -> bool:
    """Exchange two paths in one step; False where the system or the file system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), os.fspath(second))


@functools.cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """Linux's `renameat2`, through the C library (glibc 2.28, musl 1.2.4)."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return None
    function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    function.restype = ctypes.c_int
    return function
