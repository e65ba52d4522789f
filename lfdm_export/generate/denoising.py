"""Denoise a latent: step by step, or as a whole clip in one call of an engine that makes whole clips."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.interface import ClipRequest
from lfdm_export.errors import InputError, not_finite
from lfdm_export.generate.arguments import embedding_rows
from lfdm_export.generate.encoded import Encoded
from lfdm_export.generate.stage_runner import OnEstimate, StageRunner
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.progress import Progress, report
from lfdm_export.sampling.noise import NoiseSource
from lfdm_export.sampling.options import SamplingOptions, guided_at, takes_both_branches
from lfdm_export.sampling.rows import SamplerTable

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]

#: The stage of a step without guidance.
_UNGUIDED_STAGE = "step"


def denoise(
    stages: StageRunner,
    encoded: Encoded,
    embedding: ArrayLike,
    options: SamplingOptions,
    table: SamplerTable,
    source: NoiseSource,
    progress: Progress | None,
    on_estimate: OnEstimate | None,
) -> Float32:
    """Sample the latent (B, 3, T, h, w) of B encoded images.

    Args:
        stages: runs the steps.
        encoded: encoder results for B images.
        embedding: (text_width,) or (B, text_width).
        options: their guidance is used; `table` has the rest.
        table: the sampler.
        source: source of the noise.
        progress: called as ``progress("denoise", steps done, steps)``.
        on_estimate: see `StageRunner.sample`.

    Raises:
        InputError: the embedding does not match the images or the bundle, or the interval of guidance does not apply.
        EngineError: an engine cannot be loaded, fails, or returns values that are not finite.
    """
    manifest, batch, scale = stages.bundle.manifest, len(encoded.image), options.scale
    rows = embedding_rows(embedding, manifest.geometry.text_width)
    if len(rows) not in (1, batch):
        raise InputError(f"found {len(rows)} text embeddings for {batch} images, expected 1 or {batch}")
    guided = guided_at(scale, table.timesteps, manifest.config.dm.training_steps, options.guidance_interval)

    def on_step(index: int, latent: Float32 | None) -> None:
        if latent is not None:
            _require_finite(latent, index, table.steps)
        report(progress, "denoise", index + 1, table.steps)

    report(progress, "denoise", 0, table.steps)
    stage, fixed = _condition(stages.bundle, np.repeat(rows, batch // len(rows), axis=0), scale)
    names = [stage if inside else _UNGUIDED_STAGE for inside in guided]
    conditions = {"context": encoded.context, **fixed}
    latent = stages.sample(names, conditions, table, source, on_step=on_step, on_estimate=on_estimate)
    _require_finite(latent, table.steps - 1, table.steps)  # if the latents of the steps stayed in the engine
    return latent


def make_whole_clip(
    stages: StageRunner,
    prepared: UInt8,
    embeddings: Float32,
    scale: float,
    table: SamplerTable,
    seeds: tuple[int, ...],
    progress: Progress | None,
    frames: tuple[int, ...] | None = None,
) -> Clip | None:
    """Make clips of B embeddings in one call on the device of the engine; None if it runs single stages only.

    Args:
        stages: loads the engine.
        prepared: (1, H, W, 3) or (B, H, W, 3) uint8.
        embeddings: (B, text_width).
        scale: scale of classifier-free guidance.
        table: the sampler.
        seeds: one per sample.
        progress: called as ``progress("denoise", steps done, steps)``.
        frames: positions of the frames of the clip, ascending; None for all.

    Raises:
        EngineError: an engine cannot be loaded or fails.
    """
    batch = len(embeddings)
    stage, fixed = _condition(stages.bundle, embeddings, scale)
    maker = stages.clip_maker(stage, batch)
    if maker is None:
        return None
    image = np.repeat(to_float(prepared), batch // len(prepared), axis=0)
    report(progress, "denoise", 0, table.steps)
    made = maker.make(
        ClipRequest(image, fixed, seeds, table, frames),
        on_step=lambda index: report(progress, "denoise", index + 1, table.steps),
    )
    return Clip(
        frames=made.frames,
        warped=made.warped,
        latent=made.latent,
        source=np.repeat(prepared, batch // len(prepared), axis=0),
        residual_flow=stages.bundle.manifest.config.residual_flow,
    )


def _condition(bundle: Bundle, embedding: Float32, scale: float) -> tuple[str, dict[str, Float32]]:
    """The sampling stage, `step` if one branch is enough, and its constant inputs other than `context`."""
    batch = len(embedding)
    if scale == 0.0:
        embedding = np.repeat(bundle.null_embedding[None], batch, axis=0)
    fixed = {"text_embedding": embedding}
    if takes_both_branches(scale):
        return "step_guided", {**fixed, "guidance_scale": np.full(batch, scale, np.float32)}
    return _UNGUIDED_STAGE, fixed


def _require_finite(latent: Float32, index: int, steps: int) -> None:
    if not np.isfinite(latent).all():
        raise not_finite(f"step {index + 1} of {steps} gave")
