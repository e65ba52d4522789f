"""Encode images: the output of the encoder, which all frames and steps of a clip share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.progress import Progress, report
from lfdm_export.wording import count

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, eq=False, repr=False)
class Encoded:
    """The output of the encoder, which all frames and steps of a clip share.

    Attributes:
        image: (B, 3, H, W) float32 in [0, 1].
        skips: the encoder's outputs, full size first; the last is `feature`.
        context: (B, C, h, w) float32, the UNet's response to the feature.
    """

    image: Float32
    skips: tuple[Float32, ...]
    context: Float32

    def __repr__(self) -> str:
        height, width = self.image.shape[2:]
        return f"<Encoded: {count(len(self.image), 'image')} of {width}x{height}>"

    def repeat(self, batch: int) -> Encoded:
        """Repeat a single image for `batch` samples."""
        if len(self.image) == batch:
            return self
        skips = tuple(np.repeat(skip, batch, axis=0) for skip in self.skips)
        return Encoded(np.repeat(self.image, batch, axis=0), skips, np.repeat(self.context, batch, axis=0))


def encode_images(stages: StageRunner, prepared: UInt8, progress: Progress | None) -> Encoded:
    """Encode prepared images.

    Args:
        stages: runs `encode`.
        prepared: (B, H, W, 3) uint8.
        progress: called as ``progress("encode", runs done, 1)``.

    Raises:
        EngineError: the engine cannot be loaded or fails.
    """
    report(progress, "encode", 0, 1)
    image = to_float(prepared)
    *skips, context = stages.run("encode", image)
    report(progress, "encode", 1, 1)
    return Encoded(image, tuple(skips), context)
