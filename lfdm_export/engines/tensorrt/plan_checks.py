"""Checks, before a plan runs, that it matches the stage of a bundle, this version and GPU, and is complete."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import spec_of
from lfdm_export.engines.tensorrt.grid_samples import GRID_SAMPLING
from lfdm_export.engines.tensorrt.plans import Fingerprint, PlanFolder, PlanRecord, is_whole, read_record, remake
from lfdm_export.engines.tensorrt.target import TENSORRT_RTX
from lfdm_export.errors import EngineError

_ALTERED = "is not what its record says: it was altered, or cut off"


def plan_to_run(bundle: Bundle, stage: str, target: Target, library: str, gpu: Gpu) -> tuple[Path, PlanRecord]:
    """The plan of a stage, if it matches this graph, this version and this GPU.

    Args:
        bundle: a bundle with verified files.
        stage: name of the stage.
        target: target that runs the plan.
        library: name and version of the target here.
        gpu: GPU that runs the plan.

    Raises:
        EngineError: there is no plan, or it was made from or for something else; the message says what
            to run.
    """
    folder = PlanFolder(bundle.path, target)
    path = folder.plan(stage)
    record = _record_of(bundle, stage, target, path, folder.record_path(stage))
    made, again = record.fingerprint, f"make it with: {remake(bundle.path, target)}"
    reason = _made_of_another(made, bundle, stage, target) or _made_for_another(made, library, gpu)
    if reason:
        raise EngineError(f"the plan {path} {reason}; {again}, or take --target onnxruntime")
    if not is_whole(path, record):
        raise EngineError(f"the plan {path} {_ALTERED}; {again}")
    return path, record


def check_plan_alone(
    bundle: Bundle, stage: str, target: Target, plan: Path, record_path: Path, gpus: Collection[Gpu] = ()
) -> PlanRecord:
    """Check that another program can run a plan without this one.

    The target version of that program is not known here: the program itself rejects plans of other versions.

    Args:
        bundle: a bundle with verified files.
        stage: name of the stage.
        target: target that runs the plan.
        plan: the plan file.
        record_path: its record.
        gpus: GPUs that run the plan, as far as they are known.

    Returns:
        The record.

    Raises:
        EngineError: it was made from or for something else, lacks its weights, or is incomplete; the message
            says what to run.
    """
    record = _record_of(bundle, stage, target, plan, record_path)
    made, again = record.fingerprint, f"make it with: {remake(bundle.path, target)}"
    reason = _made_of_another(made, bundle, stage, target)
    if not reason and made.options.strip:
        reason = "was stripped of its weights, which only lfdm-export's own runner puts back"
    if not reason:
        reason = next((reason for gpu in gpus if (reason := _made_for_another_gpu(made, gpu))), "")
    if not reason and not is_whole(plan, record):
        reason = _ALTERED
    if reason:
        raise EngineError(f"the plan {plan} {reason}; {again}")
    return record


def _record_of(bundle: Bundle, stage: str, target: Target, plan: Path, record_path: Path) -> PlanRecord:
    record = read_record(record_path)
    if record is None or not plan.is_file():
        raise EngineError(
            f"{bundle.path} has no whole {spec_of(target).title} plan of stage {stage!r}; "
            f"make it with: {remake(bundle.path, target)}"
        )
    return record


def _made_of_another(made: Fingerprint, bundle: Bundle, stage: str, target: Target) -> str:
    """Why a plan does not match the stage of a bundle; "" if it does."""
    spec = bundle.stages[stage]
    for what, found, expected in (
        ("target", made.target, target),
        ("stage", made.stage, stage),
        ("precision", made.precision, bundle.manifest.precision),
        ("batch profile", made.batch, spec.batch),
        ("sampling", made.grid_sampling, GRID_SAMPLING),
    ):
        if found != expected:
            return f"is of {what} {found}, expected {expected}"
    for name, digest in made.sources.items():
        if name not in bundle.manifest.files or bundle.manifest.files[name].sha256 != digest:
            return f"was made from another {name} than the bundle's"
    if not made.sources and not made.options.strip:
        return "does not say what it was made from"
    return ""


def _made_for_another(made: Fingerprint, library: str, gpu: Gpu) -> str:
    """Why a plan does not run here; "" if it does."""
    if made.library != library and not _later(made, library):
        return f"was built by {made.library}, here is {library}"
    return _made_for_another_gpu(made, gpu)


def _made_for_another_gpu(made: Fingerprint, gpu: Gpu) -> str:
    if _runs_on(made, gpu):
        return ""
    return f"was built for {', '.join(made.gpus)}, here is {gpu.name} ({gpu.architecture})"


def _later(made: Fingerprint, library: str) -> bool:
    """Whether this version may run a version-compatible plan: a later version with the same major number may."""
    (name, _, old), (other, _, new) = made.library.rpartition(" "), library.rpartition(" ")
    if not made.options.version_compatible or name != other:
        return False
    numbers = [tuple(int(part) for part in version.split(".") if part.isdigit()) for version in (old, new)]
    return numbers[0][:1] == numbers[1][:1] and numbers[0] <= numbers[1]


def _runs_on(made: Fingerprint, gpu: Gpu) -> bool:
    if made.target == TENSORRT_RTX.name or made.options.hardware_compatible == "same-capability":
        return gpu.architecture in made.gpus
    if made.options.hardware_compatible == "ampere+":
        return gpu.compute_capability >= (8, 0)
    return (gpu.architecture, gpu.name) == made.gpus
