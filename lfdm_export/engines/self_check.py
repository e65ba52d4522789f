"""Checks, before the first use of a target on this machine, that it returns what PyTorch returned at export.

The same graph may be exact on one processor and wrong on another, because libraries choose kernels by processor
features. So a target runs some stages of the reference in a bundle, and in reduced precision also its whole clip,
within the tolerances of verification. The finding is kept in the user cache folder, for exactly this processor,
these versions and this bundle.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.reader import MANIFEST, Bundle
from lfdm_export.engines.cuda_driver import find_gpus
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import spec_of
from lfdm_export.engines.tensorrt.plans import PlanFolder
from lfdm_export.files.atomic import write_file
from lfdm_export.files.digests import json_digest
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.machine import environment, optional_cache, processor_facts
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.reference.inputs import BATCH_SIZE, chain_table
from lfdm_export.reference.stored import Reference, positions
from lfdm_export.sampling.noise import NoiseSource, seeded_noise
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import CHAIN_TOLERANCES, StageSpec, stage_specs
from lfdm_models.schedule import cosine_schedule

logger = logging.getLogger(__name__)

Float32: TypeAlias = NDArray[np.float32]

#: 0 uses every target without a check, for users who verified it.
VARIABLE = "LFDM_SELF_CHECK"
#: The stages of a clip, one run each.
_STAGES = ("encode", "step", "decode")
#: Precisions for which the stages are enough: their tolerances are those of rounding.
_EXACT = ("fp32", "tf32")
#: Timed runs per stage; the fastest counts.
_TIMED = 2


class Runner(Protocol):
    """Runs the stages of a bundle with one target, such as `lfdm_export.generate.stage_runner.StageRunner`."""

    def run(self, stage: str, *tensors: NDArray[np.generic]) -> tuple[Float32, ...]:
        """Run one stage."""

    def sample(self, stage: str, fixed: Mapping[str, Float32], table: SamplerTable, source: NoiseSource) -> Float32:
        """Run a whole chain."""


@dataclass(frozen=True)
class Finding:
    """The result of a check of a target on this machine.

    Attributes:
        seconds: to sample and decode the clip of the reference, from the fastest of some runs per stage.
        wrong: what exceeded its tolerance, one clause each; empty if nothing did.
        whole: whether the clip was compared as well, where the precision requires it.
    """

    seconds: float
    wrong: tuple[str, ...] = ()
    whole: bool = False


def is_enabled() -> bool:
    """Whether the environment leaves the check enabled."""
    return os.environ.get(VARIABLE, "1") != "0"


class SelfCheck:
    """The check of one bundle. Findings are kept in the user cache folder if it is writable."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str = "cpu") -> None:
        """Check a bundle that holds a reference, with `threads` per engine, on a device; this runs nothing yet."""
        self._bundle, self._threads, self.device = bundle, threads, device
        # The program's own tolerances: those of the manifest come from the author of the bundle.
        manifest = bundle.manifest
        self._specs = stage_specs(manifest.geometry, with_text=manifest.has_text, with_drive=manifest.has_drive)
        self._exact = manifest.precision in _EXACT

    def known(self, target: Target) -> Finding | None:
        """The earlier finding on this machine, if any."""
        return _read(self._key(target))

    def check(self, target: Target, runner: Runner, *, whole: bool) -> Finding:
        """Run the checks that have no finding yet.

        Args:
            target: name of the target.
            runner: runs the stages of the bundle with it.
            whole: also compare the clip, if the stages alone are not enough.

        Raises:
            BundleError: the reference is not usable.
            EngineError: an engine cannot be loaded or fails.
        """
        found = self.known(target)
        if found is None:
            logger.info("%s is checked on this machine before its first use", target)
            seconds, wrong = self._stages(runner)
            found = Finding(seconds, tuple(wrong), whole=self._exact)
            _write(self._key(target), found)
        if whole and not found.whole and not found.wrong:
            found = Finding(found.seconds, tuple(self._clip(runner)), whole=True)
            _write(self._key(target), found)
        return found

    @functools.cached_property
    def _reference(self) -> Reference:
        path, manifest = self._bundle.reference_path, self._bundle.manifest
        assert path is not None, "a bundle without one is not checked"
        return Reference.load(path, manifest.config, manifest.geometry, self._specs, manifest.provenance)

    @functools.cached_property
    def _table(self) -> SamplerTable:
        manifest = self._bundle.manifest
        return chain_table(cosine_schedule(manifest.config.dm.training_steps), manifest.provenance)

    def _stages(self, runner: Runner) -> tuple[float, list[str]]:
        """Seconds of a clip, and the errors in the first sample of each stage."""
        manifest = self._bundle.manifest
        inputs = self._reference.inputs(manifest.config, manifest.geometry)
        wrong: list[str] = []
        seconds = {}
        for name in _STAGES:
            spec = self._specs[name]
            feeds = [inputs[tensor.name][:1] for tensor in spec.inputs]
            wrong += self._values(spec, runner.run(name, *feeds))
            seconds[name] = min(_timed(runner, name, feeds) for _ in range(_TIMED))
        chunks = math.ceil(manifest.geometry.frames / manifest.geometry.chunk_frames)
        return self._table.steps * seconds["step"] + chunks * seconds["decode"], wrong

    def _values(self, spec: StageSpec, outputs: tuple[Float32, ...]) -> list[str]:
        """The outputs of one sample that exceed the tolerance of the stage."""
        reference, wrong = self._reference, []
        tolerance = spec.tolerance[self._bundle.manifest.precision]
        for tensor, values in zip(spec.outputs, outputs, strict=True):
            expected = reference.outputs[spec.name][tensor.name]
            kept = positions(reference.seed, f"{spec.name}/{tensor.name}", BATCH_SIZE * values.size, expected.size)
            first = kept < values.size
            error = np.abs(values.reshape(-1)[kept[first]].astype(np.float64) - expected[first])
            found = float(error.max()) / max(1.0, float(np.abs(expected[first]).max()))
            if not found <= tolerance:  # NaN is also wrong
                wrong.append(f"{tensor.name} of {spec.name}: error {found:.2g}, at most {tolerance:g} is allowed")
        return wrong

    def _clip(self, runner: Runner) -> list[str]:
        """What in the clip of the reference exceeds the tolerances of the precision."""
        manifest, chain = self._bundle.manifest, self._reference.chain
        allowed = CHAIN_TOLERANCES[manifest.precision]
        image = to_float(chain.image[None])
        *skips, context = runner.run("encode", image)
        fixed = {"context": context, "text_embedding": chain.embedding[None]}
        source = seeded_noise([self._reference.seed], chain.latents.shape[1:])
        latent = runner.sample("step", fixed, self._table, source)
        error = latent[0].astype(np.float64) - chain.latents[-1]
        flow = np.hypot(error[0], error[1]).mean() * manifest.geometry.image_size / 2
        figures = [
            ("latent, mean error", float(np.abs(error).mean()), allowed.latent_mean, ""),
            ("flow, mean error", float(flow), allowed.flow_mean, " px"),
        ]
        wrong = [
            f"{what}: {found:.3g}{unit}, at most {limit:g}{unit} is allowed"
            for what, found, limit, unit in figures
            if not found <= limit
        ]
        chunk, frames = manifest.geometry.chunk_frames, manifest.geometry.frames
        pictures: tuple[list[Float32], list[Float32]] = [], []
        for frame in map(int, chain.kept) if np.isfinite(latent).all() else ():
            begin = min(frame, frames - chunk)
            decoded = runner.run("decode", image, *skips, latent[:, :, begin : begin + chunk])
            for some, images in zip(pictures, decoded, strict=True):
                some.append(images[0, :, frame - begin])
        for what, some, expected, least in (
            ("frames", pictures[0], chain.kept_frames, allowed.psnr),
            ("warped images", pictures[1], chain.kept_warped, allowed.warped_psnr),
        ):
            if not some:
                continue
            square = float(np.square(np.stack(some) - expected, dtype=np.float64).mean())
            found = -10 * math.log10(max(square, 1e-20)) if math.isfinite(square) else math.nan
            if not found >= least:
                wrong.append(f"{what}: PSNR {found:.1f} dB, at least {least:g} dB are expected")
        return wrong

    def _key(self, target: Target) -> dict[str, Any]:
        """Everything that determines the finding."""
        spec = spec_of(target)
        facts: dict[str, Any] = {
            "bundle": hashlib.sha256((self._bundle.path / MANIFEST).read_bytes()).hexdigest(),
            "target": target,
            "device": self.device,
            "processor": processor_facts(),
            "environment": environment(self._threads, spec.distributions),
        }
        if spec.takes == "plans":
            folder = PlanFolder(self._bundle.path, target)
            records = {stage: folder.record(stage) for stage in _STAGES}
            facts["plans"] = {stage: record.plan.sha256 for stage, record in records.items() if record is not None}
        if spec.gpu_precisions or self.device != "cpu":
            facts["gpus"] = [f"{gpu}" for gpu in find_gpus()[0]]
        return facts


def _timed(runner: Runner, stage: str, feeds: list[NDArray[Any]]) -> float:
    started = time.perf_counter()
    runner.run(stage, *feeds)
    return time.perf_counter() - started


def _path(key: Mapping[str, Any]) -> Path | None:
    cache = optional_cache()
    return None if cache is None else cache / "self-check" / f"{json_digest(key)}.json"


def _read(key: Mapping[str, Any]) -> Finding | None:
    """The finding stored under a key; None if there is none, or none that this program reads."""
    path = _path(key)
    if path is None:
        return None
    try:
        kept = json.loads(path.read_bytes())
        return from_plain(Finding, kept["finding"], "finding") if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(key: Mapping[str, Any], finding: Finding) -> None:
    """Store a finding, whole or not at all; if that fails, the check runs again next time."""
    path = _path(key)
    if path is None:
        return
    try:
        write_file(path, json.dumps({"key": key, "finding": to_plain(finding)}, indent=1).encode())
    except OSError as error:
        logger.info("what the self-check found cannot be kept in %s: %s", path.parent, error.strerror or error)
