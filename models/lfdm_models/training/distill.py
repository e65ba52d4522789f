"""The run of ``lfdm-train distill``: combines a teacher, examples and settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfdm_models.config import DmConfig, LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.lfae import Lfae
from lfdm_models.training.conditions import Float32Array
from lfdm_models.training.data import ClipSource, TrainingClips
from lfdm_models.training.distill_stage import DistillStage
from lfdm_models.training.dm import DmStage, load_diffusion, new_diffusion
from lfdm_models.training.drawing import UInt8Array
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.few_steps import chosen_times
from lfdm_models.training.files import load, save
from lfdm_models.training.last_stage import LastStage, bytes_kept
from lfdm_models.training.lfae import load_lfae
from lfdm_models.training.loop import STATE, Outcome, ReportProgress, no_report, train
from lfdm_models.training.pictures import ClipError, DiskClip, Framing
from lfdm_models.training.processes import Processes
from lfdm_models.training.recipes import DataSettings, fingerprint, label_embeddings, preview_clips
from lfdm_models.training.settings import DistillLearn, OptimizerSettings, RunSettings
from lfdm_models.training.teacher import Picture, ReportSamples, Sampling, TeacherSamples, draw_samples

#: Examples from which the latents' means and deviations are measured; fewer if there are fewer.
_MEASURED = 64
# Examples of the last level, and the bytes that their features may take.
_KEPT, _KEPT_BYTES = 512, 4 << 30


@dataclass(frozen=True)
class Teacher:
    """The checkpoints of the trained networks.

    Attributes:
        lfae: checkpoint of the autoencoder.
        dm: checkpoint of the trained DM.
        config: architecture and kind of flow, for checkpoints that do not store theirs.
        text_encoder: see `recipes.train_dm`; for checkpoints that do not store their labels.
    """

    lfae: Path
    dm: Path
    config: LfdmConfig
    text_encoder: str | None = None


def distill(
    teacher: Teacher,
    steps: int,
    data: DataSettings,
    optimizer: OptimizerSettings,
    run: RunSettings,
    folder: Path,
    *,
    sampling: Sampling | None = None,
    untrained: bool = False,
    learn: DistillLearn = "all",
    resume: bool = False,
    progress: ReportProgress = no_report,
    on_sample: ReportSamples = no_report,
) -> Outcome:
    """Train a DM that needs few steps; see `loop.train`.

    Args:
        teacher: the trained networks.
        steps: steps of the chain: 1, 2 or 4.
        data: the training clips; with `sampling`, only their first frames are used.
        optimizer: settings of the optimizer.
        run: number of steps, batch size, device, precision, and what is saved when.
        folder: folder of the run: its state, checkpoints, log and samples.
        sampling: how the teacher draws samples, which replace the data's clips; None to learn from the data.
        untrained: write the initial weights of the training (`centering`), which may be good enough.
        learn: what is trained: the last level on features that are kept (`last_stage`), or all (`distill_stage`).
        resume: continue the run in `folder`, if there is one.
        progress: called after every step.
        on_sample: called with the number of teacher samples drawn so far and their total.

    Raises:
        TrainingError: the run fails as in `loop.train`; or data or weights are not available, or do not fit each other.
        ValueError: the number of steps is not supported, or the DM's schedule is too short for it.
    """
    if (folder / STATE).exists() and not resume:  # before samples are drawn
        raise TrainingError(f"{folder} holds a training run already; resume it, or choose another folder")
    images = None if sampling is None else sampling.images
    source = None if images is not None else data.open(run.seed)
    config, lfae, diffusion, embeddings = _networks(teacher, None if source is None else source.labels)
    times = chosen_times(steps, config.dm.training_steps)
    facts = _facts(data, source, teacher, list(embeddings))
    facts |= {"lfae": fingerprint(lfae.state_dict()), "teacher": fingerprint(diffusion.state_dict())}
    if sampling is not None:
        facts |= {"samples": sampling.count, "teacher's steps": sampling.steps}
    reader = DmStage(config, lfae, diffusion, embeddings, examples=facts)
    examples: TrainingClips | TeacherSamples
    if sampling is not None:
        picture = _picture(images, source, data.image_size)
        examples = draw_samples(reader, picture, data.frames, sampling, folder, Processes(run.device), on_sample)
        reader.to(torch.device("cpu"))
    elif source is not None:
        examples = TrainingClips(source, data.frames, run.seed, data.colors)
    last = learn == "last" and not untrained
    if last:
        shape = (3, data.frames, *[config.latent_size(data.image_size)] * 2)
        facts["kept"] = max(min(_KEPT, _KEPT_BYTES // bytes_kept(config, steps, shape)), 1)
    first = _first_examples(reader, examples, facts["kept"] if last else _MEASURED, on_sample)
    stage = (LastStage if last else DistillStage)(
        config,
        lfae,
        diffusion,
        embeddings,
        times=times,
        first={name: values[:_MEASURED] for name, values in first.items()},
        examples=facts,
        guidance=1.0 if sampling is None else sampling.guidance,
        preview_clips=None if source is None or not run.preview_every else preview_clips(source, data),
    )
    if untrained:
        path = folder / f"{stage.name}.pth"
        weights = {key: value.detach() for key, value in stage.network.state_dict().items()}
        save(path, {**stage.checkpoint(weights), "example": 0, "epoch": 0, "step": 0})
        return Outcome(path, 0, True, {})
    if isinstance(stage, LastStage):
        stage.to(Processes(run.device).device)
        kept = stage.keep(first["latent"], first["feature"], first["label"], run.seed, on_sample)
        return train(stage, kept, optimizer, run, folder, resume=resume, progress=progress)
    return train(stage, examples, optimizer, run, folder, resume=resume, progress=progress)


def _networks(
    teacher: Teacher, labels: Sequence[str] | None
) -> tuple[LfdmConfig, Lfae, Diffusion, dict[str, Float32Array]]:
    """Configuration, LFAE, trained DM, and embeddings of the labels (None: all labels of the DM)."""
    told = load(teacher.lfae, "an LFAE checkpoint").get("training") or {}
    lfae, _ = load_lfae(teacher.lfae, None if "config" in told else teacher.config.lfae)
    content = load(teacher.dm, "a DM checkpoint")
    told = content.get("training") or {}
    embeddings = _embeddings(content, labels, teacher)
    width = len(next(iter(embeddings.values())))
    dm = replace(teacher.config.dm, feature_channels=lfae.config.feature_channels, text_width=width)
    if "config" in told:
        dm = DmConfig(**{**told["config"], "multipliers": tuple(told["config"]["multipliers"])})
    try:
        config = LfdmConfig(lfae.config, dm, bool(told.get("residual_flow", teacher.config.residual_flow)))
    except ValueError as error:
        raise TrainingError(f"{teacher.lfae} and {teacher.dm} do not fit each other: {error}") from error
    diffusion = new_diffusion(config, 0)
    load_diffusion(diffusion, teacher.dm)
    return config, lfae, diffusion.requires_grad_(False), embeddings


def _embeddings(content: Mapping[str, Any], labels: Sequence[str] | None, teacher: Teacher) -> dict[str, Float32Array]:
    """The embeddings stored in the DM's checkpoint, or else those of `label_embeddings`.

    Raises:
        TrainingError: the checkpoint stores no labels and none are given, or it lacks one of those given.
    """
    names, table = content.get("labels"), content.get("label_embeddings")
    if not isinstance(names, list) or not isinstance(table, Tensor):
        if labels is None:
            raise TrainingError(f"{teacher.dm} does not store its labels; give its data set instead of pictures")
        return label_embeddings(labels, teacher.text_encoder)
    known = dict(zip(names, table.numpy(), strict=True))
    missing = [label for label in labels or () if label not in known]
    if missing:
        raise TrainingError(
            f"{teacher.dm} was trained with the labels {', '.join(names)}, and the data has {missing[0]!r}; "
            "give the data that it was trained on"
        )
    return {label: known[label] for label in labels or names}


def _facts(data: DataSettings, source: ClipSource | None, teacher: Teacher, labels: list[str]) -> dict[str, Any]:
    """Facts of the examples: of the data if it is given, else those that the DM's checkpoint stores."""
    if source is not None:
        return data.facts(source)
    examples = (load(teacher.dm, "a DM checkpoint").get("training") or {}).get("examples") or {}
    found = {"data": examples.get("data"), "image size": data.image_size, "frames": data.frames, "labels": labels}
    return {key: value for key, value in found.items() if value is not None}


def _picture(images: Path | None, source: ClipSource | None, size: int) -> Picture:
    """The reader of the samples' pictures: those of a folder in turn, or the first frames of the clips.

    Raises:
        TrainingError: there is no such folder, or it has no pictures.
    """
    if source is not None:
        return lambda number: source.read(number, lambda _: [0])[0][0]
    assert images is not None
    if not images.is_dir():
        raise TrainingError(f"--images is {images}, expected a folder of pictures")
    pictures = DiskClip(images, Framing(), size)
    if not len(pictures):
        raise TrainingError(f"{images} holds no pictures; expected pictures of the kind that the model was trained on")

    def read(number: int) -> UInt8Array:
        try:
            picture: UInt8Array = pictures.read([number % len(pictures)])[0]
            return picture
        except ClipError as error:
            raise TrainingError(f"a picture of {images} cannot be used: {error}") from error

    return read


def _first_examples(
    reader: DmStage, examples: TrainingClips | TeacherSamples, count: int, report: ReportSamples
) -> dict[str, Tensor]:
    """The latents, features and labels of the first examples, with none of a teacher's samples twice."""
    if isinstance(examples, TeacherSamples):
        part = slice(min(count, len(examples.latents)))
        return {"latent": examples.latents[part], "feature": examples.features[part], "label": examples.labels[part]}
    found = []
    for number in range(count):
        clip = examples[number]
        found.append((*reader.encode_once(clip["frames"][None], [int(clip["clip"])]), clip["label"][None]))
        if count > _MEASURED:  # it takes minutes
            report(number + 1, count)
    latents, features, labels = (torch.cat(parts) for parts in zip(*found, strict=True))
    return {"latent": latents, "feature": features, "label": labels}
