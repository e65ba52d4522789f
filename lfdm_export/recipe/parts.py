"""The parts of a recipe, as frozen dataclasses that check themselves. A part names the earlier parts that it needs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from lfdm_export.sampling.options import SamplingOptions
from lfdm_models.config import LfdmConfig
from lfdm_models.training.settings import DistillLearn, Learn, OptimizerSettings, RunSettings


@dataclass(frozen=True)
class Training:
    """Settings of a training run; the device is chosen when the recipe is made.

    Attributes:
        optimizer: settings of the optimizer.
        run: steps, batch size, seed, precision, and what is saved when.
        pool: procedural clips, kept in memory; 0 for new clips without end.
    """

    optimizer: OptimizerSettings
    run: RunSettings
    pool: int


@dataclass(frozen=True)
class LfaePart:
    """A run of ``lfdm-train lfae``: `lfdm_models.training.recipes.train_lfae` describes the options.

    Attributes:
        name: name of the part.
        training: settings of the run.
        start: the LFAE part to start from; None for new weights.
    """

    kind: ClassVar[str] = "lfae"
    name: str
    training: Training
    start: str | None = None
    learn: Learn = "all"
    equivariance: float = 10.0
    landmarks: float = 0.0
    mixture: float = 0.0
    from_first: bool = False
    camera_still: bool = False
    freeze_norm: bool = False

    @property
    def inputs(self) -> dict[str, str]:
        """Kind of each part that this one needs, by its name."""
        return {} if self.start is None else {self.start: LfaePart.kind}


@dataclass(frozen=True)
class DmPart:
    """A run of ``lfdm-train dm``: `lfdm_models.training.recipes.train_dm` describes the options.

    Attributes:
        name: name of the part.
        training: settings of the run.
        lfae: the LFAE part.
        start: the DM part to start from; None for new weights.
    """

    kind: ClassVar[str] = "dm"
    name: str
    training: Training
    lfae: str
    start: str | None = None
    signal_std: float = 0.0

    @property
    def inputs(self) -> dict[str, str]:
        """Kind of each part that this one needs, by its name."""
        return {self.lfae: LfaePart.kind} | ({} if self.start is None else {self.start: DmPart.kind})


@dataclass(frozen=True)
class DistillPart:
    """A run of ``lfdm-train distill``: `lfdm_models.training.distill.distill` describes the options.

    Attributes:
        name: name of the part.
        training: settings of the run.
        lfae: the LFAE part.
        dm: the DM part that is distilled.
        steps: sampling steps of the new DM.
        learn: what is trained.
    """

    kind: ClassVar[str] = "distill"
    name: str
    training: Training
    lfae: str
    dm: str
    steps: int
    learn: DistillLearn = "last"

    @property
    def inputs(self) -> dict[str, str]:
        """Kind of each part that this one needs, by its name."""
        return {self.lfae: LfaePart.kind, self.dm: DmPart.kind}


@dataclass(frozen=True)
class BundlePart:
    """An export to a bundle in fp32, without stored reference outputs.

    Attributes:
        name: name of the part.
        lfae: the LFAE part.
        dm: the DM part, or the part with its distilled version if `distilled`.
        distilled: `dm` is a `DistillPart`.
        tuned: the part with the tables of the tuned sampler; None for none.
    """

    kind: ClassVar[str] = "bundle"
    name: str
    lfae: str
    dm: str
    distilled: bool = False
    tuned: str | None = None

    @property
    def inputs(self) -> dict[str, str]:
        """Kind of each part that this one needs, by its name."""
        dm = DistillPart.kind if self.distilled else DmPart.kind
        tuned = {} if self.tuned is None else {self.tuned: SchedulePart.kind}
        return {self.lfae: LfaePart.kind, self.dm: dm} | tuned


@dataclass(frozen=True)
class SchedulePart:
    """A run of ``lfdm-train schedule``: `lfdm_export.evaluation.tuning.Search` describes the options.

    Attributes:
        name: name of the part.
        bundle: the bundle that is tuned.
        steps: numbers of steps; one table for each.
        conditions: pairs of image and label.
    """

    kind: ClassVar[str] = "schedule"
    name: str
    bundle: str
    steps: tuple[int, ...]
    conditions: int
    clips: int
    generations: int
    candidates: int
    seed: int

    @property
    def inputs(self) -> dict[str, str]:
        """Kind of each part that this one needs, by its name."""
        return {self.bundle: BundlePart.kind}


@dataclass(frozen=True)
class ModelPart:
    """The files that ship: a model folder with the tuned tables, and one with the distilled DM.

    Attributes:
        name: name of the part.
        lfae: the LFAE part.
        dm: the DM part.
        tuned: the part with the tables of the tuned sampler; None for none.
        distilled: the part with the distilled DM; None for none.
    """

    kind: ClassVar[str] = "model"
    name: str
    lfae: str
    dm: str
    tuned: str | None = None
    distilled: str | None = None

    @property
    def inputs(self) -> dict[str, str]:
        """Kind of each part that this one needs, by its name."""
        tuned = {} if self.tuned is None else {self.tuned: SchedulePart.kind}
        distilled = {} if self.distilled is None else {self.distilled: DistillPart.kind}
        return {self.lfae: LfaePart.kind, self.dm: DmPart.kind} | tuned | distilled


@dataclass(frozen=True)
class EvaluationPart:
    """A run of ``lfdm-train evaluate`` with the shipped classifier.

    Attributes:
        name: name of the part.
        bundle: the bundle that is measured.
        settings: options of sampling, each measured.
        clips: clips per label.
        seed: seed of characters and noise.
    """

    kind: ClassVar[str] = "evaluation"
    name: str
    bundle: str
    settings: tuple[SamplingOptions, ...]
    clips: int
    seed: int = 0

    @property
    def inputs(self) -> dict[str, str]:
        """Kind of each part that this one needs, by its name."""
        return {self.bundle: BundlePart.kind}


TrainedPart: TypeAlias = LfaePart | DmPart | DistillPart
Part: TypeAlias = TrainedPart | BundlePart | SchedulePart | ModelPart | EvaluationPart


def steps_of(part: Part) -> int:
    """Steps of the optimizer that a part takes; 0 for a part that trains nothing."""
    return part.training.run.steps if isinstance(part, TrainedPart) else 0


@dataclass(frozen=True)
class Recipe:
    """A model's parts, in the order in which they are made.

    Attributes:
        name: name of the recipe and of its model.
        version: increased when the same settings shall make another model; every part is then made again.
        config: architecture of the networks.
        image_size: pixels per side.
        frames: frames per clip.
        parts: the parts.
    """

    name: str
    version: int
    config: LfdmConfig
    image_size: int
    frames: int
    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        """Check the parts.

        Raises:
            ValueError: a name appears twice, or a part needs one that is not before it or is of another kind.
        """
        twice = [name for name, times in Counter(part.name for part in self.parts).items() if times > 1]
        if twice:
            raise ValueError(f"two parts have the name {twice[0]!r}")
        before: dict[str, str] = {}
        for part in self.parts:
            for name, kind in part.inputs.items():
                if before.get(name) != kind:
                    found = before.get(name, "no part")
                    raise ValueError(f"{part.name!r} needs {name!r} before it, of kind {kind!r}; found {found}")
            before[part.name] = part.kind
