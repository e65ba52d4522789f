"""The interface of the engines of every backend."""

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
        """Run the stage once.

        Args:
            feeds: exactly the inputs of the stage, by name, with its dtypes and shapes.

        Returns:
            The outputs of the stage, by name.

        Raises:
            EngineError: the feeds do not match the stage, it cannot be compiled, or the run fails (for example, out of
                memory).
        """


class StateLoop(Protocol):
    """Chains of a sampling stage for one batch size, whose state stays where the engine runs.

    A chain is ``begin``, one ``step`` per row of the table, ``finish``; ``latent`` may be called in between.
    """

    def begin(self, start: Float32, fixed: Mapping[str, Array], table: SamplerTable) -> None:
        """Start with the latent `start` (batch, 3, T, h, w) and the inputs that no step changes, by name."""

    def step(self, index: int, noise: Float32 | None) -> None:
        """Run the step of a row of the table, with noise (batch, 3, T, h, w) or None; may return before it is done."""

    def latent(self) -> Float32:
        """Wait for the last step; return its latent (batch, 3, T, h, w)."""

    def finish(self) -> Float32:
        """Return the `latent` of a complete chain."""


@runtime_checkable
class KeepsState(Protocol):
    """An engine that can keep the sampling state where it runs."""

    def denoise_loop(self, batch: int) -> StateLoop:
        """Make a loop for a batch size, at most the largest of the stage."""


@runtime_checkable
class KeepsInputs(Protocol):
    """An engine that can keep inputs where it runs, for several runs."""

    spec: StageSpec

    def keep(self, inputs: Mapping[str, Array], rows: int) -> KeptInputs:
        """Copy inputs (batch, …), by name, to where the engine runs; each is repeated to `rows` rows per sample."""


class KeptInputs(Protocol):
    """Inputs of a stage that stay where its engine runs."""

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stage once with these and its other inputs, by name; returns its outputs, by name."""


@dataclass(frozen=True, eq=False)
class ClipRequest:
    """The inputs for clips of B samples.

    Attributes:
        image: (B, 3, H, W) float32 in [0, 1].
        fixed: inputs of the sampling stage that no step changes, by name, except outputs of the encoder.
        seeds: one per sample, 0 to 2^64 - 1.
        table: the sampler.
        frames: positions of the frames of the clips, ascending; None for all.
    """

    image: Float32
    fixed: Mapping[str, Float32]
    seeds: tuple[int, ...]
    table: SamplerTable
    frames: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class MadeClips:
    """Clips of B samples, with the requested frames.

    Attributes:
        frames: (B, T, H, W, 3) uint8.
        warped: the warped source images, likewise.
        latent: (B, 3, T, h, w) float32.
    """

    frames: NDArray[np.uint8]
    warped: NDArray[np.uint8]
    latent: Float32


class ClipMaker(Protocol):
    """Makes whole clips of one batch size where the engine runs."""

    def make(self, request: ClipRequest, on_step: Callable[[int], None] | None = None) -> MadeClips:
        """Make the clips; `on_step` is called with the index of each queued step."""
