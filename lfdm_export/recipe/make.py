"""Makes one part of a recipe by the library's functions, as the commands do."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from lfdm_export.checkpoints.load import load_model
from lfdm_export.checkpoints.model_folder import save_model
from lfdm_export.evaluation.evaluate import evaluate_bundle
from lfdm_export.evaluation.report import JSON, MARKDOWN, write_evaluation
from lfdm_export.evaluation.tune_bundle import tune_bundle
from lfdm_export.evaluation.tuning import Search
from lfdm_export.export.bundle_export import export_bundle
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.progress import Progress
from lfdm_export.recipe.parts import (
    BundlePart,
    DistillPart,
    DmPart,
    EvaluationPart,
    LfaePart,
    ModelPart,
    Recipe,
    SchedulePart,
    TrainedPart,
)
from lfdm_export.sampling.tuned import TunedSampler
from lfdm_models.training.classifier import shipped_classifier
from lfdm_models.training.distill import Teacher, distill
from lfdm_models.training.loop import Outcome, ReportProgress
from lfdm_models.training.recipes import DataSettings, train_dm, train_lfae
from lfdm_models.training.settings import Device, RunSettings

LFAE, DM, BUNDLE, TUNED = "lfae.pth", "dm.pth", "bundle", "tuned.json"
#: The only engine whose results do not depend on which others are installed.
_TARGET = "onnxruntime"


@dataclass(frozen=True)
class Maker:
    """What all parts of a recipe share.

    Attributes:
        recipe: the recipe.
        folder: its folder.
        device: device of the training.
        threads: CPU threads of the engines; None for all cores.
        on_step: called after every step of the optimizer.
        progress: called as ``progress(stage, done, total)`` by the parts that train nothing.
    """

    recipe: Recipe
    folder: Path
    device: Device
    threads: int | None
    on_step: ReportProgress
    progress: Progress | None

    def train(self, part: TrainedPart) -> Outcome:
        """Train a part, from its own checkpoint if it has one; the result is its checkpoint.

        Raises:
            TrainingError: as in `lfdm_models.training.loop.train`.
        """
        data = DataSettings(image_size=self.recipe.image_size, frames=self.recipe.frames, pool=part.training.pool)
        run = replace(part.training.run, device=self.device)
        if isinstance(part, LfaePart):
            return self._train_lfae(part, data, run)
        if isinstance(part, DmPart):
            return train_dm(
                self.recipe.config,
                self._lfae(part.lfae),
                data,
                part.training.optimizer,
                run,
                self.folder / part.name,
                start=None if part.start is None else self._dm(part.start),
                signal_std=part.signal_std,
                resume=True,
                progress=self.on_step,
            )
        return distill(
            Teacher(self._lfae(part.lfae), self._dm(part.dm), self.recipe.config),
            part.steps,
            data,
            part.training.optimizer,
            run,
            self.folder / part.name,
            learn=part.learn,
            resume=True,
            progress=self.on_step,
        )

    def _train_lfae(self, part: LfaePart, data: DataSettings, run: RunSettings) -> Outcome:
        return train_lfae(
            self.recipe.config.lfae,
            data,
            part.training.optimizer,
            run,
            self.folder / part.name,
            start=None if part.start is None else self._lfae(part.start),
            learn=part.learn,
            equivariance=part.equivariance,
            landmarks=part.landmarks,
            mixture=part.mixture,
            from_first=part.from_first,
            camera_still=part.camera_still,
            freeze_norm=part.freeze_norm,
            resume=True,
            progress=self.on_step,
        )

    def make(self, part: BundlePart | SchedulePart | ModelPart | EvaluationPart) -> tuple[str, ...]:
        """Make a part that trains nothing; returns the files and folders of its result.

        Raises:
            LfdmExportError: it cannot be made.
        """
        folder = self.folder / part.name
        if isinstance(part, BundlePart):
            model = load_model(self._lfae(part.lfae), self._dm(part.dm))
            tuned = None if part.tuned is None else TunedSampler.load(self._tuned(part.tuned))
            export_bundle(model, folder / BUNDLE, reference=False, tuned=tuned, progress=self.progress)
            return (BUNDLE,)
        if isinstance(part, ModelPart):
            return self._save(part)
        pipeline = Pipeline.open(self.folder / part.bundle / BUNDLE, threads=self.threads, target=_TARGET)
        if isinstance(part, SchedulePart):
            search = Search(part.clips, part.generations, part.candidates, part.seed)
            found = tune_bundle(pipeline, part.steps, search=search, conditions=part.conditions, progress=self.progress)
            folder.mkdir(parents=True, exist_ok=True)
            found.save(folder / TUNED)
            return (TUNED,)
        evaluation = evaluate_bundle(
            pipeline,
            shipped_classifier(),
            part.settings,
            clips=part.clips,
            seed=part.seed,
            progress=self.progress,
        )
        write_evaluation(evaluation, folder)
        return (JSON, MARKDOWN)

    def _save(self, part: ModelPart) -> tuple[str, ...]:
        """Write the folders that ship, named after the recipe."""
        folder, name = self.folder / part.name, self.recipe.name
        save_model(load_model(self._lfae(part.lfae), self._dm(part.dm)), folder / name)
        if part.tuned is not None:
            TunedSampler.load(self._tuned(part.tuned)).save(folder / name / TUNED)
        if part.distilled is None:
            return (name,)
        distilled = next(one for one in self.recipe.parts if one.name == part.distilled)
        assert isinstance(distilled, DistillPart)  # the recipe checks kinds
        few = f"{name}-{distilled.steps}-step{'s' if distilled.steps > 1 else ''}"
        save_model(load_model(self._lfae(part.lfae), self._dm(part.distilled)), folder / few)
        return (name, few)

    def _lfae(self, name: str) -> Path:
        return self.folder / name / LFAE

    def _dm(self, name: str) -> Path:
        return self.folder / name / DM

    def _tuned(self, name: str) -> Path:
        return self.folder / name / TUNED
