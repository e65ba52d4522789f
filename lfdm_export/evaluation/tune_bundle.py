"""Tunes a bundle's sampler: prepares images and labels, runs the long chain, calls `lfdm_export.evaluation.tuning`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.evaluation.drawn import require_drawn_characters
from lfdm_export.evaluation.tuning import Search, Target, tune
from lfdm_export.generate.encoded import Encoded
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.progress import Progress, report
from lfdm_export.sampling.noise import seeded_noise
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.tables import sampler_table
from lfdm_export.sampling.tuned import TunedSampler, TunedSteps
from lfdm_models.schedule import cosine_schedule
from lfdm_models.training.procedural import TRAINING_SEEDS, sample_clip

UInt8Array = NDArray[np.uint8]
Float32 = NDArray[np.float32]

#: Sampler and steps of the long chain: DDIM with noise.
LONG_SAMPLER, LONG_STEPS = "ddim", 50
#: Samples per batch.
_BATCH = 16
# First seeds of the noise: of the long chain, and of the candidates. `evaluate_bundle` uses seeds below these.
_LONG_SEEDS, _SEEDS = 2**40, 2**41


@dataclass(frozen=True)
class Conditions:
    """Images and labels for the comparison of chains.

    Attributes:
        encoded: encoder outputs of N images.
        embeddings: (N, text_width) float32.
        groups: (N,) int64, index of each label.
    """

    encoded: Encoded
    embeddings: Float32
    groups: NDArray[np.int64]

    def part(self, part: slice) -> tuple[Encoded, Float32]:
        """Return encoder outputs and embeddings of a slice."""
        whole = self.encoded
        some = Encoded(whole.image[part], tuple(skip[part] for skip in whole.skips), whole.context[part])
        return some, self.embeddings[part]


def tune_bundle(
    pipeline: Pipeline,
    step_counts: Sequence[int],
    *,
    search: Search | None = None,
    conditions: int = 64,
    pictures: UInt8Array | None = None,
    teacher: Pipeline | None = None,
    progress: Progress | None = None,
) -> TunedSampler:
    """Tune sampler tables of few steps for a bundle's weights, at its default guidance.

    Args:
        pipeline: pipeline of the bundle.
        step_counts: numbers of steps; one table for each.
        search: options of the search.
        conditions: pairs of image and label that the long chain runs for.
        pictures: (P, H, W, 3) uint8 in the model's format, used in turn. None uses drawn characters of the training
            split, for bundles of drawn characters.
        teacher: pipeline of the bundle that the long chain runs on, for a bundle of a distilled DM; None for the
            bundle itself.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The tables; `lfdm_export.bundle.writer.store_tuned` writes them to the bundle.

    Raises:
        InputError: the bundle has no labels, its provenance does not name its weights, a number is out of range, or
            `pictures` is None for a bundle of other data than drawn characters; or the bundle's DM was distilled and
            there is no teacher, or the teacher does not fit it.
        EngineError: an engine cannot be loaded or fails.
    """
    search, manifest = search or Search(), pipeline.bundle.manifest
    if manifest.dm_sha256 is None:
        raise InputError("the bundle's provenance does not name its DM's checkpoint; export it from files of weights")
    if not pipeline.bundle.labels:
        raise InputError("the bundle has no labels to tune for; export it with labels")
    if not 2 <= search.clips <= conditions:
        raise InputError(
            f"found {search.clips} clips of {conditions} conditions, expected 2 or more, of as many conditions"
        )
    sampler = TunedSampler.of_distilled(manifest.provenance, manifest.dm_sha256)
    distilled = None if sampler is None else sampler.tables[0]
    if teacher is not None:
        _require_teacher(teacher, pipeline)
    elif distilled is not None:
        raise InputError(
            "the bundle's DM was distilled, and long chains of its own are no target; give its teacher's bundle"
        )
    schedule = cosine_schedule(manifest.config.dm.training_steps)
    if max(step_counts) > schedule.steps:
        raise InputError(f"steps: found {max(step_counts)}, expected at most the schedule's {schedule.steps}")
    shown = _conditions(pipeline, conditions, pictures)
    shape = (3, manifest.geometry.frames, manifest.geometry.latent_size, manifest.geometry.latent_size)

    def chain(runner: Pipeline, table: SamplerTable, part: slice, first_seed: int) -> Float32:
        encoded, embeddings = shown.part(part)
        seeds = [first_seed + index for index in range(len(embeddings))]
        return runner.run_table(encoded, embeddings, table, seeded_noise(seeds, shape))

    def candidate(table: SamplerTable, part: slice, draw: int) -> Float32:
        return chain(pipeline, table, part, _SEEDS + (search.seed * search.generations + draw) * conditions)

    long = sampler_table(LONG_SAMPLER, schedule, min(LONG_STEPS, schedule.steps - 1))
    latents = []
    for start in range(0, conditions, _BATCH):
        report(progress, "long chain", start, conditions)
        part = slice(start, min(start + _BATCH, conditions))
        latents.append(chain(teacher or pipeline, long, part, _LONG_SEEDS + search.seed * conditions + start))
    report(progress, "long chain", conditions, conditions)
    target = Target(np.concatenate(latents), shown.groups)

    def found(steps: int) -> TunedSteps:
        def tell(done: int, total: int) -> None:
            report(progress, f"{steps} steps", done, total)

        first = distilled if distilled is not None and distilled.steps == steps else None
        return tune(schedule, steps, candidate, target, conditions, search, tell, first)

    return TunedSampler(
        dm_sha256=manifest.dm_sha256,
        guidance_scale=manifest.sampler.scale,
        tables=tuple(found(steps) for steps in sorted(set(step_counts))),
        found=f"CMA-ES against {long.name} of {long.steps} steps on {conditions} conditions, {search.clips} clips a "
        f"candidate, {search.generations} generations of {search.candidates}, seed {search.seed}",
    )


def _require_teacher(teacher: Pipeline, pipeline: Pipeline) -> None:
    """Refuse a teacher whose latents mean something else.

    Raises:
        InputError: it has other labels, sizes or another architecture.
    """
    theirs, ours = teacher.bundle.manifest, pipeline.bundle.manifest
    for what, found, wanted in (
        ("labels", theirs.labels, ours.labels),
        ("sizes", theirs.geometry, ours.geometry),
        ("networks", theirs.config, ours.config),
    ):
        if found != wanted:
            raise InputError(f"the teacher's bundle has other {what}: found {found}, expected {wanted}")


def _conditions(pipeline: Pipeline, count: int, pictures: UInt8Array | None) -> Conditions:
    bundle = pipeline.bundle
    groups = np.arange(count) % len(bundle.labels)
    if pictures is None:
        require_drawn_characters(bundle)
        size = bundle.manifest.geometry.image_size
        drawn = [
            sample_clip(TRAINING_SEEDS[index], size=size, frames=2, label=bundle.labels[group]).frames[0]
            for index, group in enumerate(groups)
        ]
        pictures = np.stack(drawn)
    chosen = pictures[np.arange(count) // len(bundle.labels) % len(pictures)] if len(pictures) < count else pictures
    return Conditions(pipeline.encode(np.ascontiguousarray(chosen[:count])), bundle.embeddings[groups], groups)
