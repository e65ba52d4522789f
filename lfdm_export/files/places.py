"""Where a path leads: links, devices, and different names of the same file."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path

_MAX_LINKS = 40


@dataclass(frozen=True)
class Destination:
    """Where bytes written to a path go.

    Attributes:
        path: the file itself, with all links resolved; for a device or pipe, the given path.
        direct: a device, a pipe or a socket, which is written to and never replaced.
        descriptor: an open file of this process, such as that of /dev/stdout.
    """

    path: Path
    direct: bool = False
    descriptor: int | None = None

    def open(self) -> BinaryIO:
        """Open it for direct writing, without replacing it."""
        if self.descriptor is not None:
            return os.fdopen(os.dup(self.descriptor), "wb")
        return os.fdopen(os.open(self.path, os.O_WRONLY | getattr(os, "O_NOCTTY", 0)), "wb")


def destination(path: str | os.PathLike[str]) -> Destination:
    """Follow a path through links, dangling ones included.

    Raises:
        OSError: it cannot be followed: a loop of links, or a folder that must not be entered.
        InputError: the home folder is unknown, or the path has a null character.
    """
    given = user_path(path)
    try:
        # Ask the system first: it refuses links that other users put into shared folders.
        mode = given.stat().st_mode
    except FileNotFoundError:
        mode = None
    at = os.fspath(given)
    for _ in range(_MAX_LINKS):
        folder, name = os.path.realpath(os.path.dirname(at)), os.path.basename(at)  # noqa: PTH119, PTH120
        if folder in (f"/proc/{os.getpid()}/fd", "/dev/fd") and name.isdigit():
            return Destination(given, direct=True, descriptor=int(name))
        if name in ("", ".", ".."):
            at = os.path.realpath(at)
            break
        at = os.path.join(folder, name)  # noqa: PTH118
        if not os.path.islink(at):  # noqa: PTH114
            break
        at = os.path.join(folder, os.readlink(at))  # noqa: PTH115, PTH118
    else:
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(given))
    if mode is not None and not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        return Destination(given, direct=True)
    return Destination(Path(at))


def refuse_inputs(output: str | os.PathLike[str], inputs: Mapping[str, str | os.PathLike[str] | None]) -> None:
    """Reject an output that is the same file as an input, under any name: the user would lose that file.

    Args:
        output: file to be written.
        inputs: files or folders by option ("--image"); None for those not given. The files of a folder are inputs
            too.

    Raises:
        InputError: the output is an input, or a file of a folder that is one.
    """
    written = _status(output)
    if written is None or not (stat.S_ISREG(written.st_mode) or stat.S_ISDIR(written.st_mode)):
        return
    for what, source in inputs.items():
        if source is None:
            continue
        for path in _files(user_path(source)):
            found = _status(path)
            if found is not None and os.path.samestat(found, written):
                same = "the same as" if path == user_path(source) else f"{path.name} of"
                raise InputError(
                    f"the output {os.fspath(output)} is {same} {what} {os.fspath(source)}, which it would replace; "
                    "choose another output"
                )


def _status(path: str | os.PathLike[str]) -> os.stat_result | None:
    try:
        return user_path(path).stat()
    except OSError:
        return None


def _files(path: Path) -> Iterator[Path]:
    yield path
    for folder, _, names in os.walk(path):
        yield from (Path(folder, name) for name in names)
