"""A bundle's graphs -> plans beside them: matching plans are kept, the others built, one stage at a time."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lfdm_export.bundle.reader import ONNX_FOLDER, Bundle, fingerprint, onnx_path
from lfdm_export.engines.target_spec import Machine, Target
from lfdm_export.engines.targets import find_target, spec_of, target_names, this_machine
from lfdm_export.engines.tensorrt.api import load_api
from lfdm_export.engines.tensorrt.build import LAYERS, PLAN, BuildRequest, build_in_child, profile_of
from lfdm_export.engines.tensorrt.grid_samples import GRID_SAMPLING
from lfdm_export.engines.tensorrt.plan_graph import builder_graph
from lfdm_export.engines.tensorrt.plans import BuildOptions, Fingerprint, PlanFolder, PlanRecord, gpus_of
from lfdm_export.engines.tensorrt.target import TENSORRT, TENSORRT_RTX, rtx_architectures
from lfdm_export.errors import EngineError, InputError
from lfdm_export.progress import Progress, report

logger = logging.getLogger(__name__)

How = Literal["built", "kept"]


@dataclass(frozen=True)
class PlanMade:
    """One stage's plan.

    Attributes:
        stage: name of the stage.
        path: path of the plan.
        how: "built", or "kept" (it already existed).
        record: the plan's record.
    """

    stage: str
    path: Path
    how: How
    record: PlanRecord


def make_plans(
    bundle: Bundle | str | os.PathLike[str],
    target: Target,
    *,
    stages: Sequence[str] | None = None,
    options: BuildOptions | None = None,
    gpus: Collection[str] | None = None,
    machine: Machine | None = None,
    progress: Progress | None = None,
) -> tuple[PlanMade, ...]:
    """Build a target's plans for a bundle.

    An existing plan of the same graph, for the same GPUs, by the same version with the same options is kept. Every
    other plan is built in a separate process and installed atomically: an interrupted or failed build leaves the old
    plan, or none.

    Args:
        bundle: a bundle, or its path; a bundle opened from a path is checked by its hashes.
        target: "tensorrt" or "tensorrt-rtx".
        stages: names of the stages; None for all.
        options: options of the builder; None for the defaults.
        gpus: architectures that TensorRT for RTX builds for; None for those of `RTX_DEFAULT` that support the bundle's
            precision.
        machine: the machine; None for this one.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The plans, in the order of the stages.

    Raises:
        InputError: an argument is invalid.
        EngineError: the target is not available here, a graph is refused, the builder dies, or the disk is full.
        MissingDependencyError: onnx is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    here = this_machine() if machine is None else machine
    options = BuildOptions() if options is None else options
    _check(opened, target, stages, options, gpus)
    precision = opened.manifest.precision
    find_target(target, "export", precision, machine=here, gpus=gpus)
    architectures = rtx_architectures(precision, gpus) if target == TENSORRT_RTX.name else ()
    built_for = gpus_of(target, architectures, here.gpus[0] if here.gpus else None)
    chosen = list(opened.stages) if stages is None else list(stages)
    folder = PlanFolder(opened.path, target)
    made = []
    with folder.workshop() as workshop:
        for done, stage in enumerate(chosen):
            report(progress, stage, done, len(chosen))
            graph, wanted = _wanted(opened, stage, target, built_for, options)
            made.append(_make(folder, workshop / stage, graph, wanted, opened, architectures))
    report(progress, "done", len(chosen), len(chosen))
    return tuple(made)


def _check(
    bundle: Bundle, target: Target, stages: Sequence[str] | None, options: BuildOptions, gpus: Collection[str] | None
) -> None:
    takers = target_names("plans")
    if target not in takers:
        raise InputError(f"the target {target!r} takes the graphs as they are; plans are for {', '.join(takers)}")
    for stage in stages or ():
        bundle.stage_path(stage)
    if options.optimization_level is not None and not 0 <= options.optimization_level <= 5:
        raise InputError(f"the optimization level is {options.optimization_level}, expected 0 to 5")
    if target == TENSORRT_RTX.name and BuildOptions(options.optimization_level) != options:
        raise InputError(
            "TensorRT for RTX builds for a list of GPUs and cannot strip weights without one (tried with 1.7.1); "
            "leave out hardware and version compatibility and stripping, or take --target tensorrt"
        )
    if target == TENSORRT.name and gpus:
        raise InputError("TensorRT builds for the GPU that is here; leave out --gpus, or take --target tensorrt-rtx")


def _wanted(
    bundle: Bundle, stage: str, target: Target, gpus: tuple[str, ...], options: BuildOptions
) -> tuple[bytes, Fingerprint]:
    """The graph for the builder, and the fingerprint of its plan."""
    graph, structure, data_files = builder_graph(bundle, stage, target)
    files = bundle.manifest.files
    sources = () if options.strip else (onnx_path(stage), *(f"{ONNX_FOLDER}/{name}" for name in data_files))
    spec = bundle.stages[stage]
    return graph, Fingerprint(
        target=target,
        stage=stage,
        precision=bundle.manifest.precision,
        sources={name: files[name].sha256 for name in sources},
        structure=structure,
        batch=spec.batch,
        library=load_api(target).title,
        gpus=gpus,
        options=options,
        grid_sampling=GRID_SAMPLING,
    )


def _make(
    folder: PlanFolder, work: Path, graph: bytes, wanted: Fingerprint, bundle: Bundle, architectures: tuple[str, ...]
) -> PlanMade:
    stage = wanted.stage
    record = folder.reusable(wanted)
    if record is not None:
        return PlanMade(stage, folder.plan(stage), "kept", record)
    request = BuildRequest(
        target=wanted.target,
        stage=stage,
        weights_beside=str(bundle.stage_path(stage).resolve()),
        profile=profile_of(bundle.stages[stage]),
        tf32=wanted.precision == "tf32",
        gpus=architectures,
        options=wanted.options,
        # TensorRT for RTX measures no timings when it builds.
        timing_cache=str(folder.path.resolve() / "timing.cache") if wanted.target == TENSORRT.name else "",
    )
    try:
        work.mkdir()
        result = build_in_child(work, request, graph)
        plan, layers = work / PLAN, work / LAYERS
        record = PlanRecord(wanted, fingerprint(plan), result.seconds, result.peak_bytes, result.layers)
        folder.install(record, plan, layers if layers.is_file() else None, work)
    except OSError as error:
        raise EngineError(
            f"the {spec_of(wanted.target).title} plan of stage {stage!r} cannot be written: {error.strerror or error}"
        ) from error
    shutil.rmtree(work, ignore_errors=True)
    megabytes, peak = record.plan.bytes / 1e6, record.peak_bytes / 1e9
    logger.info("%s: %.1f MB in %.1f s, %.2f GB at the peak", stage, megabytes, record.seconds, peak)
    return PlanMade(stage, folder.plan(stage), "built", record)
