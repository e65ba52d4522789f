"""Paths as users write them, and what they may hold by mistake."""

from __future__ import annotations

import os
import re

#: First words of the small text that Git stores in place of a large file: a clone without Git LFS has it.
LFS_POINTER = "version https://git-lfs"
#: The scheme of an address, such as https:// or s3:// (`Path` removes a slash); one letter is a drive of Windows.
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+:)/")


def expanded(name: str) -> str:
    """A path in which ``~`` and ``~name`` are replaced by home folders; a slash at its end stays.

    Raises:
        ValueError: the home folder is unknown, or it is not a path: empty, an address, or with a null character.
    """
    if not name:
        raise ValueError("a path is empty, as that of a variable that is not set; give the path of a file or a folder")
    if "\0" in name:
        raise ValueError(f"{name!r} is not a path: it has a null character")
    scheme = _SCHEME.match(name)
    # Otherwise a folder named s3: would be created.
    if scheme is not None and not os.path.lexists(scheme[1]):
        remedy = "leave out file://" if scheme[1].lower() == "file:" else "download it first, or upload it afterwards"
        raise ValueError(f"{name} is an address, expected a file; {remedy}")
    path = os.path.expanduser(name)  # noqa: PTH111  (leaves names of unknown users, and the slash, as they are)
    first, slash, _ = path.partition("/")
    # Otherwise a folder of that name would be created, and invite `rm -r ~`.
    if first.startswith("~") and (slash or first == "~") and not os.path.lexists(first):
        raise ValueError(f"the home folder {first} of {name} is not known; give the path in full, or ./{name}")
    return path
