"""A motion: the latent of one clip, kept in a file so that it can move other pictures without sampling again."""

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

#: What its metadata say of the grid, and of the sizes of the model that made it.
RESIDUAL_FLOW, GEOMETRY = "residual_flow", "geometry"
#: Values of a latent: 10,000 frames of 64 x 64, more than any clip that this program reads or makes.
MAX_VALUES = 10_000 * 3 * 64 * 64
_OF_THE_FILE = ("program", "version", "fps", RESIDUAL_FLOW, GEOMETRY)


@dataclass(frozen=True, eq=False, repr=False)
class Motion:
    """How one clip moves.

    Attributes:
        latent: (3, T, h, w) float32, finite; see `lfdm_export.pictures.clip.Clip.latent`.
        residual_flow: what the latent's grid is: offsets from the identity, or positions.
        fps: frames per second that it is meant for, where it follows a driving clip.
        settings: how it was made, plain JSON values by name, its label and seed among them; see
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
        """Refuse a motion that a model cannot decode.

        Args:
            latent_size: rows and columns of the model's latents.
            model_frames: frames of the model's clips.
            residual_flow: what the grid of the model's latents is.

        Raises:
            InputError: the latent is of another size, its grid means another thing, or it was sampled by a model of
                another number of frames. (A motion taken from a driving clip is as long as that clip.)
        """
        frames, size = self.latent.shape[1:3]
        sampled = self.settings.get("sampler") is not None
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
    """Read a motion: what `lfdm_export.pictures.clip.Clip.save` wrote as ``.motion``.

    The file is a NumPy archive; no code that it may hold is run, and nothing is unpacked before its size is known.

    Args:
        path: the file.

    Raises:
        InputError: it cannot be read, is no motion, or too large.
    """
    source = user_path(path)
    try:
        with open_stream(source, str(source)) as stream:
            return read_motion(stream, str(source))
    except PictureError as error:
        raise InputError(str(error)) from error


def read_motion(stream: BinaryIO, name: str) -> Motion:
    """Like `load_motion`, out of a stream that can be read at any place; `name` is for messages.

    Raises:
        InputError: see `load_motion`.
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
    """A motion, or that of a file.

    Raises:
        InputError: it is neither, or see `load_motion`.
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
