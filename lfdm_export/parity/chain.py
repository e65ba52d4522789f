"""Parity of a whole clip: sampling and decoding with a bundle, with PyTorch's noise."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.target import ONNXRUNTIME
from lfdm_export.engines.target_spec import Target
from lfdm_export.errors import EngineError
from lfdm_export.generate.encoded import Encoded
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.parity.report.checks import CHAIN, Check, Pictures, StepError
from lfdm_export.pictures.panels import panels
from lfdm_export.pictures.preprocess import to_uint8
from lfdm_export.progress import Progress, report
from lfdm_export.reference.inputs import chain_table
from lfdm_export.reference.stored import ChainReference
from lfdm_export.sampling.noise import seeded_noise
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.stages import CHAIN_TOLERANCES, ChainTolerance
from lfdm_models.schedule import cosine_schedule

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]

_SAMPLING = "the latent differs from PyTorch's; if every stage passed, the fault is in sampler, schedule or noise"
_PICTURES = "the clip's frames differ from PyTorch's; if the latent passed, the fault is in decoding"
_FINITE = "sampling gives NaN or infinity: see the checks of the stages"


@dataclass(frozen=True, eq=False)
class ChainResult:
    """The clip's checks, and its steps and pictures, up to a failure."""

    checks: tuple[Check, ...]
    steps: tuple[StepError, ...] = ()
    pictures: Pictures | None = None


def check_chain(
    bundle: Bundle,
    reference: ChainReference,
    seed: int,
    threads: int | None,
    progress: Progress | None,
    target: Target = ONNXRUNTIME.name,
    precision: str | None = None,
) -> ChainResult:
    """Sample and decode the reference's clip, and compare.

    Args:
        bundle: the bundle to verify.
        reference: PyTorch's clip.
        seed: seed of its noise.
        threads: threads per engine; None uses all cores.
        progress: called as ``progress(stage, done, total)``.
        target: target that runs the stages.
        precision: precision whose tolerances apply; None for the bundle's.
    """
    pipe = Pipeline(bundle, threads=threads, target=target, self_check=False)
    tolerance = CHAIN_TOLERANCES[precision or bundle.manifest.precision]
    try:
        encoded = pipe.encode(reference.image)
        latents = _sample(pipe, encoded, reference, seed, progress)
    except EngineError as error:
        return ChainResult((_failure(f"no clip can be sampled: {error}"),))
    steps = _step_errors(bundle, latents, reference.latents)
    if not np.isfinite(latents[-1]).all():
        return ChainResult(
            (Check(CHAIN, "finite", f"latent, step {len(latents)}", passed=False, meaning=_FINITE),), steps
        )
    checks = [*_latent_checks(steps, tolerance), *_motion_checks(bundle, latents[-1], reference.latents[-1], tolerance)]
    try:
        frames, warped = pipe.decode(encoded, latents[-1][None], progress=progress)
        pictures = to_uint8(frames)[0], to_uint8(warped)[0]
    except EngineError as error:
        return ChainResult((*checks, _failure(f"the clip cannot be decoded: {error}")), steps)
    kept_frames, kept_warped = (images[0].transpose(1, 0, 2, 3)[reference.kept] for images in (frames, warped))
    checks += [
        *_picture_checks(
            "frames", kept_frames, reference.kept_frames, pictures[0], reference.frames, tolerance, tolerance.psnr
        ),
        *_picture_checks(
            "warped",
            kept_warped,
            reference.kept_warped,
            pictures[1],
            reference.warped,
            tolerance,
            tolerance.warped_psnr,
        ),
    ]
    shown = Pictures(
        frames=tuple(map(int, reference.kept)),
        expected=reference.frames[reference.kept],
        found=pictures[0][reference.kept],
        difference=np.abs(kept_frames - reference.kept_frames).transpose(0, 2, 3, 1),
        panels=panels(
            reference.image,
            pictures[0][reference.kept],
            pictures[1][reference.kept],
            latents[-1][:, reference.kept],
            residual_flow=bundle.manifest.config.residual_flow,
        ),
    )
    return ChainResult(tuple(checks), steps, shown)


def _failure(meaning: str) -> Check:
    return Check(CHAIN, "clip", "run", passed=False, meaning=meaning)


class _NothingMoreError(Exception):
    """A latent is not finite, so later steps are skipped."""


def _sample(
    pipe: Pipeline, encoded: Encoded, reference: ChainReference, seed: int, progress: Progress | None
) -> list[Float32]:
    """The latent (3, T, h, w) after each step, up to the first that is not finite."""
    latents: list[Float32] = []
    total = len(reference.latents)

    def on_step(_: int, latent: Float32 | None) -> None:
        assert latent is not None, "every latent is requested"
        latents.append(latent[0])
        report(progress, "sample", len(latents), total)
        if not np.isfinite(latent).all():
            raise _NothingMoreError

    fixed = {"context": encoded.context, "text_embedding": reference.embedding[None]}
    source = seeded_noise([seed], reference.latents.shape[1:])
    table = _table(pipe.bundle)
    with contextlib.suppress(_NothingMoreError):
        pipe.stages.sample("step", fixed, table, source, on_step=on_step, every_latent=True)
    return latents


def _table(bundle: Bundle) -> SamplerTable:
    manifest = bundle.manifest
    return chain_table(cosine_schedule(manifest.config.dm.training_steps), manifest.provenance)


def _step_errors(bundle: Bundle, latents: list[Float32], expected: Float32) -> tuple[StepError, ...]:
    timesteps = _table(bundle).timesteps
    steps = []
    for timestep, latent, reference in zip(timesteps, latents, expected, strict=False):
        error = np.abs(latent.astype(np.float64) - reference)
        finite = bool(np.isfinite(error).all())
        steps.append(
            StepError(int(timestep), float(error.max()) if finite else None, float(error.mean()) if finite else None)
        )
    return tuple(steps)


def _latent_checks(steps: tuple[StepError, ...], tolerance: ChainTolerance) -> list[Check]:
    """Checks of the worst step, by largest and by mean error."""
    largest = max(step.max_abs or 0.0 for step in steps)
    mean = max(step.mean_abs or 0.0 for step in steps)
    return [
        _limited("latent, largest error", largest, tolerance.latent_max, _SAMPLING),
        _limited("latent, mean error", mean, tolerance.latent_mean, _SAMPLING),
    ]


def _motion_checks(bundle: Bundle, latent: Float32, expected: Float32, tolerance: ChainTolerance) -> list[Check]:
    """The last latent's error as flow in pixels of the image, and as occlusion map in [0, 1]."""
    error = latent.astype(np.float64) - expected
    distance = np.hypot(error[0], error[1]) * bundle.manifest.geometry.image_size / 2
    occlusion = np.abs(error[2]) / 2
    mean = _limited("flow, mean error", float(distance.mean()), tolerance.flow_mean, _SAMPLING)
    return [
        Check(CHAIN, "clip", "flow, largest error", passed=True, found=float(distance.max()), unit="px"),
        dataclasses.replace(mean, unit="px"),
        Check(CHAIN, "clip", "occlusion, largest error", passed=True, found=float(occlusion.max())),
        Check(CHAIN, "clip", "occlusion, mean error", passed=True, found=float(occlusion.mean())),
    ]


def _picture_checks(
    name: str,
    kept: Float32,
    expected: Float32,
    levels: UInt8,
    expected_levels: UInt8,
    tolerance: ChainTolerance,
    psnr_wanted: float,
) -> list[Check]:
    """Checks of some frames' unrounded values, and of all frames' 8-bit values."""
    error = kept.astype(np.float64) - expected
    square = float((error**2).mean())
    beyond = np.abs(levels.astype(np.int16) - expected_levels) > 1
    found = -10 * math.log10(square) if square > 0 else None
    passed = found is None or found >= psnr_wanted
    psnr = Check(
        CHAIN,
        "clip",
        f"{name}, PSNR",
        passed=passed,
        found=found,
        allowed=None if found is None else psnr_wanted,
        unit="dB",
        meaning="no difference at all" if found is None else "" if passed else _PICTURES,
        at_least=True,
    )
    return [
        _limited(f"{name}, largest error", float(np.abs(error).max()), tolerance.picture_max, _PICTURES),
        psnr,
        _limited(f"{name}, share beyond 1 level", float(beyond.mean()), tolerance.beyond_one_level, _PICTURES),
    ]


def _limited(subject: str, found: float, allowed: float, meaning: str) -> Check:
    passed = found <= allowed
    return Check(CHAIN, "clip", subject, passed=passed, found=found, allowed=allowed, meaning="" if passed else meaning)
