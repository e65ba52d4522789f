"""File names as users write them, and as they are shown."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lfdm_export.errors import InputError
from lfdm_models.paths import expanded

#: Control characters, line and paragraph separators, directional overrides, and unpaired surrogates.
_CONTROL = re.compile("[\\x00-\\x1f\\x7f-\\x9f\\u2028\\u2029\\u202a-\\u202e\\u2066-\\u2069\\ud800-\\udfff]")


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path in which ``~`` and ``~name`` are replaced by home folders.

    Raises:
        InputError: the home folder is unknown, or it is not a path: empty, an address, or with a null character.
    """
    return Path(user_name(path))


def user_name(path: str | os.PathLike[str]) -> str:
    """Like `user_path`, but a string, which keeps a slash at its end.

    Raises:
        InputError: the home folder is unknown, or it is not a path: empty, an address, or with a null character.
    """
    try:
        return expanded(os.fsdecode(path))
    except ValueError as error:
        raise InputError(str(error)) from error


def require_utf8(path: str | os.PathLike[str], library: str) -> str:
    """A path for a library that accepts only UTF-8 names.

    Raises:
        InputError: the path is not UTF-8; the file itself may be valid.
    """
    name = os.fspath(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(f"{visible(name)}: the path is not UTF-8, which {library} needs; rename it") from None
    return name


def visible(text: str, *, keep: str = "") -> str:
    """Text with control characters, and bytes that are not UTF-8, written as escapes.

    Names and contents of files, and texts from servers, thus never control the terminal (escape sequences, changes of
    writing direction).

    Args:
        text: of any origin.
        keep: control characters to leave as they are, such as a line feed.
    """
    return _CONTROL.sub(lambda found: found[0] if found[0] in keep else _escaped(found[0]), text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
