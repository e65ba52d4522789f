"""The supported picture formats, and opening a picture within its limits.

The list is closed, and a file's content decides, not its name: Pillow would also try formats that start programs
(PostScript), or that are rare and little tested.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeAlias

from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.ImageFile import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from lfdm_models.paths import LFS_POINTER
from lfdm_models.pictures.errors import PictureError, decoding
from lfdm_models.pictures.headers import MAX_SCANS, gif_facts, jpeg_facts
from lfdm_models.pictures.png_chunks import without_extras

#: A file, or an open binary stream.
Source: TypeAlias = "str | os.PathLike[str] | BinaryIO"


@dataclass(frozen=True)
class PictureFormat:
    """A supported format.

    Attributes:
        name: its common name, which Pillow uses too.
        signature: pattern of its files' first bytes.
        reader: Pillow's class.
        most_pixels: maximum pixels of a picture; decoding it then needs less than 300 MB.
    """

    name: str
    signature: re.Pattern[bytes]
    reader: type[ImageFile]
    most_pixels: int


#: JPEGs of more pixels (of several scans: of more than fit into memory) are scaled down during decoding.
MAX_WHOLE_PIXELS = 40_000_000
#: Maximum for a frame of an animation: several copies of it are in memory at once.
MAX_ANIMATED_PIXELS = 10_000_000
FORMATS = (
    PictureFormat("JPEG", re.compile(rb"\xff\xd8\xff"), JpegImageFile, 250_000_000),
    PictureFormat("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImageFile, MAX_WHOLE_PIXELS),
    PictureFormat("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImageFile, 16_000_000),
    PictureFormat("GIF", re.compile(rb"GIF8[79]a"), GifImageFile, MAX_WHOLE_PIXELS),
    PictureFormat("BMP", re.compile(rb"BM"), BmpImageFile, MAX_WHOLE_PIXELS),
    PictureFormat("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffImageFile, 30_000_000),
)
FORMAT_NAMES = ", ".join(known.name for known in FORMATS)
#: Animation formats: they may hold several frames with times. (Pages of a TIFF have no times.)
ANIMATED = ("GIF", "WebP", "PNG")
#: Endings of pictures in a folder of frames.
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
#: Signatures of the most common videos.
VIDEO_SIGNATURE = re.compile(rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ", re.DOTALL)
# Formats that are not supported, for a message that names them.
_OTHERS = (
    (re.compile(rb"\xef?\xbb?\xbf?\s*(<\?xml|<svg|<!DOCTYPE svg)", re.IGNORECASE), "SVG or another XML"),
    (re.compile(rb"\xef?\xbb?\xbf?\s*<(!doctype html|html|head|!--)", re.IGNORECASE), "a web page (HTML)"),
    (re.compile(LFS_POINTER.encode()), "a Git LFS pointer (fetch the file itself: git lfs pull)"),
    (re.compile(rb"data:image/"), "a data URL"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL"),
    (re.compile(rb"8BPS"), "Photoshop"),
    (re.compile(rb"\0\0[\x01\x02]\0"), "an icon"),
    (re.compile(rb"\0{16}"), "unknown (it begins with zeros, as a file that was not copied completely)"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "PostScript"),
    (re.compile(rb"%PDF"), "a PDF"),
    (re.compile(rb"....ftyp(heic|heix|hevc|heim|mif1|msf1|avif|avis)", re.DOTALL), "HEIF or AVIF"),
    (VIDEO_SIGNATURE, "a video"),
)
# Memory for decoding one picture: its coefficients and its pixels.
_DECODER_BYTES = 240 << 20
# Maximum bytes: Pillow unpacks these in Python.
_MAX_BMP_RUNS = 4 << 20
# Maximum bytes: a pipe is read completely into memory.
_MAX_PIPE_BYTES = 256 << 20


class Opened(NamedTuple):
    """A picture that is not decoded yet.

    Attributes:
        image: Pillow's image, possibly at a half, a quarter or an eighth of the file's own size.
        full_size: (width, height) in the file, before any rotation.
    """

    image: ImageFile
    full_size: tuple[int, int]


def format_of(head: bytes) -> PictureFormat | None:
    """The format whose signature matches the first bytes of a file."""
    return next((known for known in FORMATS if known.signature.match(head)), None)


@contextmanager
def open_stream(source: Source, name: str) -> Iterator[BinaryIO]:
    """Open a file, or rewind a stream, for seekable reading.

    Raises:
        PictureError: it does not exist, is a folder, or cannot be opened.
    """
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
        yield source
        return
    if Path(source).is_dir():
        raise PictureError(f"{name} is a folder, not a file; give the path of one")
    try:
        opened = open(source, "rb")  # noqa: PTH123, SIM115 (closed below)
    except FileNotFoundError:
        if re.match("https?:/", str(source)):
            raise PictureError(f"{name} is an address, expected a file; download it first") from None
        raise PictureError(f"{name} does not exist; check the path") from None
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise PictureError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    with opened:
        if opened.seekable():
            yield opened
        else:
            yield _from_pipe(opened, name)


def _from_pipe(pipe: BinaryIO, name: str) -> BinaryIO:
    data = pipe.read(_MAX_PIPE_BYTES + 1)
    if len(data) > _MAX_PIPE_BYTES:
        raise PictureError(f"{name} is a pipe that gives more than {_MAX_PIPE_BYTES >> 20} MiB; give a file")
    return io.BytesIO(data)


def open_picture(stream: BinaryIO, name: str, *, most_pixels: int | None = None) -> Opened:
    """Open a picture in one of `FORMATS`; its size limits are checked before any pixel is decoded.

    An animation or a file of several pages gives the first picture: a GIF or WebP its first frame, an animated PNG the
    picture that viewers without animation show, which may not be a frame of the animation.

    Args:
        stream: it must stay open until the picture is loaded.
        name: for messages.
        most_pixels: a smaller limit than the format's own.

    Returns:
        The picture. JPEGs of more than `MAX_WHOLE_PIXELS` pixels (of several scans: of more than about half as many)
        are scaled during decoding.

    Raises:
        PictureError: the format is not supported, or the picture is damaged or too large.
    """
    stream.seek(0)
    head = stream.read(64)
    if not head:
        raise PictureError(f"{name} is empty, expected an image; copy it again")
    found = format_of(head)
    if found is None:
        other = next((what for signature, what in _OTHERS if signature.match(head)), "unknown")
        raise PictureError(
            f"{name} cannot be read as an image: its format is {other}, expected one of {FORMAT_NAMES}; "
            "save it as JPEG or PNG"
        )
    limit = min(most_pixels or found.most_pixels, found.most_pixels)
    with decoding(name, "an image"):
        if found.name == "GIF":
            _check_pixels(gif_facts(stream, 0).first_size, limit, found, name, least=0)
        if found.name == "PNG":
            stream = without_extras(stream, name)
        stream.seek(0)
        image = found.reader(stream)  # Pillow's own limit is global to the process, and higher
        full_size = image.size
        _check_pixels(full_size, limit, found, name)
        if isinstance(image, JpegImageFile):
            place = stream.tell()
            _scale_while_decoding(image, stream, name)
            stream.seek(place)
        elif isinstance(image, TiffImageFile):
            _check_tiff(image, stream, limit, name)
        elif isinstance(image, BmpImageFile):
            _check_bmp(image, stream, name)
    return Opened(image, full_size)


def _check_pixels(size: tuple[int, int], limit: int, found: PictureFormat, name: str, least: int = 1) -> None:
    if not least <= size[0] * size[1] <= limit:
        raise PictureError(
            f"{name} has {size[0]}x{size[1]} pixels, expected 1 to {limit:,} of a {found.name}; scale it down first"
        )


def _scale_while_decoding(image: JpegImageFile, stream: BinaryIO, name: str) -> None:
    held = jpeg_facts(stream, name).coefficient_bytes
    width, height = image.size
    for scale in (1, 2, 4, 8):
        pixels = -(-width // scale) * -(-height // scale)
        if pixels <= MAX_WHOLE_PIXELS and held + 4 * pixels <= _DECODER_BYTES:
            if scale > 1:
                image.draft(image.mode, (width // scale, height // scale))
            return
    raise PictureError(
        f"{name} is a JPEG of {width}x{height} pixels in several scans, which takes too much memory; save it smaller"
    )


def _check_bmp(image: BmpImageFile, stream: BinaryIO, name: str) -> None:
    place = stream.tell()
    if image.info.get("compression") in (1, 2) and stream.seek(0, os.SEEK_END) > _MAX_BMP_RUNS:
        raise PictureError(f"{name} is a run-length encoded BMP of more than {_MAX_BMP_RUNS >> 20} MiB; save it as PNG")
    stream.seek(place)


def _check_tiff(image: TiffImageFile, stream: BinaryIO, limit: int, name: str) -> None:
    """Check tiles and strips: a tile may be larger than the picture, a strip may hold a JPEG of thousands of scans."""
    tags = image.tag_v2
    across, down = (tags.get(tag, 1) for tag in (322, 323))
    if not isinstance(across, int) or not isinstance(down, int) or across * down > limit:
        raise PictureError(f"{name} is a TIFF whose tiles have {across}x{down} pixels; save it again, as PNG")
    if tags.get(259) in (6, 7):
        parts = max(len(tags.get(tag, ())) for tag in (273, 324))
        stream.seek(0)
        scans, rest = 0, b""
        while chunk := stream.read(1 << 20):
            scans += (rest + chunk).count(b"\xff\xda")
            rest = chunk[-1:]
        if scans > parts + MAX_SCANS:
            raise PictureError(f"{name} is a TIFF of JPEGs of more than {MAX_SCANS} scans; save it again, as PNG")
