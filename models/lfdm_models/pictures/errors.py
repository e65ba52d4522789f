"""Errors of reading pictures and clips."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager


class PictureError(Exception):
    """A picture or clip cannot be used; the text is one sentence that names it."""


@contextmanager
def decoding(name: str, what: str) -> Iterator[None]:
    """Turn any exception of a decoder into a `PictureError`.

    Args:
        name: name of the file, for the message.
        what: kind of content, such as "an image".

    Raises:
        PictureError: the decoder raised an exception.
    """
    try:
        yield
    except PictureError:
        raise
    except Exception as error:  # decoders raise anything on damaged data: struct.error, IndexError, MemoryError, …
        raise PictureError(f"{name} cannot be read as {what} ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, struct.error | EOFError | IndexError) or "truncated" in str(error).lower():
        return "it is truncated or damaged; copy or save it again"
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    reason = next(iter(reason.splitlines()), type(error).__name__)
    if reason.startswith(("Invalid data found", "Invalid argument")):  # FFmpeg's words for anything
        return "its content is not valid: it is damaged, incomplete, or of another kind; copy or convert it again"
    return reason
