"""Decompression with a limit on the result's size."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from lfdm_export.serving.front.refusal import RefusedError, invalid, too_large

#: zlib's window bits by HTTP's name of the coding: gzip format; zlib format.
_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_PIECE = 1 << 20


class Inflater:
    """Decompresses a body piece by piece, and refuses one that grows too large."""

    def __init__(self, coding: str, most: int) -> None:
        """Choose the coding.

        Args:
            coding: "" or "identity", "gzip", or "deflate".
            most: maximum bytes of the decompressed body.

        Raises:
            RefusedError: the coding is unknown.
        """
        name = coding.strip().lower()
        if name not in ("", "identity", *_WINDOWS):
            raise RefusedError(
                "INVALID_ARGUMENT",
                f"the coding {name[:32]!r} of the body is unknown; send gzip, deflate, or none",
                http_status=415,
            )
        self._stream = zlib.decompressobj(_WINDOWS[name]) if name in _WINDOWS else None
        self._most, self._size = most, 0

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Decompress the next bytes of the body; yields pieces.

        Raises:
            RefusedError: the body is damaged, or too large.
        """
        if self._stream is None:
            yield self._counted(data)
            return
        while data:
            if self._stream.eof:
                raise invalid("something follows the compressed body; send one gzip or deflate stream")
            try:
                piece = self._stream.decompress(data, _PIECE)
            except zlib.error as error:
                raise invalid(f"the compressed body is damaged ({error}); send it again") from error
            data = self._stream.unconsumed_tail or self._stream.unused_data
            yield self._counted(piece)

    def finish(self) -> None:
        """Check that the body was complete.

        Raises:
            RefusedError: it is cut off.
        """
        if self._stream is not None and not self._stream.eof:
            raise invalid("the compressed body is cut off; send it again")

    def _counted(self, piece: bytes) -> bytes:
        self._size += len(piece)
        if self._size > self._most:
            raise too_large(f"the body has more than {self._most:,} bytes; send a smaller picture")
        return piece


def inflated_message(message: bytes, most: int) -> bytes:
    """Decompress a gRPC message. gRPC's own decompression has no limit, so it is turned off.

    No message of Triton's protocol begins with the first bytes of gzip or zlib, so these mark a compressed one.

    Raises:
        RefusedError: the message is damaged, or too large when decompressed.
    """
    coding = {b"\x1f\x8b": "gzip", b"\x78\x01": "deflate", b"\x78\x5e": "deflate", b"\x78\x9c": "deflate"}
    name = coding.get(message[:2], "deflate" if message[:2] == b"\x78\xda" else "")
    if not name:
        return message
    inflater = Inflater(name, most)
    whole = b"".join(inflater.feed(message))
    inflater.finish()
    return whole
