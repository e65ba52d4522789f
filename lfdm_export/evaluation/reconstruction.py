"""Measures how well the LFAE of a bundle rebuilds clips from their own motion.

The published protocol of the LFAE: mean L1 between real and rebuilt frames, with the first frame as the reference
image. The baseline copies that frame.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.generate.driving import estimate_motion
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.preprocess import to_float

UInt8Array = NDArray[np.uint8]
Float32Array = NDArray[np.float32]
Float64Array = NDArray[np.float64]


@dataclass(frozen=True)
class Reconstruction:
    """How well the LFAE rebuilds clips from their first frame; mean absolute differences of colors in [0, 1].

    Attributes:
        clips: number of clips.
        frame: difference of rebuilt frames.
        warped: difference of the first frame warped by the flow alone.
        copied: difference of the unchanged first frame.
        by_label: `frame` divided by `copied`, for the clips of each label; without labels whose clips do not move.
    """

    clips: int
    frame: float
    warped: float
    copied: float
    by_label: dict[str, float]

    @property
    def ratio(self) -> float:
        """`frame` divided by `copied`."""
        return self.frame / self.copied


def rebuild(pipeline: Pipeline, frames: UInt8Array) -> tuple[Float32Array, Float32Array]:
    """Rebuild a clip (T, H, W, 3) uint8 from its first frame and its own motion.

    Returns:
        Rebuilt frames, and the first frame warped: both (T, 3, H, W) float32 in [0, 1].

    Raises:
        EngineError: an engine cannot be loaded or fails.
    """
    encoded = pipeline.encode(frames[0])
    latent = estimate_motion(pipeline.stages, frames[:1], frames, None)
    rebuilt, warped = (pictures[0].transpose(1, 0, 2, 3) for pictures in pipeline.decode(encoded, latent))
    return rebuilt, warped


def differences(frames: UInt8Array, rebuilt: Float32Array, warped: Float32Array) -> tuple[float, float, float]:
    """Mean absolute differences from a clip: of rebuilt and warped frames (from `rebuild`), and of its first frame.

    The first frame is the reference image, so it does not count.
    """
    clip = to_float(frames)
    found = (rebuilt, warped, np.repeat(clip[:1], len(clip), 0))
    frame, warp, copied = (float(np.abs(one[1:] - clip[1:]).mean()) for one in found)
    return frame, warp, copied


def summarize(errors: Float64Array, labels: Sequence[str]) -> Reconstruction:
    """Average `differences` of N clips, (N, 3), whose labels are `labels`.

    Raises:
        InputError: no clip moves.
    """
    frame, warp, copied = errors.mean(axis=0)
    if copied == 0:
        raise InputError(f"none of {len(errors)} clips moves: each repeats its first frame; give clips that move")
    means = {
        label: errors[[name == label for name in labels]][:, [0, 2]].mean(axis=0) for label in dict.fromkeys(labels)
    }
    by_label = {label: float(rebuilt / still) for label, (rebuilt, still) in means.items() if still > 0}
    return Reconstruction(len(errors), float(frame), float(warp), float(copied), by_label)
