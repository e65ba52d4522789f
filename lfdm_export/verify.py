"""Parity of a bundle: its graphs under ONNX Runtime against what PyTorch gives.

Needs neither torch nor the checkpoints where the bundle holds a reference.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from lfdm_export.bundle import Bundle
from lfdm_export.errors import BundleError, InputError
from lfdm_export.json_codec import to_plain
from lfdm_export.machine import environment
from lfdm_export.manifest import TEXT_STAGE
from lfdm_export.pipeline import Progress
from lfdm_export.reference import Reference
from lfdm_export.reference_inputs import CHAIN_ETA, CHAIN_SAMPLER
from lfdm_export.report import Check, Report
from lfdm_export.stages import CHAIN_TOLERANCES, StageSpec, stage_specs
from lfdm_export.verify_chain import check_chain
from lfdm_export.verify_stages import check_stage

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
    progress: Progress | None = None,
) -> Report:
    """Compare a bundle with its model: every stage, then a whole clip.

    Of each stage, in this order and as far as it goes: names, dtypes and shapes; finite values; error against
    PyTorch; a sample alone against the same sample in a batch. Then a clip of 10 DDIM steps with the same noise:
    error after each step, of flow, occlusion and frames.

    Args:
        bundle: a bundle, or the path of one, whose files are then checked by their hashes.
        model: what the bundle was exported from: PyTorch runs again, on fresh inputs. None compares with the
            reference that was stored in the bundle at export, which needs no torch.
        seed: of the fresh inputs; None draws one, and the report tells it.
        threads: of each engine; None takes all cores.
        text_encoder: what the bundle's was exported from, a folder, a hub name, or loaded; needed beside `model`
            where the bundle has one.
        progress: called as ``progress(what, done, total)``.

    Returns:
        What was found; write it with ``report.write(folder)``.

    Raises:
        BundleError: there is no whole bundle at the path, or it holds no reference and no model is given.
        InputError: the model is another than the bundle's, or an argument is missing or without meaning.
        MissingDependencyError: onnxruntime is not installed.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    manifest = opened.manifest
    # The program's own tolerances: those of the manifest come from whoever made the bundle.
    specs = stage_specs(manifest.geometry, with_text=manifest.has_text)
    if manifest.precision not in CHAIN_TOLERANCES:
        raise BundleError(
            f"{opened.path} has the precision {manifest.precision!r}, for which this program knows no tolerances "
            f"(it knows {', '.join(CHAIN_TOLERANCES)}); use the lfdm-export that made it"
        )
    if model is None:
        reference, origin = _stored(opened, specs, seed), "PyTorch's outputs, stored in the bundle at export"
    else:
        reference = _fresh(opened, model, seed, text_encoder, progress)
        origin = "PyTorch, run anew on fresh inputs"
    inputs = reference.inputs(manifest.config, manifest.geometry)

    checks: list[Check] = []
    for done, spec in enumerate(specs.values()):
        if progress is not None:
            progress("stages", done, len(specs))
        checks += check_stage(opened, spec, spec.tolerance[manifest.precision], inputs, reference, threads)
    if progress is not None:
        progress("stages", len(specs), len(specs))
    chain = check_chain(opened, reference.chain, reference.seed, threads, progress)
    return Report(
        bundle=opened.path.resolve().name,
        precision=manifest.precision,
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        engine="ONNX Runtime, CPU",
        reference=origin,
        seed=reference.seed,
        sampler=f"{CHAIN_SAMPLER}, {len(reference.chain.latents)} steps, eta {CHAIN_ETA:g}, guidance 1",
        checks=(*checks, *chain.checks),
        steps=chain.steps,
        environment=environment(threads, with_torch=model is not None),
        exported_with=manifest.versions,
        provenance=_plain(manifest.provenance),
        labels=manifest.labels,
        geometry=_sizes(opened),
        pictures=chain.pictures,
    )


def _stored(bundle: Bundle, specs: Mapping[str, StageSpec], seed: int | None) -> Reference:
    path = bundle.reference_path
    if path is None:
        raise BundleError(
            f"{bundle.path} holds no reference to compare with: give the model that it was exported from "
            "(lfdm-verify BUNDLE --lfae FILE --dm FILE, or --model), or export it again"
        )
    if seed is not None:
        raise InputError(
            "seed was given, but the bundle's own reference has its seed already; give the model as well, or no seed"
        )
    return Reference.load(path, bundle.manifest.config, bundle.manifest.geometry, specs)


def _fresh(
    bundle: Bundle,
    model: LfdmModel,
    seed: int | None,
    text_encoder: BertTextEncoder | str | os.PathLike[str] | None,
    progress: Progress | None,
) -> Reference:
    from lfdm_export.export import load_text_encoder
    from lfdm_export.faithful import make_reference

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
        seed=secrets.randbits(32) if seed is None else seed,
        text_encoder=load_text_encoder(text_encoder, manifest.geometry.text_width),
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
    """Provenance as strict JSON has it; a NaN, which Python reads, becomes a string."""
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
