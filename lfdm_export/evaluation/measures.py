"""The measures of the LFDM paper, and their results.

FVD is the Fréchet distance between features of real and of generated clips; cFVD and sFVD are its mean and standard
deviation over classes and over subjects. A generated clip has the first frame and the label of a held-out clip.

Source: Ni et al., CVPR 2023 (arXiv 2303.13744), Sec. 4; for counts and averages also the authors' answers in issues 3
and 36 of github.com/nihaomiao/CVPR23_LFDM: 10,000 clips of 40 frames and 128 x 128 pixels; mean and standard deviation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError
from lfdm_export.evaluation.distance import frechet_distance
from lfdm_export.evaluation.held_out import HeldOutClips
from lfdm_export.evaluation.reconstruction import Reconstruction
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.wording import shortened
from lfdm_models.training.layouts import Entry

Float32Array = NDArray[np.float32]

Measure = Literal["l1", "fvd", "cfvd", "sfvd"]
#: Self-reconstruction, and the Fréchet distance of all clips, per class, and per subject.
MEASURES: tuple[Measure, ...] = get_args(Measure)
#: Generated clips of the published figures.
PUBLISHED_CLIPS = 10_000
#: Seeds of the noise are ``seed * NOISE_SEEDS`` plus the number of the clip.
NOISE_SEEDS = 2**32
# What the clips of each conditional measure are grouped by.
_GROUP: dict[Measure, Callable[[Entry], str]] = {
    "cfvd": lambda entry: entry.label,
    "sfvd": lambda entry: entry.subject,
}


@dataclass(frozen=True)
class Counts:
    """How many clips are compared.

    Attributes:
        clips: clips generated per setting.
        real: real clips; beyond the number of held-out clips they repeat, with other frames.
        batch: clips per run of the engines.
        seed: seed of the order, the frames and the noise.
    """

    clips: int = PUBLISHED_CLIPS
    real: int | None = None
    batch: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: a number is out of range.
        """
        counts = (self.clips, self.batch, 1 if self.real is None else self.real)
        if min(counts) < 1 or max(counts) >= NOISE_SEEDS or not 0 <= self.seed < 2**31:
            raise InputError(f"expected 1 or more clips and a seed of 0 to 2^31 - 1, found {self}")


@dataclass(frozen=True)
class GroupDistance:
    """FVD of the clips of one class or subject, and the numbers of clips that it compares."""

    real: int
    generated: int
    fvd: float


@dataclass(frozen=True)
class ConditionalDistance:
    """FVD per class or subject.

    Attributes:
        mean, deviation: mean and standard deviation of the groups' distances.
        groups: by class or subject.
    """

    mean: float
    deviation: float
    groups: dict[str, GroupDistance]


@dataclass(frozen=True)
class SettingMeasures:
    """Results for the clips of one setting.

    Attributes:
        setting: options of sampling, with sampler and number of steps filled in.
        clips: number of clips.
        seconds: mean seconds per clip, without those of the features.
        fvd: FVD of all clips; None if not measured.
        cfvd: FVD per class; None if not measured.
        sfvd: FVD per subject; None if not measured.
    """

    setting: SamplingOptions
    clips: int
    seconds: float
    fvd: float | None
    cfvd: ConditionalDistance | None
    sfvd: ConditionalDistance | None


@dataclass(frozen=True)
class FeatureFacts:
    """The network of the features: name and SHA-256 of its file, and features per clip."""

    file: str
    sha256: str
    width: int


@dataclass(frozen=True)
class HeldOutMeasures:
    """Results of `lfdm_export.evaluation.measure.measure_held_out`.

    Attributes:
        data: name of the data set.
        labels: classes of the held-out clips.
        subjects: subjects of the held-out clips; empty if the data set names none.
        held_out: number of held-out clips.
        real: number of real clips that were compared.
        frames, image_size: size of the clips.
        precision: precision of the bundle's graphs.
        seed: seed of the order, the frames and the noise.
        first_noise_seed: seed of the noise of clip 0; clip n has the n-th after it.
        features: the network of the features; None without such measures.
        reconstruction: results of the LFAE; None if not measured.
        generations: results per setting, in the order of the settings.
    """

    data: str
    labels: tuple[str, ...]
    subjects: tuple[str, ...]
    held_out: int
    real: int
    frames: int
    image_size: int
    precision: str
    seed: int
    first_noise_seed: int
    features: FeatureFacts | None
    reconstruction: Reconstruction | None
    generations: tuple[SettingMeasures, ...]


def check_measurable(
    held_out: HeldOutClips, measures: Sequence[Measure], *, with_features: bool, clips: int, real: int
) -> None:
    """Raise unless the measures can be taken on so many generated and real clips.

    Raises:
        InputError: a measure needs a network for features, subjects, or more clips.
    """
    distances = [measure for measure in measures if measure != "l1"]
    if distances and not with_features:
        raise InputError(
            f"{', '.join(distances)} compare features of clips, and no network for them is given; give the TorchScript "
            "file of I3D, or measure l1 alone"
        )
    if "sfvd" in measures and not held_out.subjects:
        raise InputError(
            f"sfvd is per subject, and clips of {held_out.clips.name} name none; sort them as LABEL/SUBJECT/CLIP, or "
            "leave sfvd out"
        )
    if "fvd" in measures and min(clips, real) < 2:
        raise InputError(f"fvd needs 2 or more clips for a covariance, found {clips} generated and {real} real ones")
    for measure in (measure for measure in measures if measure in _GROUP):
        for kind, count in (("real", real), ("generated", clips)):
            found = Counter(_GROUP[measure](entry) for entry in held_out.entries(count))
            few = [f"{name} ({found[name]})" for name in _groups(held_out, measure) if found[name] < 2]
            if few:
                raise InputError(
                    f"{measure} needs 2 or more {kind} clips per group for a covariance, found fewer of "
                    f"{shortened(few)}; take more {kind} clips, or leave {measure} out"
                )


def _groups(held_out: HeldOutClips, measure: Measure) -> tuple[str, ...]:
    return held_out.labels if measure == "cfvd" else held_out.subjects


def conditional_distance(
    held_out: HeldOutClips, measure: Measure, real: Float32Array, generated: Float32Array
) -> ConditionalDistance:
    """FVD within each class ("cfvd") or subject ("sfvd").

    Args:
        held_out: the held-out clips.
        measure: "cfvd" or "sfvd".
        real: features (N, F) of the real clips 0 … N - 1.
        generated: features (M, F) of the clips generated for the numbers 0 … M - 1.
    """
    group = _GROUP[measure]
    theirs, ours = (np.array([group(one) for one in held_out.entries(len(rows))]) for rows in (real, generated))
    groups = {}
    for name in _groups(held_out, measure):
        parts = generated[ours == name], real[theirs == name]
        groups[name] = GroupDistance(len(parts[1]), len(parts[0]), frechet_distance(*parts, unbiased=True))
    found = [one.fvd for one in groups.values()]
    return ConditionalDistance(float(np.mean(found)), float(np.std(found)), groups)
