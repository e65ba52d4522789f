"""Clips to files: GIF, WebP, MP4, PNG and NumPy archives. `lfdm_export.pictures.clips` reads them."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from lfdm_export.errors import InputError, LfdmExportError
from lfdm_export.files.atomic import rehearse, replacing, temporary_folder
from lfdm_export.files.folders import publish
from lfdm_export.files.names import user_name, user_path
from lfdm_export.files.places import destination
from lfdm_export.pictures.clips import MAX_FPS, import_av
from lfdm_export.pictures.clips import load_clip as load_clip
from lfdm_export.pictures.gif import MAX_FPS as MAX_GIF_FPS
from lfdm_export.pictures.gif import encode_gif
from lfdm_export.pictures.metadata import ARRAY, archive_text, exif_text, png_text, to_text

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
ClipFormat = Literal["gif", "webp", "mp4", "png", "npz", "motion"]

FORMATS: tuple[str, ...] = get_args(ClipFormat)
#: GIF stores at most 655 s per frame, and MP4 no rate that is closer to 0 than 1/1001.
MIN_FPS = 0.01
#: Formats that hold arrays; all others hold pictures.
ARCHIVES: tuple[str, ...] = ("npz", "motion")
_CONTACT_SHEET_ASPECT = 1.6
_CONTACT_SHEET_GAP = 2


def save_clip(
    path: str | os.PathLike[str],
    frames: UInt8Array,
    *,
    fps: float = 10.0,
    format: ClipFormat | None = None,  # noqa: A002 (the word that users look for)
    lossless: bool = False,
    latent: Float32Array | None = None,
    warped: UInt8Array | None = None,
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Write a clip to a file, which replaces an older one only when it is complete.

    A link stays and its target is replaced; devices and pipes are written to.

    The format follows the file's ending:

    - ``.gif``: loops, one palette for the clip.
    - ``.webp``: loops, true color.
    - ``.mp4``: H.264, yuv420p; the last row or column of an odd size is repeated. Needs PyAV.
    - ``.png``: a contact sheet, frames in reading order.
    - a path that ends in ``/`` (or any path with ``format="png"`` that has no ending): a new folder
      of ``frame_000.png`` and so on.
    - ``.npz``: ``frames`` and, if given, ``latent`` and ``warped``, unchanged.
    - ``.motion``: an archive of ``latent`` alone, see `lfdm_export.pictures.motion`.

    Args:
        path: the file; missing folders are created, ``~`` is the home folder.
        frames: (T,H,W,3) uint8; for npz also (B,T,H,W,3).
        fps: frames per second, 0.01 to 240 (GIF: 50).
        format: overrides the ending.
        lossless: WebP without loss.
        latent: (B,3,T,h,w) for npz, (3,T,h,w) for motion; other formats ignore it.
        warped: like `frames`, for npz only.
        metadata: how the clip was made, plain JSON values; see `lfdm_export.pictures.metadata`.

    Returns:
        The path written.

    Raises:
        InputError: an unknown ending, frames of another shape or type, fps out of range, an existing folder of
            frames, or a path that cannot be written.
        MissingDependencyError: MP4 without PyAV.
    """
    target, (chosen, as_folder) = user_path(path), check_output(path, format=format, fps=fps)
    _check_frames(frames, chosen)
    if chosen == "motion" and latent is None:
        raise InputError("a motion is a latent, found none; give the latent, or choose another format")
    text = to_text(metadata) if metadata else ""
    with _naming(target):
        if as_folder:
            _write_numbered(target, frames, text)
        else:
            arrays = {"frames": frames, "latent": latent, "warped": warped}
            with replacing(target) as stream:
                encode_clip(stream, chosen, arrays, fps, lossless=lossless, text=text)
    return target


def check_output(
    path: str | os.PathLike[str],
    *,
    format: ClipFormat | None = None,  # noqa: A002 (the word that users look for)
    fps: float = 10.0,
) -> tuple[str, bool]:
    """The format of a path, and whether it names a folder of numbered frames.

    Raises:
        InputError: an unknown ending, fps out of range, or an existing folder of frames.
    """
    target = user_path(path)
    with _naming(target):
        device = target.exists() and not (target.is_file() or target.is_dir())
    as_folder = user_name(path).endswith(("/", os.sep)) or (format == "png" and not target.suffix and not device)
    chosen = _output_format(target, "png" if as_folder and format is None else format)
    if not 0 < fps <= MAX_FPS or (chosen == "gif" and fps > MAX_GIF_FPS):
        limit = MAX_GIF_FPS if chosen == "gif" else MAX_FPS
        raise InputError(f"fps is {fps}, expected a number above 0 and at most {limit} for {chosen}")
    if fps < MIN_FPS:
        raise InputError(f"fps is {fps}, expected at least {MIN_FPS}; a clip file stores no longer frames")
    if as_folder and chosen != "png":
        raise InputError(
            f"{user_name(path)} names a folder, which only numbered png frames can fill; give a file for {chosen}"
        )
    with _naming(target):
        if as_folder and target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise InputError(f"{target} exists and is not an empty folder; give a new one for the numbered frames")
    return chosen, as_folder


def rehearse_output(path: str | os.PathLike[str], *, as_folder: bool) -> None:
    """Check that a file, or a folder of frames, could be written; existing files stay untouched.

    Raises:
        InputError: it could not.
    """
    target = user_path(path)
    with _naming(target):
        rehearse(target, as_folder=as_folder)


def encode_clip(
    stream: BinaryIO,
    chosen: str,
    arrays: dict[str, npt.NDArray[Any] | None],
    fps: float,
    *,
    lossless: bool = False,
    text: str = "",
) -> None:
    """Write a clip to a stream.

    Args:
        stream: the output; it need not be seekable.
        chosen: the format.
        arrays: ``frames`` (T,H,W,3) uint8; all others go into archives only.
        fps: frames per second.
        lossless: WebP without loss.
        text: from `lfdm_export.pictures.metadata.to_text`; "" for none.

    Raises:
        InputError: the frames cannot be encoded.
        MissingDependencyError: MP4 without PyAV.
    """
    frames = arrays["frames"]
    assert frames is not None
    if chosen in ARCHIVES:
        kept = arrays if chosen == "npz" else {"latent": arrays["latent"]}
        _write_npz(stream, {**kept, ARRAY: archive_text(text) if text else None})
    elif chosen == "gif":
        stream.write(encode_gif(frames, fps, text))
    elif chosen == "webp":
        _write_webp(stream, frames, fps, lossless=lossless, text=text)
    elif chosen == "mp4":
        _write_mp4(stream, frames, fps, text)
    else:
        Image.fromarray(contact_sheet(frames)).save(stream, "PNG", pnginfo=png_text(text) if text else None)


def _write_numbered(target: Path, frames: UInt8Array, text: str) -> None:
    """Write numbered frames into a new or an empty folder."""
    place = destination(target).path

    def still_free() -> None:  # another run may have written its frames in the meantime
        if place.exists() and any(place.iterdir()):
            raise InputError(f"{target} was filled by another program; give a new folder for the numbered frames")

    with temporary_folder(place) as part:
        for index, frame in enumerate(frames):
            Image.fromarray(frame).save(
                part / f"frame_{index:03d}.png", "PNG", pnginfo=png_text(text) if text else None
            )
        publish(part, place, check=still_free)


def _output_format(target: Path, requested: str | None) -> str:
    found = target.suffix.lower().removeprefix(".") if requested is None else requested
    if found not in FORMATS:
        what = f"the ending of {target}" if requested is None else f"the format {requested!r}"
        raise InputError(f"{what} is not a clip format; use one of {', '.join(FORMATS)}")
    return found


def _check_frames(frames: UInt8Array, chosen: str) -> None:
    dimensions, expected = ((4, 5), "(T,H,W,3) or (B,T,H,W,3)") if chosen == "npz" else ((4,), "(T,H,W,3)")
    if not isinstance(frames, np.ndarray) or frames.ndim not in dimensions or frames.shape[-1] != 3 or frames.size == 0:
        shape = getattr(frames, "shape", type(frames).__name__)
        raise InputError(f"frames have shape {shape}, expected {expected} for {chosen}; save samples one by one")
    if frames.dtype != np.uint8:
        raise InputError(f"frames have values of type {frames.dtype}, expected uint8 in 0..255")


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Turn exceptions of writing into an error that names the target."""
    try:
        yield
    except LfdmExportError:
        raise
    except (OSError, ValueError, struct.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{target} cannot be written: {reason}; choose another path or format") from error


def contact_sheet(frames: UInt8Array) -> UInt8Array:
    """All frames (T,H,W,3) in reading order in one picture, with white gaps: (rows,columns,3) uint8."""
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


def _write_webp(stream: BinaryIO, clip: UInt8Array, fps: float, *, lossless: bool, text: str) -> None:
    first, *others = (Image.fromarray(frame) for frame in clip)
    ends = [round(index * 1000 / Fraction(fps)) for index in range(len(clip) + 1)]
    durations = np.diff(ends).tolist()
    first.save(
        stream,
        "WEBP",
        save_all=True,
        append_images=others,
        duration=durations,
        loop=0,
        lossless=lossless,
        quality=92,
        exif=exif_text(text) if text else b"",
    )


def _write_mp4(target: BinaryIO, clip: UInt8Array, fps: float, text: str) -> None:
    import_av("writing an mp4 file")
    import av

    if "libx264" not in av.codecs_available:
        raise InputError("this build of PyAV has no H.264 encoder (libx264); install PyAV's own wheel, or write webp")
    height, width = clip.shape[1:3]
    even = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))  # yuv420p halves both axes of the colors
    padded = np.pad(clip, even, mode="edge")
    buffer = io.BytesIO()

    def written_so_far(*_: object) -> BinaryIO:  # PyAV reads the file while it moves the index to the front
        return io.BytesIO(buffer.getvalue())

    try:
        with av.open(buffer, "w", format="mp4", options={"movflags": "faststart"}, io_open=written_so_far) as container:
            if text:
                container.metadata["comment"] = text
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
