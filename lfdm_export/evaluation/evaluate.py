"""Measures a bundle's clips on procedural characters held out from training.

`lfdm_export.evaluation.reconstruction` measures the LFAE. The classifier of `lfdm_models.training.classifier` scores
generated clips: its accuracy for the label, and the Fréchet distance of its features from those of real clips. Still
regions are compared with the first frame.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 4; Heusel et al., GANs Trained by a Two Time-Scale Update Rule
(arXiv 1706.08500), for the distance.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import InputError
from lfdm_export.evaluation.distance import frechet_distance
from lfdm_export.evaluation.drawn import require_drawn_characters
from lfdm_export.evaluation.reconstruction import Reconstruction, differences, rebuild, summarize
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.progress import Progress, report
from lfdm_export.sampling.options import SamplingOptions
from lfdm_models.training.classifier import MotionClassifier
from lfdm_models.training.procedural import HELD_OUT_SEEDS, LABELS, sample_clip

UInt8Array = NDArray[np.uint8]

# Index of the first held-out character: for reconstruction and generation; for the real clips of the comparison.
_SHOWN, _REAL = 0, 1_000_000
# Largest difference, on the scale 0 … 255, of a still pixel from the first frame.
_STILL = 2
_BATCH = 8


@dataclass(frozen=True)
class Generation:
    """Results for clips of one setting.

    Attributes:
        setting: options of sampling, with sampler and number of steps filled in.
        clips: number of clips, the same for each label.
        accuracy: share of clips that the classifier assigns to the requested label.
        by_label: the same per label.
        confusion: number of clips by requested label (rows) and predicted label (columns), in the order of the report's
            labels.
        frechet: Fréchet distance of the classifier's features from those of real clips.
        still: mean absolute difference from the first frame where the real clip is still.
        seconds: mean seconds per clip.
    """

    setting: SamplingOptions
    clips: int
    accuracy: float
    by_label: dict[str, float]
    confusion: tuple[tuple[int, ...], ...]
    frechet: float
    still: float
    seconds: float


@dataclass(frozen=True)
class Evaluation:
    """Results of `evaluate_bundle`.

    Attributes:
        labels: requested labels, the rows of `Generation.confusion`.
        seen: labels of the classifier, the columns of `Generation.confusion`.
        precision: precision of the bundle's graphs.
        seed: seed of characters and noise.
        data: description of the test data.
        reconstruction: results of the LFAE.
        real_accuracy: accuracy of the classifier on real clips of held-out characters.
        real_frechet: Fréchet distance between two sets of real clips of different characters.
        real_still: `Generation.still` of the LFAE's reconstructions.
        generations: results per setting, in the order of the settings.
    """

    labels: tuple[str, ...]
    seen: tuple[str, ...]
    precision: str
    seed: int
    data: str
    reconstruction: Reconstruction
    real_accuracy: float
    real_frechet: float
    real_still: float
    generations: tuple[Generation, ...]


def evaluate_bundle(
    pipeline: Pipeline,
    classifier: MotionClassifier,
    settings: Sequence[SamplingOptions],
    *,
    clips: int = 12,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a bundle.

    Args:
        pipeline: pipeline of the bundle.
        classifier: classifier that scores the clips.
        settings: options of sampling; empty measures the LFAE alone.
        clips: clips per label.
        seed: seed of characters and noise, the same for all settings.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        InputError: a number is out of range, the bundle's model was not trained on drawn characters, or `settings` is
            not empty and the bundle has none of the classifier's labels.
        EngineError: an engine cannot be loaded or fails.
    """
    if clips < 1 or not 0 <= seed < 100_000:
        raise InputError(f"clips is {clips} and seed {seed}, expected 1 or more clips and a seed of 0 to 99999")
    require_drawn_characters(pipeline.bundle)
    pipeline.bundle.require_drive("reconstruction")
    labels = tuple(label for label in LABELS if label in pipeline.bundle.labels and label in classifier.labels)
    if settings and not labels:
        known = ", ".join(pipeline.bundle.labels) or "none"
        raise InputError(
            f"this bundle's labels ({known}) are none that the classifier knows ({', '.join(classifier.labels)}); "
            "give another classifier, or no samplers to measure the LFAE alone"
        )
    wanted = labels or LABELS
    shown = _Real.draw(pipeline, wanted, clips, _SHOWN + seed * 10_000)
    others = _Real.draw(pipeline, wanted, clips, _REAL + seed * 10_000)
    reconstruction, real_still = _reconstruct(pipeline, shown, progress)
    shown_features, shown_seen = classifier.judge(shown.frames)
    other_features, other_seen = classifier.judge(others.frames)
    right = [classifier.labels[i] for i in (*shown_seen, *other_seen)]
    return Evaluation(
        labels=wanted,
        seen=classifier.labels,
        precision=pipeline.bundle.manifest.precision,
        seed=seed,
        data=describe_data(pipeline.bundle, wanted, clips),
        reconstruction=reconstruction,
        real_accuracy=float(np.mean([a == b for a, b in zip(right, (*shown.labels, *others.labels), strict=True)])),
        real_frechet=frechet_distance(shown_features, other_features),
        real_still=real_still,
        generations=tuple(
            _generate(pipeline, classifier, setting, shown, other_features, seed, progress) for setting in settings
        ),
    )


def describe_data(bundle: Bundle, labels: Sequence[str], clips: int) -> str:
    """Describe the test data in one line."""
    size, frames = bundle.manifest.geometry.image_size, bundle.manifest.geometry.frames
    return (
        f"drawn characters that no training has seen: {clips} of each of {', '.join(labels)}, {frames} frames of "
        f"{size}x{size}"
    )


@dataclass(frozen=True)
class _Real:
    """Real clips (N, T, H, W, 3) uint8 of held-out characters, and their labels."""

    frames: UInt8Array
    labels: tuple[str, ...]

    @classmethod
    def draw(cls, pipeline: Pipeline, labels: Sequence[str], clips: int, first: int) -> _Real:
        geometry = pipeline.bundle.manifest.geometry
        asked = [label for _ in range(clips) for label in labels]
        frames = [
            sample_clip(HELD_OUT_SEEDS[first + i], size=geometry.image_size, frames=geometry.frames, label=label).frames
            for i, label in enumerate(asked)
        ]
        return cls(np.stack(frames), tuple(asked))


def _reconstruct(pipeline: Pipeline, real: _Real, progress: Progress | None) -> tuple[Reconstruction, float]:
    """Measure the LFAE; also return the mean difference of reconstructed still regions from the first frame."""
    errors, still = np.zeros((len(real.labels), 3)), []
    for index, frames in enumerate(real.frames):
        report(progress, "reconstruction", index, len(real.labels))
        rebuilt, warped = rebuild(pipeline, frames)
        errors[index] = differences(frames, rebuilt, warped)
        still.append(_still_difference(rebuilt.transpose(0, 2, 3, 1), frames))
    return summarize(errors, real.labels), float(np.mean(still))


def _generate(
    pipeline: Pipeline,
    classifier: MotionClassifier,
    setting: SamplingOptions,
    real: _Real,
    real_features: NDArray[np.float32],
    seed: int,
    progress: Progress | None,
) -> Generation:
    _, table = pipeline.resolve(setting)
    features: list[NDArray[np.float32]] = []
    seen: list[int] = []
    still: list[float] = []
    seconds = 0.0
    name = f"{table.name} {table.steps}"
    for start in range(0, len(real.labels), _BATCH):
        report(progress, name, start, len(real.labels))
        part = slice(start, start + _BATCH)
        before = time.perf_counter()
        made = pipeline.generate(
            np.ascontiguousarray(real.frames[part, 0]),
            label=list(real.labels[part]),
            seed=[seed * 10_000 + start + i for i in range(len(real.labels[part]))],
            **setting.given(),
        )
        seconds += time.perf_counter() - before
        some_features, some_seen = classifier.judge(made.frames)
        features.append(some_features)
        seen.extend(int(label) for label in some_seen)
        still.extend(
            _still_difference(found.astype(np.float32) / 255, wanted)
            for found, wanted in zip(made.frames, real.frames[part], strict=True)
        )
    report(progress, name, len(real.labels), len(real.labels))
    labels = tuple(dict.fromkeys(real.labels))
    confusion = np.zeros((len(labels), len(classifier.labels)), np.int64)
    for asked, found in zip(real.labels, seen, strict=True):
        confusion[labels.index(asked), found] += 1
    right = {
        label: float(row[classifier.labels.index(label)] / row.sum())
        for label, row in zip(labels, confusion, strict=True)
    }
    return Generation(
        setting=replace(setting, sampler=table.name, steps=table.steps),
        clips=len(seen),
        accuracy=float(np.mean(list(right.values()))),
        by_label=right,
        confusion=tuple(tuple(int(count) for count in row) for row in confusion),
        frechet=frechet_distance(np.concatenate(features), real_features),
        still=float(np.mean(still)),
        seconds=seconds / len(seen),
    )


def _still_difference(found: NDArray[np.float32], real: UInt8Array) -> float:
    """Mean absolute difference of frames (T, H, W, 3) in [0, 1] from the real first frame, where `real` is still.

    A border of two pixels is excluded: a warp has no pixels to sample beyond it.
    """
    offset = np.abs(real.astype(np.int16) - real[:1]).max(axis=(0, 3))
    mask = offset <= _STILL
    mask[:2], mask[-2:], mask[:, :2], mask[:, -2:] = False, False, False, False
    if not mask.any():
        return 0.0
    first = real[0].astype(np.float32) / 255
    return float(np.abs(found - first)[1:, mask].mean())
