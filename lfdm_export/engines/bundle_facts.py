"""Facts about a bundle and the targets that run it here, for people and programs; needs neither torch nor onnx."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.held import held_targets, why_not_held
from lfdm_export.engines.targets import AUTO, find_target, spec_of, target_names, this_machine
from lfdm_export.errors import EngineError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.sampling.tables import SAMPLERS
from lfdm_export.sampling.tuned import TUNED


@dataclass(frozen=True)
class TargetFact:
    """Whether one target runs the bundle on this machine.

    Attributes:
        runs: whether it does.
        reason: why not, and what to do; for the target that "auto" selects, why; else "".
    """

    runs: bool
    reason: str


@dataclass(frozen=True)
class BundleFacts:
    """The facts of one bundle.

    Attributes:
        path: folder of the bundle.
        labels: labels that have an embedding.
        text: whether it accepts free text.
        drive: whether it transfers motions (`Pipeline.transfer_motion`).
        frames: frames per clip.
        image_size: rows and columns, in pixels.
        precision: precision of the graphs.
        dataset: dataset whose preprocessing applies to its pictures; None for the default preprocessing.
        sampling: the defaults.
        samplers: names of all samplers; "tuned" if the bundle has it.
        targets: facts by target name.
        auto: the default target; None if nothing runs the bundle here.
        files: bytes of each file, the largest first.
        provenance: origin of the weights.
        versions: versions of the programs that made the bundle.
    """

    path: str
    labels: tuple[str, ...]
    text: bool
    drive: bool
    frames: int
    image_size: int
    precision: str
    dataset: str | None
    sampling: SamplingOptions
    samplers: tuple[str, ...]
    targets: Mapping[str, TargetFact]
    auto: str | None
    files: Mapping[str, int]
    provenance: Mapping[str, object]
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, object]:
        """Convert to a plain JSON object."""
        plain: dict[str, object] = to_plain(self)
        return plain


def bundle_facts(bundle: Bundle) -> BundleFacts:
    """Gather the facts of an open bundle on this machine."""
    manifest, machine = bundle.manifest, this_machine()
    held = held_targets(bundle)
    targets: dict[str, TargetFact] = {}
    for spec in map(spec_of, target_names()):
        reason = spec.lacking("run", manifest.precision, machine) or why_not_held(bundle, spec.name)
        targets[spec.name] = TargetFact(not reason, reason)
    auto = None
    try:
        choice = find_target(AUTO, "run", manifest.precision, plans=held, machine=machine)
    except EngineError:
        pass  # each target says why
    else:
        auto = choice.target
        targets[choice.target or ""] = TargetFact(True, choice.reason)
    return BundleFacts(
        path=str(bundle.path),
        labels=bundle.labels,
        text=manifest.has_text,
        drive=manifest.has_drive,
        frames=manifest.geometry.frames,
        image_size=manifest.geometry.image_size,
        precision=manifest.precision,
        dataset=manifest.preprocessing.dataset,
        sampling=manifest.sampler,
        samplers=(*SAMPLERS, *([TUNED] if manifest.tuned is not None else [])),
        targets=targets,
        auto=auto,
        files={name: entry.bytes for name, entry in sorted(manifest.files.items(), key=lambda item: -item[1].bytes)},
        provenance=manifest.provenance,
        versions=manifest.versions,
    )
