"""The result of a pipeline: frames, and everything that they were made from."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.files.names import user_name
from lfdm_export.pictures.clip_files import (
    ARCHIVES,
    ClipFormat,
    check_output,
    encode_clip,
    rehearse_output,
    save_clip,
)
from lfdm_export.pictures.clips import resample
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.enlarge import check_scale, enlarge
from lfdm_export.pictures.gif import MAX_FPS as MAX_GIF_FPS
from lfdm_export.pictures.motion import GEOMETRY, RESIDUAL_FLOW, Motion
from lfdm_export.pictures.notebook import clips_html
from lfdm_export.pictures.panels import panels as make_panels
from lfdm_export.pictures.panels import with_titles
from lfdm_export.pictures.paste import Surroundings, paste_back, read_surroundings
from lfdm_export.pictures.preprocess import ImageLike
from lfdm_export.wording import count, shortened

DEFAULT_FPS = 10.0


@dataclass(frozen=True, eq=False, repr=False)
class Clip:
    """One clip per sample.

    Attributes:
        frames: (B, T, H, W, 3) uint8.
        warped: (B, T, H, W, 3) uint8, the image moved by the flow alone; (B, 0, H, W, 3) if not requested from the
            server.
        latent: (B, 3, T, h, w) float32: backward sampling grid (x, y), or its offset from the identity
            if `residual_flow`; then occlusion; each scaled to [-1, 1]; (B, 3, 0, h, w) if not requested from the
            server.
        source: (B, H, W, 3) uint8, the reference image after preprocessing.
        residual_flow: the latent's grid is an offset from the identity.
        labels: label or text of each sample, if it had any.
        seeds: seed of each sample, if a seed made its noise.
        timings: of each sample, from a server, by the names in `lfdm_export.protocol.contract.TIMINGS`.
        fps: frames per second of the driving clip that it follows; None without one.
        settings: how all samples were made, plain JSON values by name, as in `lfdm_export.pictures.metadata`.
        surroundings: the photograph that saved frames are pasted back into, of all samples; None for none.
    """

    frames: NDArray[np.uint8]
    warped: NDArray[np.uint8]
    latent: NDArray[np.float32]
    source: NDArray[np.uint8]
    residual_flow: bool
    labels: tuple[str, ...] | None = None
    seeds: tuple[int, ...] | None = None
    timings: tuple[Mapping[str, float], ...] | None = None
    fps: float | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    surroundings: Surroundings | None = None

    def paste_back(self, image: ImageLike, crop: Crop | None) -> Clip:
        """The same clip, whose saved pictures show the whole photograph; `frames` and panels stay those of the crop.

        The size is the photograph's, at most `lfdm_export.pictures.paste.MAX_SIDE` pixels per side; the crop's border
        is soft, as `lfdm_export.pictures.paste.paste_back` says.

        Args:
            image: the photograph that all samples were made of.
            crop: the region that they were made of, as in `lfdm_export.generate.pipeline.Pipeline.generate`.

        Raises:
            InputError: there is no crop, it is not within the picture, or the picture cannot be used.
        """
        return replace(self, surroundings=read_surroundings(image, crop))

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        format: ClipFormat | None = None,  # noqa: A002 (the word that users look for)
        panels: bool = False,
        fps: float | None = None,
        scale: int = 1,
    ) -> tuple[Path, ...]:
        """Write one file per sample; `lfdm_export.pictures.clip_files.save_clip` lists endings and formats.

        The file carries `metadata`, which `lfdm_export.pictures.metadata.clip_metadata` reads.

        Args:
            path: the file. With several samples, sample i goes to ``NAME-i.ENDING``; an npz archive holds all. A
                ``.motion`` file can move other pictures, see `motion`.
            format: overrides the ending.
            panels: show source | generated | warped | deformed grid | occlusion side by side, with titles; after
                `paste_back` they show the crop.
            fps: frames per second; default: the clip's own, 10 if it has none. A GIF of a faster clip keeps its speed
                with fewer frames.
            scale: enlarges the pictures 1 to 8 times (Lanczos).

        Returns:
            The paths written.

        Raises:
            InputError: the path, the format, fps or scale cannot be used.
            MissingDependencyError: MP4 without PyAV.
        """
        name = user_name(path)
        rate = fps if fps is not None else self.fps or DEFAULT_FPS
        chosen = format or Path(name).suffix.lower().removeprefix(".")
        check_pictures(chosen, panels=panels, scale=scale, pasted=self.surroundings is not None)
        if chosen == "motion":
            return tuple(self.sample(index)._save_motion(target, fps) for index, target in self._targets(name))
        if chosen == "npz":
            latent, warped = self.latent if self.latent.size else None, self.warped if self.warped.size else None
            metadata = {**self.metadata(), "fps": rate}
            return (
                save_clip(path, self.frames, format="npz", fps=rate, latent=latent, warped=warped, metadata=metadata),
            )
        written = []
        for index, target in self._targets(name):
            pictures, shown = self._pictures(index, panels, scale), rate
            if fps is None and rate > MAX_GIF_FPS and check_output(target, format=format)[0] == "gif":
                pictures, shown = resample(pictures, rate, MAX_GIF_FPS), MAX_GIF_FPS
            metadata = {**self.metadata(index), "fps": shown}
            written.append(save_clip(target, pictures, format=format, fps=shown, metadata=metadata))
        return tuple(written)

    @property
    def motion(self) -> Motion:
        """The clip's motion, for other pictures: see `lfdm_export.generate.pipeline.Pipeline.animate`.

        Raises:
            InputError: the clip has several samples, or no latent.
        """
        if len(self.frames) != 1:
            raise InputError(f"the clip has {len(self.frames)} samples; take the motion of one: clip.sample(0).motion")
        if not self.latent.size:
            raise InputError("the clip has no latent; request it from the server")
        return Motion(self.latent[0], self.residual_flow, self.fps, self.metadata(0))

    def _save_motion(self, path: str, fps: float | None) -> Path:
        """Write the motion of the only sample."""
        motion, size = self.motion, self.frames.shape[2]
        frames, latent_size = motion.latent.shape[1:3]
        rate = motion.fps if fps is None else fps
        metadata = {
            **motion.settings,
            "fps": rate,
            RESIDUAL_FLOW: motion.residual_flow,
            GEOMETRY: {"image_size": size, "latent_size": latent_size, "frames": frames},
        }
        return save_clip(
            path,
            self.frames[0],
            format="motion",
            fps=DEFAULT_FPS if rate is None else rate,
            latent=motion.latent,
            metadata=metadata,
        )

    def _targets(self, name: str) -> list[tuple[int, str]]:
        """The index and the file of each sample."""
        samples = range(len(self.frames))
        return [(index, name if len(samples) == 1 else _numbered(name, index)) for index in samples]

    def metadata(self, index: int | None = None) -> dict[str, object]:
        """How a sample was made: `settings`, its label and its seed; None gives lists over all samples."""
        found = dict(self.settings)
        words = "text" if found.get("condition") == "text" else "label"
        for name, values in ((words, self.labels), ("seed", self.seeds)):
            if values is not None:
                found[name] = values[index] if index is not None else values[0] if len(values) == 1 else list(values)
        return found

    def __repr__(self) -> str:
        samples, frames, height, width = self.frames.shape[:4]
        labels = "" if self.labels is None else f", labels: {shortened(self.labels)}"
        seeds = "" if self.seeds is None else f", seeds: {shortened(self.seeds)}"
        return f"<Clip: {count(samples, 'sample')} of {count(frames, 'frame')} of {width}x{height}{labels}{seeds}>"

    def sample(self, index: int) -> Clip:
        """The clip of one sample, which shares memory with this one.

        Raises:
            InputError: the index is out of range.
        """
        if not 0 <= index < len(self.frames):
            raise InputError(f"there is no sample {index}; the clip has {len(self.frames)}, counted from 0")
        one = slice(index, index + 1)
        return replace(
            self,
            frames=self.frames[one],
            warped=self.warped[one],
            latent=self.latent[one],
            source=self.source[one],
            labels=self.labels and self.labels[one],
            seeds=self.seeds and self.seeds[one],
            timings=self.timings and self.timings[one],
        )

    def _repr_html_(self) -> str:
        """The animated clip, for notebooks."""
        labels = self.labels or ("",) * len(self.frames)
        seeds = ("",) * len(self.frames) if self.seeds is None else tuple(f"seed {seed}" for seed in self.seeds)
        captions = [", ".join(part for part in pair if part) for pair in zip(labels, seeds, strict=True)]
        shown = self.frames
        if self.surroundings is not None:
            shown = np.stack([paste_back(frames, self.surroundings) for frames in self.frames])
        return clips_html(shown, captions, fps=min(self.fps or DEFAULT_FPS, MAX_GIF_FPS))

    def _pictures(self, index: int, panels: bool, scale: int) -> NDArray[np.uint8]:
        """(T, H, W, 3), or with panels and their titles (T, H + title, 5W, 3), both axes times `scale`."""
        if not panels and self.surroundings is not None:
            return paste_back(self.frames[index], self.surroundings)
        if not panels:
            return enlarge(self.frames[index], scale)
        if not (self.latent.size and self.warped.size):
            raise InputError("panels need the warped images and the latent; request both from the server")
        strip = make_panels(
            self.source[index],
            self.frames[index],
            self.warped[index],
            self.latent[index],
            residual_flow=self.residual_flow,
        )
        return with_titles(enlarge(strip, scale))


def rehearse_saving(
    path: str | os.PathLike[str],
    *,
    format: ClipFormat | None = None,  # noqa: A002 (the word that users look for)
    panels: bool = False,
    fps: float | None = None,
    scale: int = 1,
    pasted: bool = False,
) -> None:
    """Encode a tiny clip in memory, so that `Clip.save` cannot fail on its arguments after a long generation.

    Raises:
        InputError: the ending, the format, fps, scale or the path cannot be used.
        MissingDependencyError: MP4 without PyAV.
    """
    rate = DEFAULT_FPS if fps is None else fps
    chosen, as_folder = check_output(path, format=format, fps=rate)
    check_scale(scale)
    check_pictures(chosen, panels=panels, scale=scale, pasted=pasted)
    tiny: dict[str, NDArray[Any] | None] = {"frames": np.zeros((1, 16, 16, 3), np.uint8), "latent": None}
    encode_clip(io.BytesIO(), chosen, tiny, rate)
    rehearse_output(path, as_folder=as_folder)


def check_pictures(chosen: str, *, panels: bool, scale: int, pasted: bool) -> None:
    """Check the options that change pictures against the format, and against each other.

    Raises:
        InputError: the format holds no pictures, or pasted pictures would be enlarged.
    """
    if chosen in ARCHIVES and (panels or scale != 1):
        raise InputError("npz and motion files hold neither panels nor enlarged pictures; choose another format")
    if chosen in ARCHIVES and pasted:
        raise InputError("npz and motion files hold the model's own frames, not pasted back; choose another format")
    if pasted and scale != 1:
        raise InputError("a clip that is pasted back has the size of the photograph: leave scale out")


def _numbered(name: str, index: int) -> str:
    """``a.gif`` -> ``a-0.gif``; ``folder/`` -> ``folder-0/``."""
    bare = name.rstrip("/" + os.sep)
    slash, suffix = name[len(bare) :], Path(bare).suffix
    return f"{bare[: len(bare) - len(suffix)]}-{index}{suffix}{slash}"
