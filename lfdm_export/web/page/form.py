"""The values of the page's form, and the arguments that follow from them."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.pictures.crop import Crop, parse_crop
from lfdm_export.pictures.paste import Surroundings, read_surroundings
from lfdm_export.pictures.preprocess import prepare_image, read_stream, settled_crop
from lfdm_export.protocol.model_facts import ModelFacts

#: Sources of a clip's motion.
Source = Literal["label", "text", "motion", "clip"]
#: Parts of the photograph that can be animated.
Part = Literal["whole", "center", "face", "region"]
_CHOICES = {"part": get_args(Part), "source": get_args(Source)}
_FILES, _NUMBERS, _SWITCHES = ("photo", "motion", "clip"), ("steps", "guidance", "seed"), ("paste_back", "panels")


@dataclass(frozen=True, eq=False)
class Photo:
    """A photograph, ready for the model.

    Attributes:
        pixels: (size, size, 3) uint8.
        surroundings: the photograph that the clip is put back into; None for none.
    """

    pixels: NDArray[np.uint8]
    surroundings: Surroundings | None = None


@dataclass(frozen=True)
class Form:
    """The values of the form's fields, in the order of the page. None stands for an empty field.

    Attributes:
        photo: path of the photograph.
        part: the whole photograph with black bars, its centered square, a square around its largest face, or `region`.
        region: X,Y,W,H in pixels.
        paste_back: whether the clip shows the whole photograph, of which the part moves.
        source: source of the motion; it selects one of the next four fields.
        label: a label of the model.
        text: free text.
        motion: path of a saved motion.
        clip: path of a driving clip.
        sampler, steps, guidance, seed: options of sampling, for a label or a text.
        panels: whether to make the panels too.
    """

    photo: str | None = None
    part: Part = "whole"
    region: str | None = None
    paste_back: bool = False
    source: Source = "label"
    label: str | None = None
    text: str | None = None
    motion: str | None = None
    clip: str | None = None
    sampler: str | None = None
    steps: float | None = None
    guidance: float | None = None
    seed: float | None = None
    panels: bool = False

    @classmethod
    def read(cls, values: Sequence[object], uploads: Path) -> Form:
        """Read the form that a browser sent.

        Args:
            values: JSON values of the fields, in their order; a file is an object with its path.
            uploads: the folder of all uploaded files.

        Raises:
            InputError: a value has the wrong type, or a file was not uploaded.
        """
        found = {field.name: _read(field.name, value) for field, value in zip(fields(cls), values, strict=True)}
        for name, choices in _CHOICES.items():
            if found[name] not in choices:
                raise InputError(f"the {name} is {found[name]!r}, expected one of {', '.join(choices)}")
        for name in _FILES:
            if found[name] is not None and not Path(found[name]).resolve().is_relative_to(uploads.resolve()):
                raise InputError(f"the {name} was not uploaded; choose its file")
        return cls(**found)

    @property
    def crop(self) -> Crop | None:
        """The crop of the photograph.

        Raises:
            InputError: the region is empty, or not X,Y,W,H.
        """
        if self.part == "region":
            return parse_crop(self.region or "")
        return None if self.part == "whole" else self.part

    @property
    def sampled(self) -> bool:
        """Whether the motion is sampled."""
        return self.source in ("label", "text")

    def condition(self) -> dict[str, str]:
        """The label or the text, as an argument of ``generate``.

        Raises:
            InputError: the field is empty.
        """
        value = self.label if self.source == "label" else self.text
        if not value or not value.strip():
            raise InputError(f"there is no {self.source}; give one")
        return {self.source: value}

    def motion_file(self) -> str:
        """The path of the saved motion or of the driving clip.

        Raises:
            InputError: the field is empty.
        """
        path, name = (self.motion, "saved motion") if self.source == "motion" else (self.clip, "driving clip")
        if path is None:
            raise InputError(f"there is no {name}; choose its file")
        return path

    def whole(self, name: Literal["steps", "seed"]) -> int | None:
        """A whole number; None if the field is empty.

        Raises:
            InputError: the number is not whole.
        """
        value: float | None = getattr(self, name)
        if value is None:
            return None
        if not float(value).is_integer():
            raise InputError(f"{name} is {value:g}, expected a whole number")
        return int(value)

    def prepared(self, facts: ModelFacts, most_pixels: int) -> Photo:
        """Read the photograph and prepare it for the model.

        Args:
            facts: facts of the model.
            most_pixels: most pixels of the photograph, checked before it is decoded.

        Raises:
            InputError: there is no photograph, it cannot be used, or it has no such part.
            MissingDependencyError: OpenCV, which finds faces, is not installed.
        """
        if self.photo is None:
            raise InputError("there is no photograph; choose one, take one with the camera, or take an example")
        crop = self.crop
        if self.paste_back and crop is None:
            raise InputError("the whole photograph moves, there is nothing to put the clip back into; animate a part")
        try:
            with Path(self.photo).open("rb") as stream:
                raster = read_stream(stream, os.path.basename(self.photo), most_pixels=most_pixels)  # noqa: PTH119
                crop = None if crop is None else settled_crop(raster, crop)
                pixels = prepare_image(raster, facts.image_size, facts.preprocessing, crop=crop)
                return Photo(pixels, read_surroundings(raster, crop) if self.paste_back else None)
        except FileNotFoundError as error:
            raise InputError("the photograph was removed from the server; choose it again") from error


def _read(name: str, value: object) -> Any:
    """Check a field's JSON value; returns None if the field is empty.

    Raises:
        InputError: the value has the wrong type.
    """
    if name in _FILES and isinstance(value, Mapping):
        value = value.get("path")
    if value is None or value == "":
        return False if name in _SWITCHES else None
    if name in _SWITCHES:
        fits, expected = isinstance(value, bool), "yes or no"
    elif name in _NUMBERS:
        fits, expected = isinstance(value, int | float) and not isinstance(value, bool), "a number"
    else:
        fits, expected = isinstance(value, str), "text"
    if not fits:
        raise InputError(f"{name} is {str(value)[:40]!r}, expected {expected}")
    return value
