"""How a clip was made, stored in its file: seed, sampler, steps, label, bundle.

The metadata are one JSON object in ASCII: in the comment of a GIF or an MP4, in the EXIF image description of a WebP,
in the text chunk `KEY` of a PNG, and in the array ``metadata`` of an npz archive.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lfdm_export import __version__
from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.pictures.archives import read_text
from lfdm_models.pictures.errors import PictureError, decoding
from lfdm_models.pictures.formats import format_of, open_picture, open_stream
from lfdm_models.pictures.timed import video_comment

#: Keyword of a PNG's text chunk.
KEY = "lfdm"
PROGRAM = "lfdm-export"
_DESCRIPTION = 0x010E
#: Longest text that is read.
MOST_CHARACTERS = 65_536
#: Name of the array in an npz archive.
ARRAY = "metadata"


def to_text(metadata: Mapping[str, object]) -> str:
    """Metadata as stored in files, with the program's name; None values are left out."""
    known = {name: value for name, value in metadata.items() if value is not None}
    return json.dumps({"program": PROGRAM, "version": __version__, **known})


def png_text(text: str) -> PngInfo:
    """Metadata as Pillow's ``pnginfo``."""
    info = PngInfo()
    info.add_text(KEY, text)
    return info


def exif_text(text: str) -> bytes:
    """An EXIF block with the text as its image description."""
    exif = Image.Exif()
    exif[_DESCRIPTION] = text
    return exif.tobytes()


def archive_text(text: str) -> np.ndarray[Any, np.dtype[np.str_]]:
    """Metadata as an array of an npz archive."""
    return np.array(text)


def clip_metadata(path: str | os.PathLike[str]) -> dict[str, object]:
    """Read how a clip was made, as `lfdm_export.pictures.clip.Clip.save` stored it in the file.

    Args:
        path: a GIF, WebP, MP4, PNG, npz or motion file, or a folder of PNG frames.

    Returns:
        ``program``, ``version``, and those of the following that are known: ``made_by`` ("generate", "transfer_motion"
        or "animate"), ``bundle`` (its name), ``bundle_id`` (`lfdm_export.bundle.manifest.Manifest.bundle_id`),
        ``precision``, ``condition``, ``label``, ``text``, ``seed``, ``sampler``, ``steps``, ``eta``,
        ``guidance_scale``, ``fps``, ``frame_indices`` (if only some frames were decoded), ``motion_bundle_id`` (for an
        animated picture: the bundle that made its motion),
        ``job`` (for a bulk run: the row). An archive of several samples has lists as label and seed.

    Raises:
        InputError: the file cannot be read, or carries no such metadata.
        MissingDependencyError: an MP4 without PyAV.
    """
    source = user_path(path)
    name = str(source)
    if source.is_dir():
        source = next(iter(sorted(source.glob("*.png"))), source)
    try:
        with open_stream(source, name) as stream:
            text = _text_of(stream, source)
    except PictureError as error:
        raise InputError(str(error)) from error
    found = parse(text)
    if found is None:
        raise InputError(f"{name} carries no metadata of {PROGRAM}; it was made by another program, or converted")
    return found


def parse(text: str | None) -> dict[str, object] | None:
    """The metadata that `to_text` wrote; None for any other text."""
    try:
        found = json.loads(text[:MOST_CHARACTERS]) if text else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("program") == PROGRAM else None


def _text_of(stream: BinaryIO, source: Path) -> str | None:
    head = stream.read(16)
    if zipfile.is_zipfile(stream):
        return read_text(stream, str(source), ARRAY, MOST_CHARACTERS)
    if format_of(head) is None:
        from lfdm_export.pictures.clips import import_av

        import_av(f"reading {source.name}")
        return video_comment(stream, str(source))
    image = open_picture(stream, str(source)).image
    with decoding(str(source), "an image"):
        if image.format == "WEBP":
            found: object = image.getexif().get(_DESCRIPTION)
        else:
            found = image.info.get(KEY if image.format == "PNG" else "comment")
    return found.decode("ascii", "replace") if isinstance(found, bytes) else found if isinstance(found, str) else None
