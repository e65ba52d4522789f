"""Plans on disk: what each was made of and for, beside it; used only where all of that fits.

Layout::

    BUNDLE/plans/TARGET/STAGE.plan          what the target runs
    BUNDLE/plans/TARGET/STAGE.json          its record; the last thing that is written
    BUNDLE/plans/TARGET/STAGE.layers.json   what the target's inspector says of it, where it could be asked

Plans belong to no manifest: they can be made anew from the graphs, and are for one kind of GPU.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lfdm_export.bundle.manifest import FileEntry
from lfdm_export.bundle.reader import PLANS_FOLDER, Bundle, fingerprint
from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.engines.targets import PLAN_TARGETS, Target
from lfdm_export.errors import EngineError
from lfdm_export.files.atomic import folder_made, locked, sync_path, temporary_folder
from lfdm_export.files.json_codec import from_plain, to_plain

# A record is some kilobytes; a file far beyond that is not one.
_LARGEST_RECORD = 1 << 20

Compatibility = Literal["none", "ampere+", "same-capability"]


@dataclass(frozen=True)
class BuildOptions:
    """What the builder is told beside graph and batch profile.

    Attributes:
        optimization_level: 0 … 5, more is slower to build; None for the builder's own.
        hardware_compatible: TensorRT: which GPUs beside the builder's the plan shall run on.
        version_compatible: TensorRT: run under later versions of the same major number too.
        strip: TensorRT: leave the weights out; they are read from the graphs when the plan is loaded, so that new
            weights of the same architecture need no new plan, and the stages of one network share them on disk.
    """

    optimization_level: int | None = None
    hardware_compatible: Compatibility = "none"
    version_compatible: bool = False
    strip: bool = False


@dataclass(frozen=True)
class Fingerprint:
    """What a plan was made of and for. Plans of equal fingerprints can stand for each other.

    Attributes:
        target: that runs it.
        stage: its name.
        precision: of the graph.
        sources: SHA-256 of the graph and of the files of its weights, by path in the bundle; none if stripped.
        structure: SHA-256 of the graph that the builder read, without the values of its weights.
        batch: smallest, usual and largest batch.
        library: the target's name and version.
        gpus: what it was built for: architectures (RTX), or the one GPU's architecture and name.
        options: that the builder was given.
        grid_sampling: how its layers sample pictures; see `grid_samples`.
    """

    target: Target
    stage: str
    precision: str
    sources: Mapping[str, str]
    structure: str
    batch: tuple[int, int, int]
    library: str
    gpus: tuple[str, ...]
    options: BuildOptions
    grid_sampling: str = "as the parser read it"


@dataclass(frozen=True)
class PlanRecord:
    """The file beside a plan.

    Attributes:
        fingerprint: what it was made of and for.
        plan: SHA-256 and size of the plan.
        seconds: that the builder took.
        peak_bytes: memory that the builder's process took at its peak.
        layers: what was built, in numbers: by kind of layer and by data type of its outputs.
    """

    fingerprint: Fingerprint
    plan: FileEntry
    seconds: float
    peak_bytes: int
    layers: Mapping[str, object]


@dataclass(frozen=True)
class PlanFolder:
    """The plans of one target in a bundle."""

    bundle: Path
    target: Target

    @property
    def path(self) -> Path:
        """The folder; need not exist."""
        return self.bundle / PLANS_FOLDER / self.target

    def plan(self, stage: str) -> Path:
        """A stage's plan."""
        return self.path / f"{stage}.plan"

    def record_path(self, stage: str) -> Path:
        """What is written beside it."""
        return self.path / f"{stage}.json"

    def layers_path(self, stage: str) -> Path:
        """The inspector's words."""
        return self.path / f"{stage}.layers.json"

    def record(self, stage: str) -> PlanRecord | None:
        """The record of a stage's plan; None where there is none, or none that this program reads."""
        return read_record(self.record_path(stage))

    def reusable(self, wanted: Fingerprint) -> PlanRecord | None:
        """The record of the plan that is there, if it has exactly that fingerprint and is whole."""
        record = self.record(wanted.stage)
        if record is None or record.fingerprint != wanted or not is_whole(self.plan(wanted.stage), record):
            return None
        return record

    @contextlib.contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder to build in, on the same file system; one builder at a time, others wait.

        What a killed builder left behind is removed.

        Raises:
            EngineError: the bundle cannot be written.
        """
        try:
            with folder_made(self.path), locked(self.path), temporary_folder(self.path / "building") as folder:
                yield folder
        except OSError as error:
            raise EngineError(f"plans cannot be written to {self.path}: {error.strerror or error}") from error

    def install(self, record: PlanRecord, plan: Path, layers: Path | None, workshop: Path) -> None:
        """Put a whole plan in its place; its record last, so that none is ever believed beside another plan.

        Raises:
            OSError: the disk is full, for one; the old plan is still there, or neither has a record.
        """
        stage = record.fingerprint.stage
        written = workshop / f"{stage}.json"
        written.write_text(json.dumps(to_plain(record), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        sync_path(written)
        sync_path(plan)
        self.record_path(stage).unlink(missing_ok=True)
        self.layers_path(stage).unlink(missing_ok=True)
        plan.replace(self.plan(stage))
        if layers is not None:
            layers.replace(self.layers_path(stage))
        written.replace(self.record_path(stage))
        sync_path(self.path)

    def stages(self) -> tuple[str, ...]:
        """The stages that have a plan and a record, fit or not."""
        return tuple(sorted(path.stem for path in self.path.glob("*.plan") if self.record_path(path.stem).is_file()))


def read_record(path: Path) -> PlanRecord | None:
    """The record in a file; None where there is none, or none that this program reads."""
    try:
        if path.stat().st_size > _LARGEST_RECORD:
            return None
        return from_plain(PlanRecord, json.loads(path.read_bytes()), "record")
    except (OSError, ValueError, RecursionError):
        return None


def is_whole(path: Path, record: PlanRecord) -> bool:
    """Whether a plan is the one that its record describes."""
    try:
        return path.stat().st_size == record.plan.bytes and fingerprint(path) == record.plan
    except OSError:
        return False


def remake(bundle: Path, target: Target) -> str:
    """The command that makes a bundle's plans."""
    return f"lfdm-export --plans {bundle} --target {target}"


def targets_with_plans(bundle: Bundle) -> tuple[Target, ...]:
    """The targets that the bundle has a plan of every stage for, fit or not."""
    return tuple(
        target for target in PLAN_TARGETS if set(bundle.stages) <= set(PlanFolder(bundle.path, target).stages())
    )


def gpus_of(target: Target, architectures: tuple[str, ...], gpu: Gpu | None) -> tuple[str, ...]:
    """What a plan built here is for, as its fingerprint says it."""
    if target == "tensorrt-rtx":
        return architectures
    assert gpu is not None, "TensorRT was chosen without a GPU"
    return (gpu.architecture, gpu.name)
