"""What every backend's engine is to those who use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lfdm_export.engines.checks import Array
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import StageSpec

Float32: TypeAlias = NDArray[np.float32]


class Engine(Protocol):
    """One loaded stage."""

    spec: StageSpec

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run it once, on exactly the stage's inputs, by name; gives its outputs, by name."""


class StateLoop(Protocol):
    """Chains of a sampling stage for one batch size, whose state stays where the engine runs.

    A chain is ``begin``, ``step`` for each row of the table, ``finish``; ``latent`` may be asked for in between.
    """

    def begin(self, start: Float32, fixed: Mapping[str, Array], table: SamplerTable) -> None:
        """Begin with the latent `start` (batch, 3, T, h, w) and the inputs that no step changes, by name."""

    def step(self, index: int, noise: Float32 | None) -> None:
        """Take the step of a row of the table, with noise (batch, 3, T, h, w) or none; need not wait for it."""

    def latent(self) -> Float32:
        """The latent (batch, 3, T, h, w) after the last step; waits for it."""

    def finish(self) -> Float32:
        """`latent` of a chain that is done."""


@runtime_checkable
class KeepsState(Protocol):
    """An engine that can keep the state of sampling where it runs."""

    def denoise_loop(self, batch: int) -> StateLoop:
        """A loop for a batch size, at most the stage's largest."""


@dataclass(frozen=True, eq=False)
class ClipRequest:
    """What clips of B samples are made of.

    Attributes:
        image: (B, 3, H, W) float32 in [0, 1].
        fixed: inputs of the sampling stage that no step changes, by name, but for the encoder's.
        seeds: one a sample, 0 to 2^64 - 1.
        table: the sampler.
    """

    image: Float32
    fixed: Mapping[str, Float32]
    seeds: tuple[int, ...]
    table: SamplerTable


@dataclass(frozen=True, eq=False)
class MadeClips:
    """Whole clips of B samples.

    Attributes:
        frames: (B, T, H, W, 3) uint8.
        warped: the sources warped alone, likewise.
        latent: (B, 3, T, h, w) float32.
    """

    frames: NDArray[np.uint8]
    warped: NDArray[np.uint8]
    latent: Float32


class ClipMaker(Protocol):
    """Makes whole clips of one batch size where the engine runs."""

    def make(self, request: ClipRequest, on_step: Callable[[int], None] | None = None) -> MadeClips:
        """Make them; `on_step` is called with the index of each step that was queued."""
