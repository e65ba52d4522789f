"""The frames of a clip that are decoded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.pictures.clip import DEFAULT_FPS
from lfdm_export.pictures.motion import FRAME_INDICES

#: Maximum characters of an invalid value in a message.
_SHOWN = 42


@dataclass(frozen=True)
class FrameChoice:
    """Some frames of a clip, or all.

    Attributes:
        positions: positions from 0, ascending; None for all.
        total: frames of the whole clip.
    """

    positions: tuple[int, ...] | None
    total: int

    @classmethod
    def of(cls, frames: Sequence[int] | slice | None, total: int) -> FrameChoice:
        """Choose frames of a clip.

        Args:
            frames: ascending positions from 0, or a slice of the clip; None for all.
            total: frames of the clip.

        Raises:
            InputError: there are none, or they are not ascending integers from 0 to ``total - 1``.
        """
        if frames is None:
            return cls(None, total)
        if isinstance(frames, slice):
            part: Sequence[int] = () if frames.step == 0 else range(*frames.indices(total))
        else:
            part = frames if isinstance(frames, Sequence | np.ndarray) else ()
        found = tuple(part) if len(part) <= total else ()
        whole = all(isinstance(one, int | np.integer) and not isinstance(one, bool) for one in found)
        if not found or not whole or list(found) != sorted(set(found)) or found[0] < 0 or found[-1] >= total:
            raise InputError(
                f"frames is {repr(frames)[:_SHOWN]}, expected ascending positions from 0 to {total - 1}, each once"
            )
        return cls(tuple(map(int, found)), total)

    @property
    def count(self) -> int:
        """Number of chosen frames."""
        return self.total if self.positions is None else len(self.positions)

    def part(self, latent: NDArray[np.float32]) -> NDArray[np.float32]:
        """The chosen frames of a latent (B, 3, T, h, w)."""
        return latent if self.positions is None else np.ascontiguousarray(latent[:, :, list(self.positions)])

    def rate(self, fps: float | None) -> float | None:
        """Frames per second at which the chosen frames take the time of the clip, if their distances are equal.

        Args:
            fps: frames per second of the whole clip; None for the default.
        """
        distances = set(np.diff(self.positions or ()).tolist())
        return fps if len(distances) != 1 or distances == {1} else (fps or DEFAULT_FPS) / distances.pop()

    def facts(self) -> dict[str, object]:
        """What the metadata of the clip say; nothing if it has all frames."""
        return {} if self.positions is None else {FRAME_INDICES: list(self.positions)}
