"""Takes the measures of `lfdm_export.evaluation.measures` on the held-out clips of a data set."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.evaluation.distance import frechet_distance
from lfdm_export.evaluation.held_out import HeldOutClips
from lfdm_export.evaluation.measures import (
    NOISE_SEEDS,
    Counts,
    FeatureFacts,
    HeldOutMeasures,
    Measure,
    SettingMeasures,
    check_measurable,
    conditional_distance,
)
from lfdm_export.evaluation.reconstruction import Reconstruction, differences, rebuild, summarize
from lfdm_export.evaluation.video_features import VideoFeatures
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.progress import Progress, report
from lfdm_export.sampling.options import SamplingOptions

Float32Array = NDArray[np.float32]


def measure_held_out(
    pipeline: Pipeline,
    held_out: HeldOutClips,
    settings: Sequence[SamplingOptions],
    measures: Sequence[Measure],
    *,
    features: VideoFeatures | None = None,
    counts: Counts | None = None,
    progress: Progress | None = None,
) -> HeldOutMeasures:
    """Measure a bundle. What cannot be measured is found before anything is generated.

    Args:
        pipeline: pipeline of the bundle.
        held_out: held-out clips of its data set.
        settings: options of sampling.
        measures: what to measure.
        features: the network of the features; needed for all measures but "l1".
        counts: how many clips.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        InputError: a measure needs a network, subjects or more clips, or a clip cannot be read.
        EngineError: an engine cannot be loaded or fails.
    """
    counts = Counts() if counts is None else counts
    real = counts.real or len(held_out)
    distances = [measure for measure in measures if measure != "l1"]
    if distances and not settings:
        raise InputError(f"{', '.join(distances)} compare generated clips, and no sampler is given; give one")
    check_measurable(held_out, measures, with_features=features is not None, clips=counts.clips, real=real)
    if "l1" in measures:
        pipeline.bundle.require_drive("reconstruction")
    meant = [_resolved(pipeline, setting) for setting in settings]  # refuses what the bundle cannot do
    reconstruction = _reconstruct(pipeline, held_out, progress) if "l1" in measures else None
    generations, width = [], 0
    if distances and features is not None:
        theirs = _real_features(held_out, features, real, counts.batch, progress)
        width = theirs.shape[1]
        for setting, filled in zip(settings, meant, strict=True):
            name = f"{filled.sampler} {filled.steps}"
            ours, seconds = _generated_features(pipeline, held_out, features, setting, name, counts, progress)
            found = SettingMeasures(
                setting=filled,
                clips=len(ours),
                seconds=seconds,
                fvd=frechet_distance(ours, theirs, unbiased=True) if "fvd" in measures else None,
                cfvd=conditional_distance(held_out, "cfvd", theirs, ours) if "cfvd" in measures else None,
                sfvd=conditional_distance(held_out, "sfvd", theirs, ours) if "sfvd" in measures else None,
            )
            generations.append(found)
    geometry = pipeline.bundle.manifest.geometry
    return HeldOutMeasures(
        data=held_out.clips.name,
        labels=held_out.labels,
        subjects=held_out.subjects,
        held_out=len(held_out),
        real=real,
        frames=geometry.frames,
        image_size=geometry.image_size,
        precision=pipeline.bundle.manifest.precision,
        seed=counts.seed,
        first_noise_seed=counts.seed * NOISE_SEEDS,
        features=FeatureFacts(features.path.name, features.sha256, width) if features is not None and width else None,
        reconstruction=reconstruction,
        generations=tuple(generations),
    )


def _reconstruct(pipeline: Pipeline, held_out: HeldOutClips, progress: Progress | None) -> Reconstruction:
    """Measure the LFAE on every held-out clip once."""
    errors = np.zeros((len(held_out), 3))
    for number in range(len(held_out)):
        report(progress, "reconstruction", number, len(held_out))
        frames = held_out.read(number)
        errors[number] = differences(frames, *rebuild(pipeline, frames))
    report(progress, "reconstruction", len(held_out), len(held_out))
    return summarize(errors, [entry.label for entry in held_out.entries(len(held_out))])


def _real_features(
    held_out: HeldOutClips, features: VideoFeatures, count: int, batch: int, progress: Progress | None
) -> Float32Array:
    rows = []
    for start in range(0, count, batch):
        report(progress, "real clips", start, count)
        rows.append(features(np.stack([held_out.read(n) for n in range(start, min(start + batch, count))])))
    report(progress, "real clips", count, count)
    return np.concatenate(rows)


def _generated_features(
    pipeline: Pipeline,
    held_out: HeldOutClips,
    features: VideoFeatures,
    setting: SamplingOptions,
    name: str,
    counts: Counts,
    progress: Progress | None,
) -> tuple[Float32Array, float]:
    """Features (N, F) of clips made with a setting, and the mean seconds per clip."""
    rows, seconds = [], 0.0
    for start in range(0, counts.clips, counts.batch):
        report(progress, name, start, counts.clips)
        numbers = range(start, min(start + counts.batch, counts.clips))
        images = np.concatenate([held_out.read(number, first_only=True) for number in numbers])
        before = time.perf_counter()
        made = pipeline.generate(
            images,
            label=[held_out.entry(number).label for number in numbers],
            seed=[counts.seed * NOISE_SEEDS + number for number in numbers],
            **setting.given(),
        )
        seconds += time.perf_counter() - before
        rows.append(features(made.frames))
    report(progress, name, counts.clips, counts.clips)
    return np.concatenate(rows), seconds / counts.clips


def _resolved(pipeline: Pipeline, setting: SamplingOptions) -> SamplingOptions:
    """The setting with sampler and number of steps filled in."""
    _, table = pipeline.resolve(setting)
    return replace(setting, sampler=table.name, steps=table.steps)
