"""Errors of reading pictures and clips."""

from __future__ import annotations

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
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise PictureError(f"{name} cannot be read as {what} ({reason.splitlines()[0]})") from error
