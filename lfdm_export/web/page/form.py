"""What the page's form holds, and what it means."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.preprocess import prepare_image, read_stream
from lfdm_export.protocol.model_facts import ModelFacts

#: Where a clip's motion comes from.
Source = Literal["label", "text", "motion", "clip"]
_FILES, _NUMBERS, _SWITCHES = ("photo", "motion", "clip"), ("steps", "guidance", "seed"), ("center", "panels")


@dataclass(frozen=True)
class Form:
    """The values of the form's fields, in their order; None where a field is empty.

    Attributes:
        photo: file of the photograph.
        center: take the largest square in its middle, in place of black bars.
        source: where the motion comes from; of the next four fields it decides which one counts.
        label: of the model.
        text: free text.
        motion: file of a saved motion.
        clip: file of a driving clip.
        sampler, steps, guidance, seed: of sampling, where there is some.
        panels: make the panels too.
    """

    photo: str | None = None
    center: bool = False
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
        """The form that a browser sent.

        Args:
            values: of the fields, in their order, as JSON; a file is an object with its path.
            uploads: the folder of all files that visitors sent.

        Raises:
            InputError: a value is of another type, or a file another one.
        """
        found = {field.name: _read(field.name, value) for field, value in zip(fields(cls), values, strict=True)}
        if found["source"] not in get_args(Source):
            raise InputError(f"the source is {found['source']!r}, expected one of {', '.join(get_args(Source))}")
        for name in _FILES:
            if found[name] is not None and not Path(found[name]).resolve().is_relative_to(uploads.resolve()):
                raise InputError(f"the {name} was not uploaded; choose its file")
        return cls(**found)

    @property
    def crop(self) -> Crop | None:
        """What is cut out of the photograph."""
        return "center" if self.center else None

    @property
    def sampled(self) -> bool:
        """Whether sampling makes the motion."""
        return self.source in ("label", "text")

    def condition(self) -> dict[str, str]:
        """The label or the text, as an argument of ``generate``.

        Raises:
            InputError: it is empty.
        """
        value = self.label if self.source == "label" else self.text
        if not value or not value.strip():
            raise InputError(f"there is no {self.source}; give one")
        return {self.source: value}

    def motion_file(self) -> str:
        """The file that the motion comes from.

        Raises:
            InputError: there is none.
        """
        path, name = (self.motion, "saved motion") if self.source == "motion" else (self.clip, "clip to follow")
        if path is None:
            raise InputError(f"there is no {name}; choose its file")
        return path

    def whole(self, name: Literal["steps", "seed"]) -> int | None:
        """A number that has to be whole; None where the field is empty.

        Raises:
            InputError: it is not.
        """
        value: float | None = getattr(self, name)
        if value is None:
            return None
        if not float(value).is_integer():
            raise InputError(f"{name} is {value:g}, expected a whole number")
        return int(value)

    def prepared(self, facts: ModelFacts, most_pixels: int) -> NDArray[np.uint8]:
        """The photograph as the model takes it, (size, size, 3).

        Args:
            facts: of the model.
            most_pixels: that it may have, looked at before it is decoded.

        Raises:
            InputError: there is none, or it cannot be used.
        """
        if self.photo is None:
            raise InputError("there is no photograph; choose one, take one with the camera, or take an example")
        try:
            with Path(self.photo).open("rb") as stream:
                raster = read_stream(stream, os.path.basename(self.photo), most_pixels=most_pixels)  # noqa: PTH119
                return prepare_image(raster, facts.image_size, facts.preprocessing, crop=self.crop)
        except FileNotFoundError as error:
            raise InputError("the photograph is not kept any more; choose it again") from error


def _read(name: str, value: object) -> Any:
    """A field's value out of JSON; None where it is empty."""
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
