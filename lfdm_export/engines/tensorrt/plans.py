"""Plans on disk, each with a record of what it was made from and for; a plan is used only if all of that matches.

Layout::

    BUNDLE/plans/TARGET/STAGE.plan          what the target runs
    BUNDLE/plans/TARGET/STAGE.json          its record, written last
    BUNDLE/plans/TARGET/STAGE.layers.json   the inspector output of the target, if available

Plans are not in the manifest: they can be rebuilt from the graphs, and are for one kind of GPU.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lfdm_export.bundle.manifest import FileEntry
from lfdm_export.bundle.reader import PLANS_FOLDER, fingerprint
from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.tensorrt.target import TENSORRT_RTX
from lfdm_export.errors import EngineError
from lfdm_export.files.atomic import folder_made, locked, sync_path, temporary_folder
from lfdm_export.files.json_codec import from_plain, to_plain

# A record has a few kilobytes; a much larger file is not a record.
_LARGEST_RECORD = 1 << 20

Compatibility = Literal["none", "ampere+", "same-capability"]


@dataclass(frozen=True)
class BuildOptions:
    """The options of a builder besides graph and batch profile.

    Attributes:
        optimization_level: 0 … 5, higher builds more slowly; None for the default of the builder.
        hardware_compatible: TensorRT: which GPUs, besides that of the builder, run the plan.
        version_compatible: TensorRT: also run under later versions with the same major number.
        strip: TensorRT: omit the weights; they are read from the graphs when the plan is loaded, so that new
            weights of the same architecture need no new plan, and the stages of one network share them on disk.
    """

    optimization_level: int | None = None
    hardware_compatible: Compatibility = "none"
    version_compatible: bool = False
    strip: bool = False


@dataclass(frozen=True)
class Fingerprint:
    """What a plan was made from and for. Plans with equal fingerprints are interchangeable.

    Attributes:
        target: the target that runs it.
        stage: name of the stage.
        precision: precision of the graph.
        sources: SHA-256 of the graph and of the files of its weights, by path in the bundle; empty if stripped.
        structure: SHA-256 of the graph that the builder read, without the values of its weights.
        batch: smallest, typical and largest batch.
        library: name and version of the target.
        gpus: what it was built for: architectures (RTX), or the architecture and name of the one GPU.
        options: options of the builder.
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
    """The record of a plan.

    Attributes:
        fingerprint: what the plan was made from and for.
        plan: SHA-256 and size of the plan.
        seconds: time of the build.
        peak_bytes: peak memory of the builder process.
        layers: numbers about the plan: by kind of layer and by data type of its outputs.
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
        """The folder; it may not exist."""
        return self.bundle / PLANS_FOLDER / self.target

    def plan(self, stage: str) -> Path:
        """The path of a stage's plan."""
        return self.path / f"{stage}.plan"

    def record_path(self, stage: str) -> Path:
        """The path of its record."""
        return self.path / f"{stage}.json"

    def layers_path(self, stage: str) -> Path:
        """The path of the inspector output."""
        return self.path / f"{stage}.layers.json"

    def record(self, stage: str) -> PlanRecord | None:
        """The record of a stage's plan; None if there is none, or none that this program reads."""
        return read_record(self.record_path(stage))

    def reusable(self, wanted: Fingerprint) -> PlanRecord | None:
        """The record of the existing plan, if it has exactly this fingerprint and is complete."""
        record = self.record(wanted.stage)
        if record is None or record.fingerprint != wanted or not is_whole(self.plan(wanted.stage), record):
            return None
        return record

    @contextlib.contextmanager
    def workshop(self) -> Iterator[Path]:
        """A folder to build in, on the same file system; one builder at a time, others wait.

        Files from a killed builder are removed.

        Raises:
            EngineError: the bundle is not writable.
        """
        try:
            with folder_made(self.path), locked(self.path), temporary_folder(self.path / "building") as folder:
                yield folder
        except OSError as error:
            raise EngineError(f"plans cannot be written to {self.path}: {error.strerror or error}") from error

    def install(self, record: PlanRecord, plan: Path, layers: Path | None, workshop: Path) -> None:
        """Move a complete plan into place; its record last, so that a record never belongs to another plan.

        Raises:
            OSError: for example, the disk is full; the old plan is still there, or there is no record.
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
        """The stages that have a plan and a record, whether they match or not."""
        return tuple(sorted(path.stem for path in self.path.glob("*.plan") if self.record_path(path.stem).is_file()))


def read_record(path: Path) -> PlanRecord | None:
    """The record in a file; None if there is none, or none that this program reads."""
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
    """The command that rebuilds the plans of a bundle."""
    return f"lfdm-export --plans {bundle} --target {target}"


def gpus_of(target: Target, architectures: tuple[str, ...], gpu: Gpu | None) -> tuple[str, ...]:
    """What a plan built here is for, as written in its fingerprint."""
    if target == TENSORRT_RTX.name:
        return architectures
    assert gpu is not None, "TensorRT was chosen without a GPU"
    return (gpu.architecture, gpu.name)
