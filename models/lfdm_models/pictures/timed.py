"""Frames of animations and videos with their durations, one by one."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from lfdm_models.pictures.errors import PictureError, decoding
from lfdm_models.pictures.formats import ANIMATED, MAX_ANIMATED_PIXELS, format_of, open_picture
from lfdm_models.pictures.headers import gif_facts
from lfdm_models.pictures.raster import Raster, UInt8Array, on_black

#: Maximum frames of a clip that are read, whatever is done with them.
MAX_SOURCE_FRAMES = 40_000
#: Maximum pixels in all frames of an animation, each of which Pillow composes.
MAX_ANIMATION_PIXELS = 2_000_000_000
#: Maximum pixels of a video (10,000 frames of 1920 x 1080 have 20.7 billion), and of each of its frames.
MAX_VIDEO_PIXELS = 25_000_000_000
MAX_VIDEO_FRAME_PIXELS = 4096 * 4096
# FFmpeg's names. The list is closed: playlists, for example, name other files.
_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg"
# Browsers show a frame of at most `_SHORTEST_MS` for `_DEFAULT_MS` milliseconds.
_SHORTEST_MS = 10
_DEFAULT_MS = 100


class TimedFrame(NamedTuple):
    """A frame and its duration.

    Attributes:
        pixels: (H, W, 3) uint8, RGB, upright.
        seconds: above 0; None where the file does not state it.
    """

    pixels: UInt8Array
    seconds: float | None


def animation_frames(stream: BinaryIO, name: str) -> Iterator[TimedFrame]:
    """Frames of a GIF, WebP or PNG. An APNG's default image counts only if it is part of the animation.

    Raises:
        PictureError: the file is not an animation, a single PNG, damaged, or too large.
    """
    stream.seek(0)
    found = format_of(stream.read(16))
    if found is None or found.name not in ANIMATED:
        raise PictureError(f"{name} is not an animation, expected a GIF, WebP or animated PNG")
    if found.name == "GIF":
        facts = gif_facts(stream, MAX_SOURCE_FRAMES)
        _check_canvas(facts.size, name)
        _check_work(facts.frames, facts.size, name)
    image = open_picture(stream, name).image
    if found.name == "PNG" and not getattr(image, "is_animated", False):
        raise PictureError(f"{name} is a single picture, not a clip; give a folder of pictures, or an animation")
    _check_canvas(image.size, name)
    cover = 1 if getattr(image, "default_image", False) else 0
    for index in itertools.count():
        with decoding(name, "a clip"):
            try:
                image.seek(cover + index)
            except EOFError:
                return
            _check_work(index + 1, image.size, name)
            frame = Raster(image, name).array()
            milliseconds = float(image.info.get("duration") or 0)
        yield TimedFrame(frame, (milliseconds if milliseconds > _SHORTEST_MS else _DEFAULT_MS) / 1000)


def _check_canvas(size: tuple[int, int], name: str) -> None:
    if size[0] * size[1] > MAX_ANIMATED_PIXELS:
        raise PictureError(
            f"{name} is a clip of {size[0]}x{size[1]} pixels, expected at most {MAX_ANIMATED_PIXELS:,}; "
            "scale it down first"
        )


def _check_work(frames: int, size: tuple[int, int], name: str, most_pixels: int = MAX_ANIMATION_PIXELS) -> None:
    if frames > MAX_SOURCE_FRAMES or frames * size[0] * size[1] > most_pixels:
        raise PictureError(
            f"{name} has more than {MAX_SOURCE_FRAMES:,} frames or {most_pixels:,} pixels in all; "
            "give a shorter or smaller clip"
        )


def video_frames(stream: BinaryIO, name: str) -> Iterator[TimedFrame]:
    """Frames of a video, rotated by its metadata, decoded by PyAV.

    A frame is shown until the next one, whatever rate the file states.

    Raises:
        ImportError: PyAV is not installed.
        PictureError: the file is not a video in a supported container, damaged, or too large.
    """
    import av

    library: Any = av
    stream.seek(0)
    waiting: tuple[UInt8Array, float | None, float | None] | None = None
    # A stream, so that no name is interpreted as a protocol address; titles may have any encoding.
    with (
        decoding(name, "a video"),
        library.open(stream, metadata_errors="replace", options={"format_whitelist": _CONTAINERS}) as container,
    ):
        pictures = container.streams.best("video")
        if pictures is None:
            raise PictureError(f"{name} has no video; give a clip with pictures")
        _check_frame(pictures.codec_context.width, pictures.codec_context.height, name)
        rate = pictures.average_rate or pictures.guessed_rate
        default = 1 / float(rate) if rate else None
        for index, frame in enumerate(container.decode(pictures)):
            _check_frame(frame.width, frame.height, name)
            _check_work(index + 1, (frame.width, frame.height), name, MAX_VIDEO_PIXELS)
            pixels = _upright(_square_pixels(frame, pictures.sample_aspect_ratio, name), frame)
            if waiting is not None:
                yield _shown(waiting, frame.time, default)
            waiting = pixels, frame.time, _own_seconds(frame)
    if waiting is not None:
        yield TimedFrame(waiting[0], waiting[2] or default)


def _square_pixels(frame: Any, ratio: Any, name: str) -> UInt8Array:
    """A frame's pixels, (H, W, 3), composited on black; stretched by the `ratio` of a pixel's sides."""
    width = max(1, round(frame.width * float(ratio or 1)))
    _check_frame(width, frame.height, name)
    has_alpha = any(component.is_alpha for component in frame.format.components)
    # By default FFmpeg scales with a thread per core of the machine, which stay as long as the frame: a process that is
    # forked then cannot free it.
    pixels = frame.to_ndarray(format="rgba" if has_alpha else "rgb24", width=width, threads=1)
    return on_black(pixels) if has_alpha else pixels


def _upright(pixels: UInt8Array, frame: Any) -> UInt8Array:
    """The frame as it is shown: cameras held upright store rotated pictures, front cameras mirrored ones."""
    stored = frame.side_data.get("DISPLAYMATRIX")
    if stored is None or len(bytes(stored)) < 36:
        return pixels
    a, b, _, c, d, *_ = np.frombuffer(bytes(stored), "=i4", 9).tolist()
    # A stored pixel (x, y) is shown at (a x + c y, b x + d y): by quarter turns, one of the two axes counts.
    if abs(b) + abs(c) > abs(a) + abs(d):
        pixels, across, down = pixels.transpose(1, 0, 2), c, b
    else:
        across, down = a, d
    return np.ascontiguousarray(pixels[:: -1 if down < 0 else 1, :: -1 if across < 0 else 1])


def video_comment(stream: BinaryIO, name: str) -> str | None:
    """The comment in a video's metadata.

    Raises:
        ImportError: PyAV is not installed.
        PictureError: the file is not a video in a supported container.
    """
    import av

    stream.seek(0)
    with (
        decoding(name, "a video"),
        av.open(stream, metadata_errors="replace", options={"format_whitelist": _CONTAINERS}) as container,
    ):
        return container.metadata.get("comment")


def _shown(
    waiting: tuple[UInt8Array, float | None, float | None], until: float | None, default: float | None
) -> TimedFrame:
    pixels, since, _ = waiting
    if since is None or until is None:
        return TimedFrame(pixels, default)
    return TimedFrame(pixels, max(0.0, until - since))


def _own_seconds(frame: Any) -> float | None:
    """The duration stored in a frame, which is used for the last frame only."""
    duration = getattr(frame, "duration", None)
    return float(duration * frame.time_base) if duration and frame.time_base else None


def _check_frame(width: int, height: int, name: str) -> None:
    if width * height > MAX_VIDEO_FRAME_PIXELS:
        raise PictureError(
            f"{name} is a video of {width}x{height} pixels, expected at most {MAX_VIDEO_FRAME_PIXELS:,}; "
            "scale it down first"
        )
