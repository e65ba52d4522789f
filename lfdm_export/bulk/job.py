"""One clip to generate, and everything that determines its bits."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from typing import Literal, get_args

from lfdm_export.bulk.sources import InFile, Source
from lfdm_export.errors import InputError
from lfdm_export.files.digests import json_digest
from lfdm_export.files.json_codec import to_plain
from lfdm_export.pictures.clip import DEFAULT_FPS, check_pictures
from lfdm_export.pictures.clip_files import ARCHIVES, FORMATS, check_output
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.enlarge import check_scale
from lfdm_export.sampling.options import SamplingOptions

#: Input that determines the motion.
Condition = Literal["label", "text", "embedding", "motion"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)
_ID_PART = re.compile(r"\w[\w.+=@ -]*")
_LONGEST_ID = 200


@dataclass(frozen=True)
class JobSettings:
    """How a clip is sampled and written; jobs with equal settings can share a batch.

    Attributes:
        options: options of sampling.
        crop: region of the image to use: "center", "face", or (x, y, width, height) in pixels; None uses all of it.
        paste_back: whether the clip is put back into the whole image; needs a crop, which a row may give.
        format: file format, one of `lfdm_export.pictures.clip_files.FORMATS`.
        fps, scale, panels: arguments of `lfdm_export.pictures.clip.Clip.save`.
    """

    options: SamplingOptions = SamplingOptions()
    crop: Crop | None = None
    format: str = "gif"
    fps: float | None = None
    scale: int = 1
    panels: bool = False
    paste_back: bool = False

    def __post_init__(self) -> None:
        """Validate what needs no bundle.

        Raises:
            InputError: a value is out of range.
        """
        if self.format not in FORMATS:
            raise InputError(f"format is {self.format!r}, expected one of {', '.join(FORMATS)}")
        check_output(f"clip.{self.format}", fps=DEFAULT_FPS if self.fps is None else self.fps)
        check_scale(self.scale)
        if self.format in ARCHIVES and (self.panels or self.scale != 1):
            raise InputError(f"{self.format} holds neither panels nor enlarged pictures; choose another format")
        check_pictures(self.format, panels=self.panels, scale=self.scale, pasted=self.paste_back)


@dataclass(frozen=True)
class Job:
    """A row of the table.

    Attributes:
        id: names the clip's file, and determines the seed if the row has none.
        image: source of the reference image.
        condition: input that determines the motion.
        value: the label or the text; "" for other conditions.
        moved_by: source of the embedding or the motion.
        seed: seed of the noise.
        settings: settings of sampling and writing.
        fault: error message of an invalid row; "" for a valid row.
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
        """Path of the clip's file, relative to the folder of the run."""
        return f"{self.id}.{self.settings.format}"

    @property
    def sources(self) -> tuple[Source, ...]:
        """All files and cells that the job reads."""
        return (self.image,) if self.moved_by is None else (self.image, self.moved_by)

    @property
    def group(self) -> tuple[object, ...]:
        """Key of jobs that can share a batch."""
        motion = self.moved_by if self.condition == "motion" else None
        return self.settings, self.condition, motion

    def digest(self, bundle_id: str) -> str:
        """Return the SHA-256 of everything that determines the clip, except the content of its `sources`.

        Args:
            bundle_id: ID of the bundle that generates the clip.
        """
        settings = to_plain(self.settings)
        if not self.settings.paste_back:  # an option that earlier versions, whose runs must resume, did not have
            del settings["paste_back"]
        facts = {
            "bundle_id": bundle_id,
            "condition": self.condition,
            "value": self.value,
            # Two files of equal content are the same motion, so only the content counts.
            "seed": None if self.condition == "motion" else self.seed,
            "settings": {**settings.pop("options"), **settings},  # flat, as in earlier versions
            "fault": self.fault,
        }
        return json_digest(facts)


def check_id(name: str) -> str:
    """Return an ID if it is valid.

    Raises:
        InputError: the ID cannot be part of a file name on every system, or would leave the folder.
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
    """Return the default seed of a job: the first 32 bits of the SHA-256 of its ID."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def nowhere() -> InFile:
    """Return the source of a row without an image; such a row has a fault."""
    return InFile("")
