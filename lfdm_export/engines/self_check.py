"""Whether a target gives on this machine what PyTorch gave at export, found out before it is first used there.

The same graph may be exact on one processor and wrong on another: libraries choose their kernels by what a processor
can do. So a target runs some stages of a bundle's reference, and in a lowered precision its whole clip, within the
tolerances of verification. What was found is kept in the user's cache folder for exactly this processor, these
versions and this bundle.
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

#: 0 takes every target as it is, for those who verified it.
VARIABLE = "LFDM_SELF_CHECK"
#: What a clip passes through, one run each.
_STAGES = ("encode", "step", "decode")
#: Precisions whose stages tell by themselves: their tolerances are those of rounding.
_EXACT = ("fp32", "tf32")
#: Runs of a stage that are timed; the fastest counts.
_TIMED = 2


class Runner(Protocol):
    """What runs the stages of a bundle with one target, such as `lfdm_export.generate.stage_runner.StageRunner`."""

    def run(self, stage: str, *tensors: NDArray[np.generic]) -> tuple[Float32, ...]:
        """Run one stage."""

    def sample(self, stage: str, fixed: Mapping[str, Float32], table: SamplerTable, source: NoiseSource) -> Float32:
        """Run a whole chain."""


@dataclass(frozen=True)
class Finding:
    """What a target gave on this machine.

    Attributes:
        seconds: that the reference's clip takes to sample and decode, by the fastest of some runs of each stage.
        wrong: what was beyond its tolerance, a clause each; empty if nothing was.
        whole: the clip was compared as well, where the precision asks for it.
    """

    seconds: float
    wrong: tuple[str, ...] = ()
    whole: bool = False


def is_enabled() -> bool:
    """Whether the environment leaves the check on."""
    return os.environ.get(VARIABLE, "1") != "0"


class SelfCheck:
    """The check of one bundle. Findings are kept in the user's cache folder, where there is one that can be written."""

    def __init__(self, bundle: Bundle, *, threads: int | None = None, device: str = "cpu") -> None:
        """Check a bundle that holds a reference, with that many threads per engine, on a device; nothing is run yet."""
        self._bundle, self._threads, self.device = bundle, threads, device
        # The program's own tolerances: those of the manifest come from whoever made the bundle.
        manifest = bundle.manifest
        self._specs = stage_specs(manifest.geometry, with_text=manifest.has_text, with_drive=manifest.has_drive)
        self._exact = manifest.precision in _EXACT

    def known(self, target: Target) -> Finding | None:
        """What was found on this machine earlier."""
        return _read(self._key(target))

    def check(self, target: Target, runner: Runner, *, whole: bool) -> Finding:
        """Run what is not known yet.

        Args:
            target: what runs.
            runner: runs the bundle's stages with it.
            whole: compare the clip too, if stages alone do not tell.

        Raises:
            BundleError: the reference cannot be used.
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
        return Reference.load(path, manifest.config, manifest.geometry, self._specs)

    @functools.cached_property
    def _table(self) -> SamplerTable:
        return chain_table(cosine_schedule(self._bundle.manifest.config.dm.training_steps))

    def _stages(self, runner: Runner) -> tuple[float, list[str]]:
        """Seconds of a clip, and what is wrong with the first sample of each stage."""
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
        """What of one sample's outputs is beyond the stage's tolerance."""
        reference, wrong = self._reference, []
        tolerance = spec.tolerance[self._bundle.manifest.precision]
        for tensor, values in zip(spec.outputs, outputs, strict=True):
            expected = reference.outputs[spec.name][tensor.name]
            kept = positions(reference.seed, f"{spec.name}/{tensor.name}", BATCH_SIZE * values.size, expected.size)
            first = kept < values.size
            error = np.abs(values.reshape(-1)[kept[first]].astype(np.float64) - expected[first])
            found = float(error.max()) / max(1.0, float(np.abs(expected[first]).max()))
            if not found <= tolerance:  # NaN is wrong, too
                wrong.append(f"{tensor.name} of {spec.name}: error {found:.2g}, at most {tolerance:g} is allowed")
        return wrong

    def _clip(self, runner: Runner) -> list[str]:
        """What of the reference's clip is beyond the precision's tolerances."""
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
        """Everything that decides what is found."""
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
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return None if cache is None else cache / "self-check" / f"{name}.json"


def _read(key: Mapping[str, Any]) -> Finding | None:
    """What is kept under a key; None where nothing is, or nothing that this program reads."""
    path = _path(key)
    if path is None:
        return None
    try:
        kept = json.loads(path.read_bytes())
        return from_plain(Finding, kept["finding"], "finding") if kept["key"] == key else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write(key: Mapping[str, Any], finding: Finding) -> None:
    """Keep a finding, whole or not at all; where it cannot be kept the check is repeated next time."""
    path = _path(key)
    if path is None:
        return
    try:
        write_file(path, json.dumps({"key": key, "finding": to_plain(finding)}, indent=1).encode())
    except OSError as error:
        logger.info("what the self-check found cannot be kept in %s: %s", path.parent, error.strerror or error)
