"""`manifest.json` of a bundle: all its metadata, as a frozen dataclass.

Reading an incomplete or inconsistent manifest raises, so a `Manifest` needs no further checks.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath, PureWindowsPath

from lfdm_export.errors import BundleError
from lfdm_export.files.json_codec import LATER, from_plain, to_plain
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_export.sampling.options import DEFAULTS, WHOLE, SamplingOptions
from lfdm_export.sampling.tuned import TunedSampler
from lfdm_export.stages import DRIVE_STAGE, Geometry, StageSpec, stage_specs
from lfdm_export.wording import count, shortened
from lfdm_models.config import LfdmConfig

#: Incremented when a bundle's layout changes so that older programs cannot read it.
FORMAT_VERSION = 1
#: Distinguishes a bundle's manifest from any other `manifest.json`.
FORMAT = "lfdm-bundle"
#: The optional stage that only a bundle with a text encoder has.
TEXT_STAGE = "text"
#: Most labels of a bundle, and most characters of a label. Each label is a row of the table, and appears in messages.
MOST_LABELS, LONGEST_LABEL = 10_000, 512
#: Largest size of a geometry, batch or step count, and largest width.
LARGEST_SIZE, _LARGEST_WIDTH = 1 << 13, 1 << 16
#: Limit of most file systems for one part of a path, in bytes.
_LONGEST_NAME = 255
#: A manifest has some tens of kilobytes; a much larger file is not a manifest.
MAX_MANIFEST_BYTES = 16 << 20


@dataclass(frozen=True)
class FileEntry:
    """Fingerprint of one file of a bundle: SHA-256 in hexadecimal, and size in bytes."""

    sha256: str
    bytes: int


@dataclass(frozen=True, repr=False)
class Manifest:
    """Metadata of a bundle.

    Attributes:
        config: architecture of the networks.
        geometry: sizes of all stages.
        precision: precision of the graphs, a key of every stage's tolerances, e.g. "fp32".
        stages: stages, in the order of execution.
        labels: labels, in the order of the rows of the embedding table.
        preprocessing: how a photograph becomes a reference image.
        sampler: default options of sampling.
        tuned: sampler tables of few steps tuned for these weights, if any.
        provenance: origin of the weights, as plain JSON values.
        versions: versions of the programs that wrote the bundle, by name.
        files: every file of the bundle except the manifest and the parity report, by relative POSIX path.
        format, format_version: format of the bundle, and its version.
    """

    config: LfdmConfig
    geometry: Geometry
    precision: str
    stages: tuple[StageSpec, ...]
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    sampler: SamplingOptions = DEFAULTS
    tuned: TunedSampler | None = field(default=None, metadata=LATER)
    provenance: Mapping[str, object] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileEntry] = field(default_factory=dict)
    format: str = FORMAT
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        """Validate that the parts are consistent.

        Raises:
            ValueError: they are not; the message says where.
        """
        _check_geometry(self.geometry, self.config)
        _check_stages(self.stages, self.geometry, self.precision)
        check_labels(self.labels)
        _check_defaults(self.sampler)
        if self.tuned is not None:
            self.tuned.require_weights(self.dm_sha256)
        for name, entry in self.files.items():
            _check_file_name(name)
            if len(entry.sha256) != 64 or not set(entry.sha256) <= set("0123456789abcdef") or entry.bytes < 0:
                raise ValueError(f"files.{name} has no valid SHA-256 and size")

    def __repr__(self) -> str:
        return f"<Manifest: {self.summary()}>"

    def summary(self) -> str:
        """Return precision, sizes and labels in one line."""
        size = self.geometry.image_size
        labels = f"{count(len(self.labels), 'label')} ({shortened(self.labels)})" if self.labels else "no labels"
        text = ", free text" if self.has_text else ""
        return f"{self.precision}, {count(self.geometry.frames, 'frame')} of {size}x{size}, {labels}{text}"

    @property
    def bundle_id(self) -> str:
        """ID of the bundle: the SHA-256 of the lines ``HASH  NAME`` of all its files, sorted by name."""
        lines = (f"{entry.sha256}  {name}\n" for name, entry in sorted(self.files.items()))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @property
    def has_text(self) -> bool:
        """Whether the bundle supports free text."""
        return any(spec.name == TEXT_STAGE for spec in self.stages)

    @property
    def has_drive(self) -> bool:
        """Whether the bundle supports motion transfer."""
        return any(spec.name == DRIVE_STAGE for spec in self.stages)

    @property
    def dm_sha256(self) -> str | None:
        """SHA-256 of the DM's checkpoint, if the provenance has it."""
        return dm_sha256_of(self.provenance)

    def to_json(self) -> str:
        """Return the manifest as an indented JSON document.

        Raises:
            BundleError: provenance or preprocessing contain values that JSON does not support.
        """
        try:
            return json.dumps(to_plain(self), indent=2, allow_nan=False) + "\n"
        except (TypeError, ValueError) as error:
            raise BundleError(f"the manifest cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, text: str | bytes) -> Manifest:
        """Read a document written by `to_json`.

        Raises:
            BundleError: the text is not JSON, not a manifest, of another format version, incomplete or inconsistent.
        """
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BundleError(f"the manifest is not valid JSON ({error}); export again") from error
        if not isinstance(plain, dict) or plain.get("format") != FORMAT:
            raise BundleError(f"the manifest is not one of a bundle: it lacks the entry format = {FORMAT!r}")
        if plain.get("format_version") != FORMAT_VERSION:
            raise BundleError(
                f"the bundle has format version {plain.get('format_version')!r}, this program reads version "
                f"{FORMAT_VERSION}; export again, or use the lfdm-export that made it"
            )
        try:
            return from_plain(cls, plain, "manifest")
        except ValueError as error:
            raise BundleError(f"the manifest is incomplete or wrong: {error}; export again") from error


def dm_sha256_of(provenance: Mapping[str, object]) -> str | None:
    """Return the SHA-256 of the DM's checkpoint, if the provenance has it."""
    found = provenance.get("dm")
    digest = found.get("sha256") if isinstance(found, Mapping) else None
    return digest if isinstance(digest, str) else None


def _check_defaults(sampler: SamplingOptions) -> None:
    """Validate the default options: steps and eta may be unset; servers do not support a guidance interval."""
    if sampler.sampler is None or sampler.guidance_scale is None or sampler.guidance_interval != WHOLE:
        raise ValueError("sampler names no sampler, no guidance_scale, or a guidance_interval")


def _check_geometry(geometry: Geometry, config: LfdmConfig) -> None:
    g = geometry
    if min(g.image_size, g.latent_size, g.frames, g.chunk_frames, g.context_channels, g.text_width) < 1:
        raise ValueError(f"geometry holds a size below 1: {g}")
    if max(g.image_size, g.frames) > LARGEST_SIZE or max(g.context_channels, g.text_width) > _LARGEST_WIDTH:
        raise ValueError(
            f"geometry holds a size beyond what this program runs (pixels a side and frames {LARGEST_SIZE}, "
            f"widths {_LARGEST_WIDTH}): {g}"
        )
    if g.chunk_frames > g.frames:
        raise ValueError(f"geometry.chunk_frames is {g.chunk_frames}, expected at most frames, {g.frames}")
    channels = tuple(config.lfae.generator_channels(level) for level in range(config.lfae.down_blocks + 1))
    for name, found, expected in (
        ("latent_size", g.latent_size, config.latent_size(g.image_size)),
        ("skip_channels", g.skip_channels, channels),
        ("text_width", g.text_width, config.dm.text_width),
    ):
        if found != expected:
            raise ValueError(f"geometry.{name} is {found}, the configuration gives {expected}")


def _check_stages(stages: tuple[StageSpec, ...], geometry: Geometry, precision: str) -> None:
    names = [spec.name for spec in stages]
    expected = stage_specs(geometry, with_text=TEXT_STAGE in names, with_drive=DRIVE_STAGE in names)
    if names != list(expected):
        raise ValueError(f"stages are {', '.join(names) or 'none'}, expected {', '.join(expected)}")
    for spec in stages:
        known = expected[spec.name]
        for kind, found, wanted in (("inputs", spec.inputs, known.inputs), ("outputs", spec.outputs, known.outputs)):
            if [(t.name, t.dtype, t.shape) for t in found] != [(t.name, t.dtype, t.shape) for t in wanted]:
                raise ValueError(f"the {kind} of stage {spec.name!r} are not those that this program knows")
        if not 1 <= spec.batch[0] <= spec.batch[1] <= spec.batch[2]:
            raise ValueError(f"stage {spec.name!r} has the batch profile {spec.batch}, expected rising sizes from 1")
        if spec.batch[2] > LARGEST_SIZE:
            raise ValueError(f"stage {spec.name!r} has batches up to {spec.batch[2]}, expected at most {LARGEST_SIZE}")
        if precision not in spec.tolerance:
            raise ValueError(f"stage {spec.name!r} has no tolerance for precision {precision!r}")


def check_labels(labels: Sequence[str]) -> None:
    """Validate that labels are distinct and printable.

    Raises:
        ValueError: a label is empty, too long, not printable, or given twice; the message names it.
    """
    if len(labels) > MOST_LABELS:
        raise ValueError(f"there are {len(labels)} labels, expected at most {MOST_LABELS}")
    seen: dict[str, str] = {}
    for label in labels:
        key = label.strip().casefold()
        if not key:
            raise ValueError("a label is empty")
        if len(label) > LONGEST_LABEL or not label.isprintable():
            raise ValueError(
                f"the label {label[:40]!a} is longer than {LONGEST_LABEL} characters or holds one that is not printable"
            )
        if key in seen:
            raise ValueError(f"the label {seen[key]!r} is there twice (case and outer spaces do not count)")
        seen[key] = label


def _check_file_name(name: str) -> None:
    """Raise if a path could leave the bundle, on any system."""
    windows = PureWindowsPath(name)
    parts = name.split("/")
    if (
        not name
        or "\\" in name
        or not name.isprintable()  # includes control characters and lone surrogates
        or any(len(part.encode()) > _LONGEST_NAME for part in parts)
        or PurePosixPath(name).is_absolute()
        or windows.drive
        or windows.root
        or any(part in ("", ".", "..") for part in parts)
    ):
        raise ValueError(f"the file name {name[:80]!a} is not a plain path inside the bundle")
