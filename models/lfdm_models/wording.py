"""Words of messages."""

from __future__ import annotations


def first_line(error: Exception, most: int = 300) -> str:
    """The first line of a library's error, at most `most` characters; its class if it has no text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most]
