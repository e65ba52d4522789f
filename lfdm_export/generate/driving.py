"""Motion transfer: the frames of a driving clip, and the latent that the LFAE estimates from them."""

from __future__ import annotations

import functools
import os
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.errors import InputError
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.pictures.clips import Footage, read_footage
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.preprocess import prepare_image, to_float
from lfdm_export.progress import Progress, report
from lfdm_export.stages import DRIVE_STAGE

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]

#: Driving frames per run of `estimate_motion`.
_MOTION_BATCH = 8


def prepare_footage(
    driving_clip: str | os.PathLike[str] | UInt8, fps: float | None, crop: Crop | None, manifest: Manifest
) -> Footage:
    """The frames of a driving clip as inputs of the model, (T, size, size, 3) uint8, and their rate.

    Args:
        driving_clip: a path, or (T, H, W, 3) uint8.
        fps: frames per second to resample to; None keeps the rate of the clip.
        crop: crop of the image; if there is one, the frames are cropped to their middle.
        manifest: manifest of the bundle, with size and rule of preparation.

    Raises:
        InputError: the clip is not valid.
    """
    middle: Crop | None = None if crop is None else "center"
    prepare = functools.partial(
        prepare_image, size=manifest.geometry.image_size, preprocessing=manifest.preprocessing, crop=middle
    )
    if not isinstance(driving_clip, np.ndarray):
        return read_footage(driving_clip, fps=fps, prepare=prepare)
    if driving_clip.ndim != 4 or len(driving_clip) == 0:
        raise InputError(f"driving_clip has shape {driving_clip.shape}, expected (T,H,W,3)")
    return Footage(np.stack([prepare(frame) for frame in driving_clip]), fps)


def estimate_motion(stages: StageRunner, prepared: UInt8, driving: UInt8, progress: Progress | None) -> Float32:
    """The latent (1, 3, T, h, w) of the motion from an image to each driving frame.

    Args:
        stages: runs `estimate_motion`.
        prepared: (1, H, W, 3) uint8, the image.
        driving: (T, H, W, 3) uint8.
        progress: called as ``progress("estimate_motion", frames done, T)``.

    Raises:
        EngineError: the engine cannot be loaded or fails.
    """
    source, latents = to_float(prepared), []
    report(progress, DRIVE_STAGE, 0, len(driving))
    for start in range(0, len(driving), _MOTION_BATCH):
        part = to_float(driving[start : start + _MOTION_BATCH])
        (latent,) = stages.run(DRIVE_STAGE, np.repeat(source, len(part), axis=0), part)
        latents.append(latent)
        report(progress, DRIVE_STAGE, start + len(part), len(driving))
    return np.ascontiguousarray(np.concatenate(latents).transpose(1, 0, 2, 3))[None]
