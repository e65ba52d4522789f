"""Parity of a bundle: its engines' outputs against PyTorch's.

Needs neither torch nor the checkpoints if the bundle contains a reference.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from lfdm_export.bundle.manifest import TEXT_STAGE
from lfdm_export.bundle.reader import PARITY_FOLDER, Bundle
from lfdm_export.engines.cuda_driver import find_gpus
from lfdm_export.engines.held import why_not_held
from lfdm_export.engines.interface import Engine
from lfdm_export.engines.onnxruntime.target import ONNXRUNTIME
from lfdm_export.engines.pytorch.target import PYTORCH
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import AUTO, EVERY_TARGET, SIMULATION, find_target, spec_of, target_names, this_machine
from lfdm_export.errors import BundleError, EngineError, InputError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.generate.stage_runner import StageRunner, load_engine
from lfdm_export.machine import engine_threads, environment
from lfdm_export.parity.chain import ChainResult, check_chain
from lfdm_export.parity.polygraphy import compare_stage
from lfdm_export.parity.report.checks import Check, OtherEngine
from lfdm_export.parity.report.model import Report
from lfdm_export.parity.stages import check_stage
from lfdm_export.progress import Progress, report
from lfdm_export.reference.inputs import chain_words
from lfdm_export.reference.stored import Reference
from lfdm_export.sampling.noise import draw_seed
from lfdm_export.stages import CHAIN_TOLERANCES, StageSpec, stage_specs

_SIMULATED = ("fp16", "bf16")
_SIMULATION_TITLE = "a GPU's rounding, simulated by ONNX Runtime, CPU"

if TYPE_CHECKING:
    from lfdm_models.model import LfdmModel
    from lfdm_models.text import BertTextEncoder


def verify_bundle(
    bundle: Bundle | str | os.PathLike[str],
    *,
    model: LfdmModel | None = None,
    seed: int | None = None,
    threads: int | None = None,
    text_encoder: BertTextEncoder | str | os.PathLike[str] | None = None,
    targets: Sequence[str] = (ONNXRUNTIME.name,),
    polygraphy: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with its model: every stage, then a whole clip, with each engine.

    Each stage is checked in this order, up to the first check that cannot be made: names, dtypes and shapes; finite
    values; error against PyTorch; a sample alone against the same sample in a batch. Then a clip of 10 DDIM steps with
    the same noise: errors of the latent after each step, of flow, occlusion and frames.

    Args:
        bundle: a bundle, or its path; a bundle opened from a path is checked by its hashes.
        model: the model that the bundle was exported from: PyTorch runs again, on new inputs. None compares with the
            reference that the export stored in the bundle, which needs no torch.
        seed: seed of the new inputs; None draws one, which the report states.
        threads: threads per engine; None uses all cores.
        text_encoder: the text encoder that the bundle was exported with: a folder, a hub name, or loaded; required
            with `model` if the bundle has a text encoder.
        targets: targets that run the stages, one after the other. "all" is every target; those that cannot run this
            bundle on this machine are reported with the reason. "simulation" is ONNX Runtime with float32 graphs that
            round as a GPU does in fp16 or bf16. "auto" is the first target that runs here, or else the simulation.
        polygraphy: also compare each engine with ONNX Runtime by NVIDIA Polygraphy, stage by stage; the outputs are
            written to BUNDLE/parity/polygraphy, for Polygraphy's tools.
        progress: called as ``progress(what, done, total)``.

    Returns:
        The report; write it with ``report.write(folder)``.

    Raises:
        BundleError: there is no complete bundle at the path, or it has no reference and no model is given.
        InputError: the model is not the bundle's, or an argument is missing or does not apply.
        EngineError: a target requested by name is not available here, or no target is; or the number of threads.
        MissingDependencyError: onnxruntime is not installed, or Polygraphy, if requested.
    """
    engine_threads(threads)  # else reported as a difference of each stage
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    # The program's own tolerances: the manifest's may come from an untrusted source.
    specs = stage_specs(manifest.geometry, with_text=manifest.has_text, with_drive=manifest.has_drive)
    if manifest.precision not in CHAIN_TOLERANCES:
        raise BundleError(
            f"{opened.path} has the precision {manifest.precision!r}, for which this program knows no tolerances "
            f"(it knows {', '.join(CHAIN_TOLERANCES)}); use the lfdm-export that made it"
        )
    if model is None:
        reference, origin = _stored(opened, specs, seed), "PyTorch's outputs, stored in the bundle at export"
    else:
        reference = _fresh(opened, model, seed, text_encoder, progress)
        origin = "PyTorch, run again on new inputs"
    inputs = reference.inputs(manifest.config, manifest.geometry)

    runs, absent = _choose(opened, targets)
    comparison = _Comparison(opened, specs, inputs, reference, threads, progress)
    outcomes = [
        _simulate(comparison) if target == SIMULATION else _run(comparison, target, manifest.precision)
        for target in runs
    ]
    first = outcomes[0]
    others = [outcome.engine for outcome in outcomes[1:]]
    if polygraphy:
        engines = [target for target in runs if target != SIMULATION]
        others += [_by_polygraphy(comparison, target) for target in engines]
    return Report(
        bundle=opened.name,
        precision=manifest.precision,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        engine=first.engine.name,
        reference=origin,
        seed=reference.seed,
        sampler=chain_words(manifest.provenance, len(reference.chain.latents)),
        checks=first.engine.checks,
        steps=first.chain.steps,
        environment=environment(threads, _took_part(runs, model is not None)),
        exported_with=manifest.versions,
        provenance=_plain(manifest.provenance),
        labels=manifest.labels,
        geometry=_sizes(opened),
        others=(*others, *absent),
        pictures=first.chain.pictures,
    )


def _took_part(runs: Sequence[str], with_torch: bool) -> tuple[str, ...]:
    """The distributions of the programs that ran."""
    specs = (ONNXRUNTIME if name == SIMULATION else spec_of(name) for name in runs)
    found = [name for spec in specs for name in spec.distributions]
    return tuple(dict.fromkeys([*found, *PYTORCH.packages["torch"] * with_torch]))


@dataclass(frozen=True, eq=False)
class _Comparison:
    """What every engine is compared on.

    Attributes:
        bundle: the bundle whose graphs run.
        specs: the stages to compare, by name.
        inputs: every stage input by name, several samples each.
        reference: PyTorch's outputs for these inputs, and its clip.
        threads: threads per engine; None uses all cores.
        progress: called as ``progress(what, done, total)``.
    """

    bundle: Bundle
    specs: Mapping[str, StageSpec]
    inputs: Mapping[str, NDArray[Any]]
    reference: Reference
    threads: int | None
    progress: Progress | None = None

    def loader(self, target: Target) -> Callable[[str], Engine]:
        """A function that loads a target's engine of a stage."""
        return lambda stage: load_engine(self.bundle, stage, target, threads=self.threads)


@dataclass(frozen=True)
class _Outcome:
    """The result of one engine, and of its clip."""

    engine: OtherEngine
    chain: ChainResult


def _choose(bundle: Bundle, names: Sequence[str]) -> tuple[list[str], list[OtherEngine]]:
    """The targets to run, and with "all" those that cannot run, with the reason."""
    if EVERY_TARGET in names:
        return _every(bundle)
    precision = bundle.manifest.precision
    chosen = []
    for name in names:
        target = name
        if name == SIMULATION:
            if precision not in _SIMULATED:
                raise InputError(f"fp16 and bf16 can be simulated, {bundle.path} is {precision}; take another target")
        elif name == AUTO:
            target = _first(bundle)
        elif name != ONNXRUNTIME.name:  # loading it reports a missing package by name
            find_target(name, "run", precision, machine=this_machine())
        chosen.append(target)
    return list(dict.fromkeys(chosen)), []


def _first(bundle: Bundle) -> str:
    """The graph target that "auto" chooses; if none passes the self-check, the first, so that a report shows why."""
    precision = bundle.manifest.precision
    with contextlib.suppress(EngineError):
        target = StageRunner(bundle).target
        if spec_of(target).takes == "graphs":
            return target
    try:
        return str(find_target(AUTO, "run", precision, machine=this_machine()).target)
    except EngineError:
        if precision not in _SIMULATED:
            raise
        return SIMULATION


def _every(bundle: Bundle) -> tuple[list[str], list[OtherEngine]]:
    machine, precision = this_machine(), bundle.manifest.precision
    runs: list[str] = []
    absent: list[OtherEngine] = []
    for spec in map(spec_of, target_names()):
        reason = spec.lacking("run", precision, machine) or why_not_held(bundle, spec.name)
        if reason:
            absent.append(OtherEngine(spec.title, lacking=reason))
        else:
            runs.append(spec.name)
    if precision in _SIMULATED and not any(spec_of(target).takes == "plans" for target in runs):
        missing = [name for name in ("onnx", "onnxruntime", "torch") if importlib.util.find_spec(name) is None]
        if missing:
            reason = f"{' and '.join(missing)} not installed: pip install 'lfdm-export[export]'"
            absent.append(OtherEngine(_SIMULATION_TITLE, lacking=reason))
        else:
            runs.append(SIMULATION)
    if not runs:
        reasons = "; ".join(f"{engine.name}: {engine.lacking}" for engine in absent)
        raise EngineError(f"nothing here runs {bundle.path}: {reasons}")
    return runs, absent


def _simulate(comparison: _Comparison) -> _Outcome:
    """All checks with float32 graphs that round as the bundle's do on a GPU."""
    from lfdm_export.parity.simulate import simulate_bundle

    with tempfile.TemporaryDirectory() as folder:
        simulated = simulate_bundle(comparison.bundle, Path(folder) / "bundle")
        precision = comparison.bundle.manifest.precision
        outcome = _run(dataclasses.replace(comparison, bundle=simulated), ONNXRUNTIME.name, precision)
    return dataclasses.replace(outcome, engine=dataclasses.replace(outcome.engine, name=_SIMULATION_TITLE))


def _run(comparison: _Comparison, target: Target, precision: str) -> _Outcome:
    """All checks with one target, within the tolerances of a precision."""
    specs, reference, progress = comparison.specs, comparison.reference, comparison.progress
    load = comparison.loader(target)
    checks: list[Check] = []
    for done, stage in enumerate(specs.values()):
        report(progress, "stages", done, len(specs))
        checks += check_stage(load, stage, stage.tolerance[precision], comparison.inputs, reference)
    report(progress, "stages", len(specs), len(specs))
    chain = check_chain(
        comparison.bundle, reference.chain, reference.seed, comparison.threads, progress, target, precision
    )
    gpus, _ = find_gpus()
    spec = spec_of(target)
    note = f" ({spec.cpu_notes[precision]})" if precision in spec.cpu_notes else ""
    place = gpus[0].name if spec.gpu_precisions and gpus else f"CPU{note}"
    return _Outcome(OtherEngine(f"{spec.title}, {place}", (*checks, *chain.checks)), chain)


def _by_polygraphy(comparison: _Comparison, target: Target) -> OtherEngine:
    """Compare one engine with ONNX Runtime as run by Polygraphy."""
    bundle, load = comparison.bundle, comparison.loader(target)
    checks: list[Check] = []
    title = spec_of(target).title
    for spec in comparison.specs.values():
        tolerance = spec.tolerance[bundle.manifest.precision]
        save = bundle.path / PARITY_FOLDER / "polygraphy"
        try:
            checks += compare_stage(
                bundle, spec, load, title, tolerance, comparison.inputs, threads=comparison.threads, save=save
            )
        except EngineError as error:
            checks.append(Check(spec.name, "interface", "Polygraphy", passed=False, meaning=str(error)))
    return OtherEngine(f"{title} against ONNX Runtime, by Polygraphy", tuple(checks))


def _stored(bundle: Bundle, specs: Mapping[str, StageSpec], seed: int | None) -> Reference:
    path = bundle.reference_path
    if path is None:
        raise BundleError(
            f"{bundle.path} holds no reference to compare with: give the model that it was exported from "
            "(lfdm-verify BUNDLE --lfae FILE --dm FILE, or --model), or export it again"
        )
    if seed is not None:
        raise InputError(
            "seed is given, but the bundle's stored reference has its own seed; give the model as well, or no seed"
        )
    manifest = bundle.manifest
    return Reference.load(path, manifest.config, manifest.geometry, specs, manifest.provenance)


def _fresh(
    bundle: Bundle,
    model: LfdmModel,
    seed: int | None,
    text_encoder: BertTextEncoder | str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Reference:
    from lfdm_export.export.bundle_export import load_text_encoder
    from lfdm_export.reference.pytorch import make_reference

    manifest = bundle.manifest
    if model.config != manifest.config:
        raise InputError(
            f"the model is not the one of {bundle.path}: {_difference(manifest.config, model.config)}; "
            "give the checkpoints and options that the bundle was exported with"
        )
    if manifest.has_text != (text_encoder is not None):
        has, give = ("has a", "give it") if manifest.has_text else ("has no", "leave it out")
        raise InputError(f"{bundle.path} {has} text encoder (stage {TEXT_STAGE!r}); {give} beside the model")
    return make_reference(
        model,
        manifest.geometry,
        seed=draw_seed() if seed is None else seed,
        text_encoder=load_text_encoder(text_encoder, manifest.geometry.text_width),
        drive=manifest.has_drive,
        whole=True,
        progress=progress,
    )


def _difference(expected: object, found: object) -> str:
    """The first field in which two configurations differ."""
    pairs = dict(_flat(to_plain(found), ""))
    for name, value in _flat(to_plain(expected), ""):
        if pairs.get(name) != value:
            return f"{name} is {pairs.get(name)}, expected {value}"
    return "their configurations differ"


def _flat(value: Any, name: str) -> list[tuple[str, Any]]:
    if not isinstance(value, dict):
        return [(name, value)]
    return [pair for key, item in value.items() for pair in _flat(item, f"{name}.{key}" if name else key)]


def _plain(provenance: Mapping[str, object]) -> dict[str, object]:
    """Provenance as strict JSON; a NaN, which Python's reader accepts, becomes a string."""
    plain: dict[str, object] = json.loads(json.dumps(to_plain(provenance)), parse_constant=str)
    return plain


def _sizes(bundle: Bundle) -> dict[str, int]:
    g = bundle.manifest.geometry
    return {
        "image size": g.image_size,
        "latent size": g.latent_size,
        "frames": g.frames,
        "frames decoded together": g.chunk_frames,
    }
