"""Reading clips: GIF, WebP, APNG, videos, NumPy archives and folders of pictures, with their time base."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt

from lfdm_export.errors import InputError, MissingDependencyError
from lfdm_export.files.names import user_path
from lfdm_export.pictures.archives import read_frames
from lfdm_export.pictures.preprocess import read_image
from lfdm_models.pictures.errors import PictureError
from lfdm_models.pictures.formats import ANIMATED, PICTURE_ENDINGS, VIDEO_SIGNATURE, format_of, open_stream
from lfdm_models.pictures.timed import TimedFrame, animation_frames, video_frames

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
#: Applied to each frame when it is read; may change its size.
Prepare: TypeAlias = Callable[[UInt8Array], UInt8Array]

#: Files with these endings are treated as videos, unless their content has a picture format.
VIDEO_ENDINGS = (
    ".mp4",
    ".m4v",
    ".mov",
    ".mkv",
    ".webm",
    ".avi",
    ".mpg",
    ".mpeg",
    ".ts",
    ".3gp",
    ".flv",
    ".wmv",
    ".ogv",
)
#: Limits of a clip: frames, and pixels of all frames after `Prepare`.
MAX_CLIP_FRAMES = 10_000
MAX_CLIP_PIXELS = 200_000_000
MAX_FPS = 240
_ARCHIVE = b"PK\x03\x04"
# The longest frame of a steady clip lasts at most this many times the shortest: GIF counts in 1/100 s, cameras vary.
_STEADY = 1.6


@dataclass(frozen=True, eq=False)
class Footage:
    """Frames at a constant rate.

    Attributes:
        frames: (T,H,W,3) uint8, RGB.
        fps: frames per second; None where the source has no times (folders and archives).
    """

    frames: UInt8Array = field(repr=False)
    fps: float | None


def load_clip(path: str | os.PathLike[str], *, max_frames: int | None = None, fps: float | None = None) -> UInt8Array:
    """Read a clip's frames; `read_footage` returns their rate too.

    Args:
        path: file or folder.
        max_frames: maximum number of frames to read.
        fps: frames per second to resample to; default: the clip's own.

    Returns:
        (T,H,W,3) uint8, RGB.

    Raises:
        InputError: the path does not exist, is not a clip, is damaged or too large, or the frames differ in size.
        MissingDependencyError: a video file without PyAV.
    """
    return read_footage(path, max_frames=max_frames, fps=fps).frames


def read_footage(
    path: str | os.PathLike[str],
    *,
    fps: float | None = None,
    max_frames: int | None = None,
    prepare: Prepare | None = None,
) -> Footage:
    """Read a clip, such as the driving clip of a motion transfer, at a constant rate.

    Reads animated GIF, WebP and PNG, video files (needs PyAV), NumPy archives with ``frames``, and folders of pictures
    of equal size, in natural order of their names (``frame_2`` before ``frame_10``). A file's content decides its
    format. The clip keeps its speed: frames are repeated or dropped so that every moment shows the same picture.

    Args:
        path: file or folder.
        fps: frames per second; default: the clip's own rate, which is that of its faster parts if it is not steady.
            A source without times takes this rate as its own.
        max_frames: maximum number of frames to read.
        prepare: called with each frame when it is read; only its result is kept.

    Raises:
        InputError: the path does not exist, is not a clip, is damaged or too large, or the frames differ in size.
        MissingDependencyError: a video file without PyAV.
    """
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}, expected at least 1")
    if fps is not None and not 0 < fps <= MAX_FPS:
        raise InputError(f"fps is {fps}, expected a number above 0 and at most {MAX_FPS}")
    source = user_path(path)
    collector = _Collector(str(source), max_frames, prepare)
    try:
        if source.is_dir():
            return Footage(collector.collect(map(read_image, _pictures_in(source))), fps)
        with open_stream(source, str(source)) as stream:
            head = stream.read(16)
            if head.startswith(_ARCHIVE) or (source.suffix.lower() == ".npz" and format_of(head) is None):
                return Footage(collector.collect(read_frames(stream, str(source), MAX_CLIP_PIXELS)), fps)
            return _resampled(_timed_frames(stream, head, source), collector, fps, max_frames)
    except PictureError as error:
        raise InputError(str(error)) from error


def _timed_frames(stream: BinaryIO, head: bytes, source: Path) -> Iterator[TimedFrame]:
    if not head:
        raise InputError(f"{source} is empty, expected a clip; copy it again")
    found = format_of(head)
    if found is not None and found.name in ANIMATED:
        return animation_frames(stream, str(source))
    if found is not None:
        raise InputError(
            f"{source} is a single picture ({found.name}), not a clip; give a folder of pictures, or a clip"
        )
    if VIDEO_SIGNATURE.match(head) is None and source.suffix.lower() not in VIDEO_ENDINGS:
        raise InputError(
            f"{source} is not a clip that can be read, "
            f"expected {', '.join(ANIMATED)}, a video, an npz archive, or a folder of pictures"
        )
    import_av(f"reading {source.name}")
    return video_frames(stream, str(source))


def import_av(purpose: str) -> None:
    """Check that PyAV is installed.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        import av  # noqa: F401
    except ImportError:
        raise MissingDependencyError("av", purpose, "video") from None


class _Collector:
    """Collects frames, and checks their number and sizes."""

    def __init__(self, name: str, max_frames: int | None, prepare: Prepare | None) -> None:
        self._name, self._max_frames, self._prepare = name, max_frames, prepare
        self._kept: list[UInt8Array] = []
        self._shape: tuple[int, ...] | None = None
        self._last: UInt8Array | None = None

    @property
    def full(self) -> bool:
        return len(self._kept) == self._max_frames

    def add(self, frame: UInt8Array) -> None:
        if self._shape is not None and frame.shape != self._shape:
            first, found = (f"{shape[1]}x{shape[0]}" for shape in (self._shape, frame.shape))
            raise InputError(
                f"frame {len(self._kept)} of {self._name} has {found} pixels, the first {first}; make all equal"
            )
        if frame is not self._last:
            self._last, self._shape = frame, frame.shape
            kept = frame if self._prepare is None else self._prepare(frame)
        else:
            kept = self._kept[-1]
        self._kept.append(kept)
        self.check(len(self._kept))

    def check(self, count: int) -> None:
        height, width = self._kept[0].shape[:2]
        if count > MAX_CLIP_FRAMES or count * height * width > MAX_CLIP_PIXELS:
            raise InputError(
                f"{self._name} has more than {MAX_CLIP_FRAMES:,} frames or {MAX_CLIP_PIXELS:,} pixels in all; "
                "give a shorter or smaller clip, or fewer frames per second"
            )

    def collect(self, frames: Iterable[UInt8Array]) -> UInt8Array:
        for frame in frames:
            self.add(frame)
            if self.full:
                break
        return self.array()

    def array(self, choice: Sequence[int] | None = None) -> UInt8Array:
        """All frames, or those with the indices `choice`."""
        if not self._kept:
            raise InputError(f"{self._name} has no frames")
        if choice is None:
            return np.stack(self._kept)
        self.check(len(choice))
        return np.stack([self._kept[index] for index in choice])


def _resampled(
    timed: Iterator[TimedFrame], collector: _Collector, fps: float | None, max_frames: int | None
) -> Footage:
    if fps is not None:
        default = 1.0 / fps
        timed = (TimedFrame(pixels, default if seconds is None else seconds) for pixels, seconds in timed)
        frames = collector.collect(frame.pixels for frame, count in _counted(timed, fps) for _ in range(count))
        return Footage(frames, fps)
    durations: list[float | None] = []
    for frame in timed:
        collector.add(frame.pixels)
        durations.append(frame.seconds)
        if collector.full:
            break
    known = [seconds for seconds in durations if seconds]
    if not known:
        return Footage(collector.array(), None)
    rate = own_rate(known)
    filled = (TimedFrame(_NOTHING, 1 / rate if seconds is None else seconds) for seconds in durations)
    choice: list[int] = []
    for index, (_, count) in enumerate(_counted(filled, rate)):
        if len(choice) + count > MAX_CLIP_FRAMES:
            collector.check(len(choice) + count)
        choice += [min(index, len(durations) - 1)] * count
    return Footage(collector.array(choice[:max_frames]), rate)


_NOTHING = np.empty(0, np.uint8)


def _counted(timed: Iterable[TimedFrame], fps: float) -> Iterator[tuple[TimedFrame, int]]:
    """Each frame with its number of samples at `fps`; a sample shows the frame at the middle of its interval."""
    end, given, frame = 0.0, 0, None
    for frame in timed:
        end += frame.seconds or 0.0
        until = max(given, int(end * fps + 0.5 + 1e-6)) if end * fps < 2 * MAX_CLIP_FRAMES else 2 * MAX_CLIP_FRAMES
        yield frame, until - given
        given = until
    if frame is not None and given == 0:
        yield frame, 1  # shorter than half a sample


def own_rate(durations: Sequence[float]) -> float:
    """The rate in frames per second, 1 to `MAX_FPS`, of frames with these durations in seconds.

    A steady clip gets its mean rate, so that each frame appears once. Where some frames last much longer than others,
    a quarter of the frames may be faster than the rate, so that pauses lose no motion.
    """
    ordered = sorted(durations)
    steady = ordered[-1] <= _STEADY * ordered[0]
    seconds = sum(ordered) / len(ordered) if steady else ordered[(len(ordered) - 1) // 4]
    # The nearest simple rate: floating-point sums of seconds give 23.9999…
    return min(max(float(Fraction(1 / seconds).limit_denominator(1001)), 1.0), float(MAX_FPS))


def resample(frames: UInt8Array, old: float, new: float) -> UInt8Array:
    """Convert frames (T,H,W,3) from `old` to `new` frames per second, with the same duration."""
    count = max(1, round(len(frames) * new / old))
    chosen = ((np.arange(count) + 0.5) * old / new).astype(np.intp).clip(max=len(frames) - 1)
    resampled: UInt8Array = frames[chosen]
    return resampled


def _pictures_in(folder: Path) -> list[Path]:
    def natural(entry: Path) -> list[tuple[int, str]]:
        return [(int(digits or -1), text) for digits, text in re.findall(r"(\d+)|(\D+)", entry.name)]

    try:
        pictures = [entry for entry in folder.iterdir() if entry.suffix.lower() in PICTURE_ENDINGS]
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}; give a folder of frames") from error
    pictures = [entry for entry in pictures if not entry.name.startswith(".")]
    if not pictures:
        raise InputError(f"{folder} has no pictures ({', '.join(PICTURE_ENDINGS)}); give a folder of frames")
    return sorted(pictures, key=natural)
