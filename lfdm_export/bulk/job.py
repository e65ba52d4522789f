"""One clip to make, and what decides its bits."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from lfdm_export.bulk.sources import InFile, Source
from lfdm_export.errors import InputError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.pictures.clip import DEFAULT_FPS
from lfdm_export.pictures.clip_files import ARCHIVES, FORMATS, check_output
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.enlarge import check_scale
from lfdm_export.sampling.options import SamplingOptions

#: What says how the picture moves.
Condition = Literal["label", "text", "embedding", "motion"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
_ID_PART = re.compile(r"\w[\w.+=@ -]*")
_LONGEST_ID = 200


@dataclass(frozen=True)
class JobSettings:
    """How a clip is sampled and written; jobs that agree in them can be made together.

    Attributes:
        options: how it is sampled.
        crop: see `lfdm_export.generate.pipeline.Pipeline.generate`.
        format: one of `lfdm_export.pictures.clip_files.FORMATS`.
        fps, scale, panels: see `lfdm_export.pictures.clip.Clip.save`.
    """

    options: SamplingOptions = SamplingOptions()
    crop: Crop | None = None
    format: str = "gif"
    fps: float | None = None
    scale: int = 1
    panels: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a bundle.

        Raises:
            InputError: a value is out of range.
        """
        if self.format not in FORMATS:
            raise InputError(f"format is {self.format!r}, expected one of {', '.join(FORMATS)}")
        check_output(f"clip.{self.format}", fps=DEFAULT_FPS if self.fps is None else self.fps)
        check_scale(self.scale)
        if self.format in ARCHIVES and (self.panels or self.scale != 1):
            raise InputError(f"{self.format} holds neither panels nor enlarged pictures; choose another format")


@dataclass(frozen=True)
class Job:
    """A row of the table.

    Attributes:
        id: names the clip's file, and decides its seed where none is given.
        image: the photograph.
        condition: what says how it moves.
        value: the label or the text; "" for the others.
        moved_by: where the embedding or the motion lies.
        seed: of the noise.
        settings: the rest.
        fault: a sentence about a row that cannot be used; "" if it can.
    """

    id: str
    image: Source
    condition: Condition = "label"
    value: str = ""
    moved_by: Source | None = None
    seed: int = 0
    settings: JobSettings = field(default_factory=JobSettings)
    fault: str = ""

    @property
    def file(self) -> str:
        """The clip's file, below the folder of the run."""
        return f"{self.id}.{self.settings.format}"

    @property
    def sources(self) -> tuple[Source, ...]:
        """All that it reads."""
        return (self.image,) if self.moved_by is None else (self.image, self.moved_by)

    @property
    def group(self) -> tuple[object, ...]:
        """Jobs that agree in it can be made together."""
        motion = self.moved_by if self.condition == "motion" else None
        return self.settings, self.condition, motion

    def digest(self, bundle_id: str) -> str:
        """SHA-256 of everything that decides the clip but the content of its `sources`.

        Args:
            bundle_id: of the bundle that makes it.
        """
        settings = to_plain(self.settings)
        facts = {
            "bundle_id": bundle_id,
            "condition": self.condition,
            "value": self.value,
            # Motions that lie elsewhere but hold the same are the same: their content counts.
            "seed": None if self.condition == "motion" else self.seed,
            "settings": {**settings.pop("options"), **settings},  # flat, as runs that were begun before know it
            "fault": self.fault,
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def check_id(name: str) -> str:
    """An id as it is.

    Raises:
        InputError: it cannot be part of a file's name on every system, or would lead out of the folder.
    """
    parts = name.split("/")
    if len(name.encode()) > _LONGEST_ID or not all(
        _ID_PART.fullmatch(part) and not part.endswith((" ", ".")) for part in parts
    ):
        raise InputError(
            f"the id {name[:80]!r} cannot name a file: expected at most {_LONGEST_ID} bytes of letters, digits, and "
            "_ . - + = @, with / between folders"
        )
    return name


def seed_of(name: str) -> int:
    """The seed of a job that gives none: the first 32 bits of its id's SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def nowhere() -> InFile:
    """The source of a row that names no picture, and so has a fault."""
    return InFile("")
