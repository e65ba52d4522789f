"""Previews: some frames as the clip would be by the estimate that a sampling step gave."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.generate.decoding import decode_chunks
from lfdm_export.generate.encoded import Encoded
from lfdm_export.generate.stage_runner import OnEstimate, StageRunner
from lfdm_export.ops.warp.on_host import warped_images
from lfdm_export.pictures.preprocess import to_uint8

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Previews:
    """Asks for previews while a clip is sampled.

    Attributes:
        every: interval of the previews in steps; none after the last step.
        indices: (n,) integers, the frames of the clip that are shown. Each costs its decoding, unless `warped` is set.
        show: called with the steps done, the steps there are, and those frames, (B, n, H, W, 3) uint8.
        warped: show the image moved by the flow alone, which costs no decoding.
    """

    every: int
    indices: NDArray[np.integer[Any]]
    show: Callable[[int, int, UInt8], None]
    warped: bool = False

    def __post_init__(self) -> None:
        """Check `every`.

        Raises:
            InputError: it is not a number of steps.
        """
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise InputError(f"previews every {self.every!r} steps, expected an integer from 1")

    def on_estimate(self, stages: StageRunner, encoded: Encoded, steps: int) -> OnEstimate:
        """Return the function that sampling calls after each step.

        Args:
            stages: run `decode`.
            encoded: of B images.
            steps: that there are.
        """

        def show(index: int, estimate: Float32) -> None:
            done = index + 1
            if done < steps and done % self.every == 0:
                some = np.ascontiguousarray(estimate[:, :, self.indices])
                if self.warped:
                    residual_flow = stages.bundle.manifest.config.residual_flow
                    frames = warped_images(encoded.image, some, residual_flow=residual_flow)
                else:
                    parts = decode_chunks(stages, encoded, some, None)
                    frames = np.concatenate([frames for _, frames, _ in parts], axis=2)
                self.show(done, steps, to_uint8(frames))

        return show
