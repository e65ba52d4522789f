"""Clips on disk -> frames in the model's size.

Source: the published program: scaled by area averaging so that the longer side fits, padded with black to a square,
the smaller half of the padding first.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from lfdm_models.pictures.errors import PictureError
from lfdm_models.pictures.formats import ANIMATED, PICTURE_ENDINGS, format_of, open_stream
from lfdm_models.pictures.raster import read_picture
from lfdm_models.pictures.timed import TimedFrame, animation_frames, video_frames
from lfdm_models.training.drawing import UInt8Array

ANIMATION_ENDINGS = (".gif",)
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")


class ClipError(Exception):
    """A clip cannot be read; the text is the reason."""


@dataclass(frozen=True)
class Framing:
    """A data set's rule for its pictures before they are scaled.

    Attributes:
        resize_first: (width, height) that every picture is scaled to first.
        frame_size: (width, height) of the pictures to crop; others stay whole.
        crop: (left, top, right, bottom) of the part that is kept.
    """

    resize_first: tuple[int, int] | None = None
    frame_size: tuple[int, int] | None = None
    crop: tuple[int, int, int, int] | None = None

    def prepare(self, picture: Image.Image, size: int) -> UInt8Array:
        """A picture -> (size, size, 3) uint8, RGB."""
        if self.resize_first is not None:
            picture = picture.resize(self.resize_first, Image.Resampling.BOX)
        if self.crop is not None and picture.size == self.frame_size:
            picture = picture.crop(self.crop)
        longer = max(picture.size)
        width, height = (max(side * size // longer, 1) for side in picture.size)
        # A box filter averages areas; where a picture grows, it would only repeat pixels.
        way = Image.Resampling.BOX if longer >= size else Image.Resampling.BILINEAR
        fitted = picture.resize((width, height), way)
        square = np.zeros((size, size, 3), np.uint8)
        top, left = (size - height) // 2, (size - width) // 2
        square[top : top + height, left : left + width] = np.asarray(fitted)
        return square


def is_clip(path: Path) -> bool:
    """Whether a path is a video or animation by its ending, or a folder with pictures."""
    if path.is_dir():
        return any(entry.suffix.lower() in PICTURE_ENDINGS for entry in path.iterdir())
    return path.suffix.lower() in (*VIDEO_ENDINGS, *ANIMATION_ENDINGS)


class DiskClip:
    """An opened clip: its number of frames, and frames by index."""

    def __init__(self, path: Path, framing: Framing, size: int) -> None:
        """Open a clip: pictures are only listed; a video is decoded and scaled frame by frame.

        Args:
            path: a folder of pictures, in natural order of their names, or a video or GIF.
            framing: the data set's rule.
            size: size of the scaled frames.

        Raises:
            ClipError: it cannot be read.
        """
        self._framing, self._size = framing, size
        self._pictures: list[Path] = []
        self._frames: list[UInt8Array] = []
        try:
            if path.is_dir():
                self._pictures = sorted(
                    (entry for entry in path.iterdir() if entry.suffix.lower() in PICTURE_ENDINGS), key=_natural
                )
            else:
                self._frames = [framing.prepare(Image.fromarray(frame.pixels), size) for frame in _frames(path)]
        except (OSError, PictureError) as error:
            raise ClipError(str(error)) from error

    def __len__(self) -> int:
        return len(self._pictures) or len(self._frames)

    def read(self, indices: Sequence[int]) -> UInt8Array:
        """Frames by index -> (n, size, size, 3) uint8.

        Raises:
            ClipError: a picture cannot be read.
        """
        frames = {index: self._frame(index) for index in dict.fromkeys(indices)}
        return np.stack([frames[index] for index in indices])

    def _frame(self, index: int) -> UInt8Array:
        if self._frames:
            return self._frames[index]
        path = self._pictures[index]
        try:
            return self._framing.prepare(Image.fromarray(read_picture(path, path.name).array()), self._size)
        except PictureError as error:
            raise ClipError(str(error)) from error


def _natural(path: Path) -> list[tuple[int, str]]:
    return [(int(digits or -1), text) for digits, text in re.findall(r"(\d+)|(\D+)", path.name)]


def _frames(path: Path) -> Iterator[TimedFrame]:
    """Frames of an animation or a video; the content decides which."""
    with open_stream(path, path.name) as stream:
        found = format_of(stream.read(16))
        if found is not None and found.name in ANIMATED:
            yield from animation_frames(stream, path.name)
            return
        try:
            yield from video_frames(stream, path.name)
        except ImportError:
            raise ClipError("videos need the package 'av': pip install 'lfdm-export[video]'") from None
