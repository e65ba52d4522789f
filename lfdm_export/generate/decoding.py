"""Decode a latent into frames, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.generate.encoded import Encoded
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.preprocess import to_uint8
from lfdm_export.progress import Progress, report

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]


def chunk_starts(frames: int, chunk: int) -> Iterator[tuple[int, int]]:
    """First frame of each chunk, and how many of its frames belong to an earlier chunk.

    Args:
        frames: frames of the clip.
        chunk: frames per run of `decode`.
    """
    for start in range(0, frames, chunk):
        begin = max(0, min(start, frames - chunk))
        yield begin, start - begin


def decode_chunks(
    stages: StageRunner, encoded: Encoded, latent: Float32, progress: Progress | None
) -> Iterator[tuple[int, Float32, Float32]]:
    """Decode a latent in chunks; an incomplete last chunk overlaps the one before.

    Args:
        stages: runs `decode`.
        encoded: encoder results for B images.
        latent: (B, 3, T, h, w) float32, with any number of frames T.
        progress: called as ``progress("decode", frames done, T)``.

    Yields:
        First frame, frames and warped images (B, 3, F, H, W) of each chunk, float32 in [0, 1].

    Raises:
        InputError: the latent has another shape or dtype, or is not finite.
        EngineError: the engine cannot be loaded or fails.
    """
    geometry = stages.bundle.manifest.geometry
    batch, expected = len(encoded.image), (3, geometry.latent_size, geometry.latent_size)
    shape = latent.shape
    if latent.ndim != 5 or (shape[0], shape[1], *shape[3:]) != (batch, *expected) or shape[2] < 1:
        raise InputError(f"latent has shape {shape}, expected ({batch}, 3, frames, {expected[1]}, {expected[2]})")
    if latent.dtype != np.float32 or not np.isfinite(latent).all():
        raise InputError(f"latent is {latent.dtype}, expected float32 and all values finite")
    frames, chunk = shape[2], geometry.chunk_frames
    if frames < chunk:
        latent = np.concatenate([latent, np.repeat(latent[:, :, -1:], chunk - frames, axis=2)], axis=2)
    report(progress, "decode", 0, frames)
    starts = list(chunk_starts(frames, chunk))
    parts = [latent[:, :, begin : begin + chunk] for begin, _ in starts]
    runs = stages.run_each("decode", (encoded.image, *encoded.skips), parts)
    for (begin, given), decoded in zip(starts, runs, strict=True):
        some_frames, some_warped = (images[:, :, : frames - begin] for images in decoded)
        yield begin, some_frames, some_warped
        report(progress, "decode", min(begin + given + chunk, frames), frames)


def decode_clip(
    stages: StageRunner, prepared: UInt8, encoded: Encoded, latent: Float32, progress: Progress | None
) -> Clip:
    """Decode into 8-bit pictures chunk by chunk, so that no clip is stored as float32."""
    size = stages.bundle.manifest.geometry.image_size
    batch, frame_count = latent.shape[0], latent.shape[2]
    frames, warped = (np.empty((batch, frame_count, size, size, 3), np.uint8) for _ in range(2))
    for start, some_frames, some_warped in decode_chunks(stages, encoded, latent, progress):
        part = slice(start, start + some_frames.shape[2])
        frames[:, part], warped[:, part] = to_uint8(some_frames), to_uint8(some_warped)
    return Clip(
        frames=frames,
        warped=warped,
        latent=latent,
        source=np.repeat(prepared, batch // len(prepared), axis=0),
        residual_flow=stages.bundle.manifest.config.residual_flow,
    )
