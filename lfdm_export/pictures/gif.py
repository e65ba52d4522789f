"""Animated GIF that keeps every frame and neither flickers nor ghosts.

Pillow compresses the frames, but its own animation writer drops a frame that equals the previous one, so this module
assembles the file. One palette serves the clip, without dithering: dither patterns, and palettes that change from frame
to frame, make GIFs of nearly still scenes flicker.
"""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

#: Browsers slow down frames of less than 2/100 s.
MAX_FPS = 50
_COLORS = 255
#: The palette's last entry means "as in the previous frame".
_UNCHANGED = 255
_PALETTE_SAMPLES = 400_000


def encode_gif(frames: UInt8Array, fps: float, comment: str = "") -> bytes:
    """Encode a GIF that loops forever.

    Args:
        frames: (T,H,W,3) uint8.
        fps: frames per second, at most MAX_FPS; times are rounded to 1/100 s without drift.
        comment: ASCII text stored in the file.

    Source: the GIF89a specification.
    """
    palette = _common_palette(frames)
    # The spare entry repeats a color, so that no pixel maps to an undefined one.
    colors = np.concatenate([palette, palette[-1:]]).tobytes()
    height, width = frames.shape[1:3]
    loop = b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
    parts = [b"GIF89a", struct.pack("<HHBBB", width, height, 0xF7, 0, 0), colors, loop, *_comment(comment)]
    indices = shown = _nearest(frames[0], palette)
    for index, frame in enumerate(frames):
        if index:
            previous, changed = indices, (frame != frames[index - 1]).any(axis=2)
            indices = previous.copy()
            indices[changed] = _nearest(frame[changed], palette)  # the rest, all of a still background, is known
            shown = np.where(indices == previous, np.uint8(_UNCHANGED), indices)
        delay = round((index + 1) * 100 / Fraction(fps)) - round(index * 100 / Fraction(fps))
        # Disposal 1 (leave the frame in place), with a transparent index.
        parts += [b"\x21\xf9\x04", struct.pack("<BHB", 0x05, delay, _UNCHANGED), b"\0", _image_block(shown, colors)]
    return b"".join([*parts, b"\x3b"])


def _comment(text: str) -> list[bytes]:
    """The comment extension, in blocks of at most 255 bytes; empty for an empty text."""
    data = text.encode("ascii")
    blocks = [bytes([len(data[at : at + 255])]) + data[at : at + 255] for at in range(0, len(data), 255)]
    return [b"\x21\xfe", *blocks, b"\0"] if blocks else []


def _common_palette(frames: UInt8Array) -> UInt8Array:
    """Colors for all frames together, (_COLORS,3) uint8."""
    pixels = frames.reshape(-1, 3)
    pixels = pixels[:: max(1, len(pixels) // _PALETTE_SAMPLES)]
    picture = Image.fromarray(np.ascontiguousarray(pixels[None]))
    quantized = picture.quantize(_COLORS - 2, method=Image.Quantize.MEDIANCUT, kmeans=2)
    found = np.array(quantized.getpalette(), np.uint8).reshape(-1, 3)[: _COLORS - 2]
    # The darkest and the lightest pixel stay exact: averaging would turn black and white into gray.
    brightness = pixels.sum(axis=1, dtype=np.int32)
    extremes = pixels[[brightness.argmin(), brightness.argmax()]]
    colors = np.concatenate([found, extremes])
    return np.concatenate([colors, np.repeat(colors[-1:], _COLORS - len(colors), axis=0)])


def _nearest(frame: UInt8Array, palette: UInt8Array) -> UInt8Array:
    """Index of the nearest palette color, (…) for (…,3). Pillow's own search is coarser: white turns gray."""
    packed = frame.astype(np.int32) @ np.array([65536, 256, 1], np.int32)
    distinct, places = np.unique(packed, return_inverse=True)
    colors = np.stack([distinct >> 16, distinct >> 8 & 255, distinct & 255], axis=1).astype(np.float32)
    target = palette.astype(np.float32)
    # |c - p|^2 without |c|^2, which is the same for all p. Every term is a whole number below 2^24, so it is exact.
    offset = (target**2).sum(axis=1)
    best = [(offset - 2 * (part @ target.T)).argmin(axis=1) for part in np.array_split(colors, len(colors) // 8192 + 1)]
    return np.concatenate(best).astype(np.uint8)[places.reshape(packed.shape)]


def _image_block(indices: UInt8Array, colors: bytes) -> bytes:
    """The image descriptor and compressed pixels of one frame, cut out of a GIF of this frame alone."""
    picture = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    picture.putpalette(colors)
    stream = io.BytesIO()
    picture.save(stream, "GIF", optimize=False, interlace=False)
    data = stream.getvalue()
    return data[_skip_to_image(data) : -1]


def _skip_to_image(data: bytes) -> int:
    """Offset of the first image descriptor, after the header, the palette and any extensions."""
    flags = data[10]
    position = 13 + (3 * 2 ** ((flags & 7) + 1) if flags & 0x80 else 0)
    while data[position] == 0x21:
        position += 2
        while data[position]:
            position += 1 + data[position]
        position += 1
    assert data[position] == 0x2C  # an image follows the extensions
    return position
