"""The cost of decoding JPEG and GIF files, read from their structure; no pixel is decoded here."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import BinaryIO

from lfdm_models.pictures.errors import PictureError

#: Each scan of a JPEG covers the whole picture, however little data it has. Encoders write 1 to about 15.
MAX_SCANS = 100
# Segments of a JPEG; a photograph has tens, with a color profile and long XMP hundreds.
_MAX_SEGMENTS = 20_000
# Excludes the zero after an FF among the coefficients, restart markers, and fill bytes.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
_START, _END, _SCAN = 0xD8, 0xD9, 0xDA
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = {0xC2, 0xC6, 0xCA, 0xCE}


@dataclass(frozen=True)
class JpegFacts:
    """A JPEG file's structure.

    Attributes:
        scans: number of scans.
        coefficient_bytes: bytes of coefficients that the decoder must hold at once: all for several scans, else 0.
    """

    scans: int
    coefficient_bytes: int


def jpeg_facts(stream: BinaryIO, name: str) -> JpegFacts:
    """Read the segments of a JPEG file.

    Raises:
        PictureError: it has more scans or segments than any encoder writes.
    """
    stream.seek(2)
    scans, held, several = 0, 0, False
    components = 1
    for _ in range(_MAX_SEGMENTS):
        marker = _next_marker(stream)
        if marker is None or marker == _END:
            return JpegFacts(scans, held if several else 0)
        if marker in (_START, 0x01):
            continue
        body = _segment(stream, keep=marker in _FRAMES or marker == _SCAN)
        if marker in _FRAMES and len(body) >= 6:
            components, held = body[5], _coefficient_bytes(body)
            several = several or marker in _PROGRESSIVE
        elif marker == _SCAN:
            scans += 1
            several = several or (len(body) > 0 and body[0] < components)
            if scans > MAX_SCANS:
                raise PictureError(
                    f"{name} is a JPEG of more than {MAX_SCANS} scans, which stalls decoders; save it again"
                )
    raise PictureError(
        f"{name} is a JPEG of more than {_MAX_SEGMENTS:,} segments, which stalls decoders; save it again"
    )


def _next_marker(stream: BinaryIO) -> int | None:
    rest = b""
    while chunk := stream.read(4096):
        data = rest + chunk
        found = _MARKER.search(data)
        if found is not None:
            stream.seek(found.end() - len(data), 1)
            return data[found.end() - 1]
        rest = data[-1:] if data.endswith(b"\xff") else b""
    return None


def _segment(stream: BinaryIO, *, keep: bool) -> bytes:
    size = int.from_bytes(stream.read(2), "big") - 2
    if keep:
        return stream.read(max(size, 0))
    stream.seek(max(size, 0), 1)
    return b""


def _coefficient_bytes(frame: bytes) -> int:
    """Bytes of all coefficients of the picture with this frame header, 2 per coefficient."""
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    factors = [(max(1, byte >> 4), max(1, byte & 15)) for byte in frame[7::3]]
    if not factors:
        return 0
    across, down = max(x for x, _ in factors), max(y for _, y in factors)
    units = math.ceil(width / (8 * across)) * math.ceil(height / (8 * down))
    return units * sum(x * y for x, y in factors) * 64 * 2


@dataclass(frozen=True)
class GifFacts:
    """A GIF file's structure.

    Attributes:
        first_size: (width, height) of the screen with its first frame, which may extend beyond it.
        size: the same with all frames.
        frames: number of frames.
    """

    first_size: tuple[int, int]
    size: tuple[int, int]
    frames: int


def gif_facts(stream: BinaryIO, most_frames: int) -> GifFacts:
    """Read the blocks of a GIF file, which may be truncated; stops after `most_frames` + 1 frames."""
    stream.seek(6)
    head = stream.read(7).ljust(7, b"\0")
    width, height = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    _skip_palette(stream, head[4])
    first, frames = (width, height), 0
    while frames <= most_frames:
        kind = stream.read(1)
        if kind == b"!":
            stream.seek(1, 1)
            _skip_blocks(stream)
        elif kind == b",":
            place = stream.read(9)
            if len(place) < 9:
                break
            left, top, across, down = (int.from_bytes(place[at : at + 2], "little") for at in (0, 2, 4, 6))
            width, height, frames = max(width, left + across), max(height, top + down), frames + 1
            first = (width, height) if frames == 1 else first
            _skip_palette(stream, place[8])
            stream.seek(1, 1)  # bits of a code
            _skip_blocks(stream)
        elif not kind or kind == b";":
            break
        # Like Pillow, continue after unknown bytes.
    return GifFacts(first, (width, height), frames)


def _skip_palette(stream: BinaryIO, flags: int) -> None:
    if flags & 0x80:
        stream.seek(3 << (flags & 7) + 1, 1)


def _skip_blocks(stream: BinaryIO) -> None:
    while (size := stream.read(1)) and size[0]:
        stream.seek(size[0], 1)
