"""Clips to and from files: GIF, WebP, MP4, PNG and NumPy archives."""

from __future__ import annotations

import io
import math
import os
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from lfdm_export.errors import InputError, LfdmExportError, MissingDependencyError
from lfdm_export.files.atomic import rehearse, replacing, temporary_folder
from lfdm_export.files.folders import publish
from lfdm_export.files.names import require_utf8, user_name, user_path
from lfdm_export.files.places import destination
from lfdm_export.gif import MAX_FPS as MAX_GIF_FPS
from lfdm_export.gif import encode_gif
from lfdm_export.preprocess import UNREADABLE, pil_to_rgb, read_image

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
ClipFormat = Literal["gif", "webp", "mp4", "png", "npz"]

FORMATS: tuple[str, ...] = get_args(ClipFormat)
PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
ANIMATION_ENDINGS = (".gif", ".webp", ".png", ".apng")
VIDEO_ENDINGS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg")
MAX_FPS = 240
#: A clip that is read may have at most so many frames, and so many pixels in all of them.
MAX_CLIP_FRAMES = 10_000
MAX_CLIP_PIXELS = 200_000_000
_CONTACT_SHEET_ASPECT = 1.6
_CONTACT_SHEET_GAP = 2


# --- Writing -------------------------------------------------------------------------------------


def save_clip(
    path: str | os.PathLike[str],
    frames: UInt8Array,
    *,
    fps: float = 10.0,
    format: ClipFormat | None = None,  # noqa: A002 (the word that users look for)
    lossless: bool = False,
    latent: Float32Array | None = None,
    warped: UInt8Array | None = None,
) -> Path:
    """Write a clip to a file that replaces an older one only once it is whole.

    A link stays, and what it leads to is replaced; devices and pipes are written to.

    The format follows the file's ending:

    - ``.gif``: loops, one palette for the clip.
    - ``.webp``: loops, true colour.
    - ``.mp4``: H.264, yuv420p; a last row or column is repeated where a size is odd. Needs PyAV.
    - ``.png``: a contact sheet, frames in reading order.
    - a path that ends in ``/`` (or any path with ``format="png"`` that has no ending): a new folder
      of ``frame_000.png`` and so on.
    - ``.npz``: ``frames`` and, if given, ``latent`` and ``warped``, all as they are.

    Args:
        path: where to; missing folders are made, ``~`` is the home folder.
        frames: (T,H,W,3); for npz also (B,T,H,W,3).
        fps: frames a second, above 0 and at most 240 (GIF: 50).
        format: overrides the ending.
        lossless: WebP without loss.
        latent: (B,3,T,h,w), for npz only.
        warped: like `frames`, for npz only.

    Returns:
        The path written.

    Raises:
        InputError: an unknown ending, frames of another shape or type, fps out of range, a folder of
            frames that is there already, or a path that cannot be written.
        MissingDependencyError: MP4 without PyAV.
    """
    target, (chosen, as_folder) = user_path(path), check_output(path, format=format, fps=fps)
    _check_frames(frames, chosen)
    with _told(target):
        if as_folder:
            _write_numbered(target, frames)
        else:
            arrays = {"frames": frames, "latent": latent, "warped": warped}
            with replacing(target) as stream:
                encode_clip(stream, chosen, arrays, fps, lossless=lossless)
    return target


def check_output(
    path: str | os.PathLike[str],
    *,
    format: ClipFormat | None = None,  # noqa: A002 (the word that users look for)
    fps: float = 10.0,
) -> tuple[str, bool]:
    """The format that a path asks for, and whether it names a folder of numbered frames.

    Raises:
        InputError: an unknown ending, fps out of range, or a folder of frames that is there already.
    """
    target = user_path(path)
    as_folder = user_name(path).endswith(("/", os.sep)) or (format == "png" and not target.suffix)
    chosen = _output_format(target, "png" if as_folder and format is None else format)
    if not 0 < fps <= MAX_FPS or (chosen == "gif" and fps > MAX_GIF_FPS):
        limit = MAX_GIF_FPS if chosen == "gif" else MAX_FPS
        raise InputError(f"fps is {fps}, expected a number above 0 and at most {limit} for {chosen}")
    if as_folder and chosen != "png":
        raise InputError(
            f"{os.fspath(path)} names a folder, which only numbered png frames can fill; give a file for {chosen}"
        )
    with _told(target):
        if as_folder and target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{target} exists and is not an empty folder; give a new one for the numbered frames")
    return chosen, as_folder


def rehearse_output(path: str | os.PathLike[str], *, as_folder: bool) -> None:
    """Find out whether a file, or a folder of frames, could be written; what is there stays untouched.

    Raises:
        InputError: it could not.
    """
    target = user_path(path)
    with _told(target):
        rehearse(target, as_folder=as_folder)


def encode_clip(
    stream: BinaryIO, chosen: str, arrays: dict[str, npt.NDArray[Any] | None], fps: float, *, lossless: bool = False
) -> None:
    """Write a clip to a stream.

    Args:
        stream: need not be positioned.
        chosen: the format.
        arrays: ``frames`` (T,H,W,3) uint8; what else there is goes into npz alone.
        fps: frames per second.
        lossless: WebP without loss.

    Raises:
        InputError: the frames cannot be encoded.
        MissingDependencyError: MP4 without PyAV.
    """
    frames = arrays["frames"]
    assert frames is not None
    if chosen == "npz":
        _write_npz(stream, arrays)
    elif chosen == "gif":
        stream.write(encode_gif(frames, fps))
    elif chosen == "webp":
        _write_webp(stream, frames, fps, lossless=lossless)
    elif chosen == "mp4":
        _write_mp4(stream, frames, fps)
    else:
        Image.fromarray(contact_sheet(frames)).save(stream, "PNG")


def _write_numbered(target: Path, frames: UInt8Array) -> None:
    """A new folder of numbered frames, or an empty one that is filled."""
    place = destination(target).path
    with temporary_folder(place) as part:
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(part / f"frame_{index:03d}.png")
        publish(part, place)


def _output_format(target: Path, requested: str | None) -> str:
    found = target.suffix.lower().removeprefix(".") if requested is None else requested
    if found not in FORMATS:
        what = f"the ending of {target}" if requested is None else f"the format {requested!r}"
        raise InputError(f"{what} is none that clips are written as; use one of {', '.join(FORMATS)}")
    return found


def _check_frames(frames: UInt8Array, chosen: str) -> None:
    dimensions, expected = ((4, 5), "(T,H,W,3) or (B,T,H,W,3)") if chosen == "npz" else ((4,), "(T,H,W,3)")
    if not isinstance(frames, np.ndarray) or frames.ndim not in dimensions or frames.shape[-1] != 3 or frames.size == 0:
        shape = getattr(frames, "shape", type(frames).__name__)
        raise InputError(f"frames have shape {shape}, expected {expected} for {chosen}; save samples one by one")
    if frames.dtype != np.uint8:
        raise InputError(f"frames have values of type {frames.dtype}, expected uint8 in 0..255")


@contextmanager
def _told(target: Path) -> Iterator[None]:
    """What writing raises, as an error that names the target."""
    try:
        yield
    except LfdmExportError:
        raise
    except (OSError, ValueError, struct.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{target} cannot be written: {reason}; choose another path or format") from error


def contact_sheet(frames: UInt8Array) -> UInt8Array:
    """All frames (T,H,W,3) in reading order on one picture, white between them: (rows,columns,3) uint8."""
    count, height, width = frames.shape[:3]
    columns = min(count, max(1, round(math.sqrt(count * _CONTACT_SHEET_ASPECT * height / width))))
    rows = math.ceil(count / columns)
    down, across = height + _CONTACT_SHEET_GAP, width + _CONTACT_SHEET_GAP
    sheet = np.full((rows * down - _CONTACT_SHEET_GAP, columns * across - _CONTACT_SHEET_GAP, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        top, left = index // columns * down, index % columns * across
        sheet[top : top + height, left : left + width] = frame
    return sheet


def _write_npz(stream: BinaryIO, arrays: dict[str, npt.NDArray[Any] | None]) -> None:
    given = {name: array for name, array in arrays.items() if array is not None}
    np.savez_compressed(stream, **given)  # type: ignore[arg-type]  # a name could be `allow_pickle`; these are not


def _write_webp(stream: BinaryIO, clip: UInt8Array, fps: float, *, lossless: bool) -> None:
    first, *others = (Image.fromarray(frame) for frame in clip)
    ends = [round(index * 1000 / Fraction(fps)) for index in range(len(clip) + 1)]
    durations = np.diff(ends).tolist()
    first.save(
        stream, "WEBP", save_all=True, append_images=others, duration=durations, loop=0, lossless=lossless, quality=92
    )


def _import_av(purpose: str) -> Any:
    try:
        import av
    except ImportError:
        raise MissingDependencyError("av", purpose, "video") from None
    return av


def _write_mp4(target: BinaryIO, clip: UInt8Array, fps: float) -> None:
    av = _import_av("writing an mp4 file")
    if "libx264" not in av.codecs_available:
        raise InputError("this build of PyAV has no H.264 encoder (libx264); install PyAV's own wheel, or write webp")
    height, width = clip.shape[1:3]
    even = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))  # yuv420p halves both sides of the colours
    padded = np.pad(clip, even, mode="edge")
    buffer = io.BytesIO()

    def written_so_far(*_: object) -> BinaryIO:  # to move the index to the front, it is read while it is written
        return io.BytesIO(buffer.getvalue())

    try:
        with av.open(buffer, "w", format="mp4", options={"movflags": "faststart"}, io_open=written_so_far) as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = padded.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "16", "preset": "medium"}
            for frame in padded:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode(None))
    except av.FFmpegError as error:
        raise InputError(
            f"the clip of {width}x{height} pixels cannot be encoded as mp4 ({error}); write webp"
        ) from error
    target.write(buffer.getbuffer())


# --- Reading -------------------------------------------------------------------------------------


def load_clip(path: str | os.PathLike[str], *, max_frames: int | None = None) -> UInt8Array:
    """Read a clip, such as one that drives a motion transfer.

    Reads animated GIF, WebP and PNG (frames that stay longer than the shortest one are repeated
    accordingly), video files (needs PyAV), NumPy archives with ``frames``, and folders of
    equally large pictures, in natural order of their names (``frame_2`` before ``frame_10``).

    Args:
        path: file or folder.
        max_frames: stop after so many frames.

    Returns:
        (T,H,W,3) uint8, RGB.

    Raises:
        InputError: no such file, no clip, damaged, too large, or frames of different sizes.
        MissingDependencyError: a video file without PyAV.
    """
    source = user_path(path)
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames is {max_frames}, expected at least 1")
    if not source.exists():
        raise InputError(f"{source} does not exist; give a clip, or a folder of pictures")
    ending = source.suffix.lower()
    if source.is_dir():
        return _stack(map(read_image, _pictures_in(source)), source, max_frames)
    if ending == ".npz":
        return _read_npz(source, max_frames)
    if ending in VIDEO_ENDINGS:
        return _stack(_video_frames(source), source, max_frames)
    if ending in ANIMATION_ENDINGS:
        return _read_animation(source, max_frames)
    known = ", ".join(sorted({*ANIMATION_ENDINGS, *VIDEO_ENDINGS, ".npz"}))
    raise InputError(f"the ending of {source} is none that clips are read from; expected one of {known}, or a folder")


def _stack(frames: Iterable[UInt8Array], source: Path, max_frames: int | None) -> UInt8Array:
    """Frames as one array, counted and measured while they come in."""
    kept: list[UInt8Array] = []
    for frame in frames:
        if kept and frame.shape != kept[0].shape:
            sizes = [f"{shape[1]}x{shape[0]}" for shape in (kept[0].shape, frame.shape)]
            raise InputError(
                f"frame {len(kept)} of {source} has {sizes[1]} pixels, the first {sizes[0]}; make all equal"
            )
        kept.append(frame)
        _check_extent(len(kept), frame.shape, source)
        if len(kept) == max_frames:
            break
    if not kept:
        raise InputError(f"{source} has no frames")
    return np.stack(kept)


def _check_extent(count: int, shape: Sequence[int], source: Path) -> None:
    if count > MAX_CLIP_FRAMES or count * shape[0] * shape[1] > MAX_CLIP_PIXELS:
        raise InputError(
            f"{source} has more than {MAX_CLIP_FRAMES:,} frames or {MAX_CLIP_PIXELS:,} pixels in all; "
            "give a shorter or smaller clip"
        )


def _pictures_in(folder: Path) -> list[Path]:
    def natural(entry: Path) -> list[tuple[int, str]]:
        return [(int(digits or -1), text) for digits, text in re.findall(r"(\d+)|(\D+)", entry.name)]

    pictures = [entry for entry in folder.iterdir() if entry.suffix.lower() in PICTURE_ENDINGS]
    if not pictures:
        raise InputError(f"{folder} has no pictures ({', '.join(PICTURE_ENDINGS)}); give a folder of frames")
    return sorted((entry for entry in pictures if not entry.name.startswith(".")), key=natural)


def _read_animation(source: Path, max_frames: int | None) -> UInt8Array:
    durations: list[float] = []

    def frames(image: Image.Image) -> Iterator[UInt8Array]:
        for index in range(getattr(image, "n_frames", 1)):
            image.seek(index)
            pixels = pil_to_rgb(image, str(source))
            durations.append(float(image.info.get("duration", 0)))
            yield pixels

    try:
        with Image.open(source) as image:
            if image.format == "PNG" and not getattr(image, "is_animated", False):
                raise InputError(
                    f"{source} is a single picture, not a clip; give a folder of pictures, or an animation"
                )
            clip = _stack(frames(image), source, max_frames)
    except LfdmExportError:
        raise
    except UNREADABLE as error:
        raise InputError(f"{source} cannot be read as a clip ({error})") from error
    shortest = min((duration for duration in durations if duration > 0), default=0.0)
    repeats = [max(1, round(duration / shortest)) if duration > 0 else 1 for duration in durations]
    _check_extent(min(sum(repeats), max_frames or sum(repeats)), clip.shape[1:], source)
    return np.repeat(clip, repeats, axis=0)[:max_frames] if sum(repeats) > len(clip) else clip


def _read_npz(source: Path, max_frames: int | None) -> UInt8Array:
    try:
        with np.load(source, allow_pickle=False) as archive:
            if "frames" not in archive.files:
                found = ", ".join(archive.files) or "nothing"
                raise InputError(f"{source} holds {found}, expected an array named frames")
            # Measured before it is unpacked.
            if archive.zip.getinfo("frames.npy").file_size > 3 * MAX_CLIP_PIXELS + 1024:
                _check_extent(MAX_CLIP_FRAMES + 1, (1, 1), source)
            frames = archive["frames"]
    except LfdmExportError:
        raise
    except (*UNREADABLE, KeyError, zipfile.BadZipFile) as error:
        raise InputError(f"{source} cannot be read as a NumPy archive ({error})") from error
    clip = frames[0] if frames.ndim == 5 and len(frames) == 1 else frames
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or clip.size == 0:
        raise InputError(
            f"frames in {source} have shape {frames.shape} and type {frames.dtype}, expected (T,H,W,3) of uint8"
        )
    _check_extent(len(clip), clip.shape[1:], source)
    return np.array(clip[:max_frames])


def _video_frames(source: Path) -> Iterator[UInt8Array]:
    av = _import_av(f"reading {source.name}")
    try:
        with av.open(require_utf8(source, "PyAV")) as container:
            if not container.streams.video:
                raise InputError(f"{source} has no video; give a clip with pictures")
            for frame in container.decode(container.streams.video[0]):
                pixels = frame.to_ndarray(format="rgb24")
                # Cameras held upright store lying pictures and the turn, counter-clockwise, beside them.
                yield np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))
    except av.FFmpegError as error:
        raise InputError(f"{source} cannot be read as a video ({error})") from error
