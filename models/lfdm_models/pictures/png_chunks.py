"""A PNG file without the chunks that its pixels do not need.

Pillow rejects a picture for a large color profile or a long text in it, such as a drawing program's or a generator's
workflow; neither changes a pixel here. A few kilobytes of them can also unpack to gigabytes.
"""

from __future__ import annotations

import io
from typing import BinaryIO, NamedTuple

from lfdm_models.pictures.errors import PictureError

_SIGNATURE_BYTES = 8
#: Chunks of a file: encoders write one per 8 KiB of pixels. Pillow handles each in Python.
_MOST_CHUNKS = 100_000
#: Longest text chunk that is kept, and bytes of all of them: those with the orientation, and of our own clips.
_LONGEST_TEXT, _MOST_TEXT = 128 << 10, 1 << 20
_TEXT = (b"tEXt", b"zTXt", b"iTXt")
#: Keyword of the compressed text in which ImageMagick stores EXIF.
_EXIF_KEYWORD = b"Raw profile type exif"


class _Range(NamedTuple):
    """Bytes of the file that stay."""

    start: int
    end: int


def without_extras(stream: BinaryIO, name: str) -> BinaryIO:
    """The file without color profiles and without long or compressed texts; `stream` itself if it has none.

    Args:
        stream: a seekable stream of a PNG, which may be truncated.
        name: for messages.

    Raises:
        PictureError: it has more chunks than any encoder writes.
    """
    size = stream.seek(0, io.SEEK_END)
    at, start, text = _SIGNATURE_BYTES, 0, 0
    kept: list[_Range] = []
    for _ in range(_MOST_CHUNKS):
        stream.seek(at)
        head = stream.read(8)
        if len(head) < 8 or head[4:] == b"IEND":
            if not kept:
                return stream
            return io.BufferedReader(_Parts(stream, [*kept, _Range(start, size)]))
        after = at + 12 + int.from_bytes(head[:4], "big")
        if head[4:] in _TEXT:
            text += after - at
        if head[4:] == b"iCCP" or (head[4:] in _TEXT and (text > _MOST_TEXT or _is_extra(stream, head, after - at))):
            kept.append(_Range(start, at))
            start = min(after, size)
        at = after
    raise PictureError(f"{name} is a PNG of more than {_MOST_CHUNKS:,} chunks, which stalls decoders; save it again")


def _is_extra(stream: BinaryIO, head: bytes, length: int) -> bool:
    keyword, _, rest = stream.read(100).partition(b"\0")
    compressed = head[4:] == b"zTXt" or (head[4:] == b"iTXt" and rest[:1] != b"\0")
    return length > _LONGEST_TEXT or (compressed and keyword != _EXIF_KEYWORD)


class _Parts(io.RawIOBase):
    """Some ranges of a stream, as one seekable file."""

    def __init__(self, stream: BinaryIO, ranges: list[_Range]) -> None:
        self._stream, self._ranges, self._at = stream, ranges, 0
        self._size = sum(end - start for start, end in ranges)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: memoryview, /) -> int:  # type: ignore[override]
        before = self._at
        for start, end in self._ranges:
            if before < end - start:
                self._stream.seek(start + before)
                data = self._stream.read(min(len(buffer), end - start - before))
                buffer[: len(data)] = data
                self._at += len(data)
                return len(data)
            before -= end - start
        return 0
