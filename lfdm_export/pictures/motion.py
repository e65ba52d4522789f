"""A motion: the latent of one clip, in a file that can move other pictures without sampling again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from lfdm_export.errors import InputError
from lfdm_export.files.names import user_path
from lfdm_export.pictures.archives import read_floats, read_text
from lfdm_export.pictures.clips import MAX_FPS
from lfdm_export.pictures.metadata import ARRAY, MOST_CHARACTERS, parse
from lfdm_export.wording import count
from lfdm_models.pictures.errors import PictureError
from lfdm_models.pictures.formats import open_stream

#: Metadata keys of the kind of grid, and of the sizes of the model that made it.
RESIDUAL_FLOW, GEOMETRY = "residual_flow", "geometry"
#: Metadata key of the positions of a clip's frames, if only some were decoded.
FRAME_INDICES = "frame_indices"
#: Maximum number of values: 10,000 frames of 64 x 64, more than any clip that this program reads or makes.
MAX_VALUES = 10_000 * 3 * 64 * 64
_OF_THE_FILE = ("program", "version", "fps", RESIDUAL_FLOW, GEOMETRY)


@dataclass(frozen=True, eq=False, repr=False)
class Motion:
    """How one clip moves.

    Attributes:
        latent: (3, T, h, w) float32, finite; see `lfdm_export.pictures.clip.Clip.latent`.
        residual_flow: the latent's grid holds offsets from the identity, not positions.
        fps: frames per second of the driving clip that it follows; None without one.
        settings: how it was made, plain JSON values by name, with its label and seed; see
            `lfdm_export.pictures.metadata.clip_metadata`.
    """

    latent: npt.NDArray[np.float32]
    residual_flow: bool
    fps: float | None = None
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the latent.

        Raises:
            InputError: it has another shape or type, or values that are not finite.
        """
        shape, dtype = self.latent.shape, self.latent.dtype
        if len(shape) != 4 or shape[0] != 3 or shape[2] != shape[3] or 0 in shape or dtype != np.float32:
            raise InputError(f"a motion's latent is {dtype} of shape {shape}, expected float32 of shape (3, T, h, h)")
        if not np.isfinite(self.latent).all():
            raise InputError("a motion's latent holds values that are not finite; make the motion again")

    def __repr__(self) -> str:
        frames, size = self.latent.shape[1:3]
        made = "".join(f", {name} {self.settings[name]}" for name in ("label", "text", "seed") if name in self.settings)
        return f"<Motion: {count(frames, 'frame')} of {size}x{size}{made}>"

    def require_fit(self, latent_size: int, model_frames: int, *, residual_flow: bool) -> None:
        """Reject a motion that a model cannot decode.

        Args:
            latent_size: rows and columns of the model's latents.
            model_frames: frames of the model's clips.
            residual_flow: the grid of the model's latents holds offsets.

        Raises:
            InputError: the latent has another size, its grid has another meaning, or a model with another number of
                frames sampled it. (A motion from a driving clip has as many frames as that clip, one of chosen frames
                has those.)
        """
        frames, size = self.latent.shape[1:3]
        sampled = self.settings.get("sampler") is not None and FRAME_INDICES not in self.settings
        if size != latent_size or (sampled and frames != model_frames):
            raise InputError(
                f"the motion has {count(frames, 'frame')} of {size}x{size}, the bundle's latents have "
                f"{model_frames} of {latent_size}x{latent_size}; "
                "take a motion that a model of these sizes made"
            )
        if self.residual_flow != residual_flow:
            names = {True: "offsets (residual flow)", False: "positions"}
            raise InputError(
                f"the motion's grid holds {names[self.residual_flow]}, the bundle's latents hold "
                f"{names[residual_flow]}; take a motion that a model of the same kind made"
            )


def load_motion(path: str | os.PathLike[str]) -> Motion:
    """Read a motion that `lfdm_export.pictures.clip.Clip.save` wrote as ``.motion``.

    The file is a NumPy archive; no code in it is run, and nothing is unpacked before its size is known.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read, is not a motion, or is too large.
    """
    source = user_path(path)
    try:
        with open_stream(source, str(source)) as stream:
            return read_motion(stream, str(source))
    except PictureError as error:
        raise InputError(str(error)) from error


def read_motion(stream: BinaryIO, name: str) -> Motion:
    """Like `load_motion`, from a seekable stream; `name` is for messages.

    Raises:
        InputError: it cannot be read, is not a motion, or is too large.
    """
    try:
        latent = read_floats(stream, name, "latent", MAX_VALUES)
        found = parse(read_text(stream, name, ARRAY, MOST_CHARACTERS)) or {}
    except PictureError as error:
        raise InputError(f"{error}; expected a motion: save a clip as .motion") from error
    residual_flow = found.get(RESIDUAL_FLOW)
    if not isinstance(residual_flow, bool):
        raise InputError(f"{name} does not say whether its grid holds offsets; save the clip as .motion, not as npz")
    settings = {key: value for key, value in found.items() if key not in _OF_THE_FILE}
    try:
        return Motion(latent, residual_flow, _rate(found.get("fps")), settings)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def as_motion(motion: Motion | str | os.PathLike[str]) -> Motion:
    """The motion itself, or the motion in a file.

    Raises:
        InputError: it is neither, or the file cannot be read, is not a motion, or is too large.
    """
    if isinstance(motion, Motion):
        return motion
    if isinstance(motion, str | os.PathLike):
        return load_motion(motion)
    raise InputError(f"motion is {type(motion).__name__}, expected a Motion (`clip.motion`) or the path of a file")


def _rate(fps: object) -> float | None:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps <= MAX_FPS:
        return None
    return float(fps)
