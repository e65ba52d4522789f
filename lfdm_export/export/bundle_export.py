"""A loaded model -> a bundle."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from lfdm_export.bundle.manifest import LARGEST_SIZE, TEXT_STAGE, Manifest, check_labels, dm_sha256_of
from lfdm_export.bundle.reader import ONNX_FOLDER, PARITY_FOLDER, TOKENIZER_FOLDER, TORCH_WEIGHTS, Bundle
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.checkpoints.datasets import NO_ENCODER, dataset_facts
from lfdm_export.engines.pytorch.weights import check_torch_precision, write_weights
from lfdm_export.errors import ExportError, InputError
from lfdm_export.export.precisions import Traced, check_precision, typed_graphs
from lfdm_export.graphs import trace
from lfdm_export.machine import package_versions
from lfdm_export.pictures.preprocess import Preprocessing
from lfdm_export.progress import Progress, report
from lfdm_export.reference.pytorch import make_reference
from lfdm_export.rewrite.stage_modules import stage_modules
from lfdm_export.sampling.noise import draw_seed
from lfdm_export.sampling.options import DEFAULTS, SamplingOptions
from lfdm_export.sampling.tuned import TUNED, TunedSampler
from lfdm_export.stages import Geometry, StageSpec, stage_specs
from lfdm_models.config import LfdmConfig
from lfdm_models.model import LfdmModel
from lfdm_models.schedule import cosine_schedule
from lfdm_models.text import BertTextEncoder, TextEncoderError

logger = logging.getLogger(__name__)

#: Frames per run of `decode`; from 2 to 20 the time per frame is the same, and memory grows with the number.
CHUNK_FRAMES = 8
#: The stages taken from each traced UNet graph, and the file that their weights share.
_UNET_GRAPHS = {"step": ("step", "denoise"), "step_guided": ("step_guided", "denoise_guided")}
_UNET_DATA = "unet.data"
#: Frames and image size of the published models' training.
_PUBLISHED_FRAMES, _PUBLISHED_SIZE = 40, 128
_VERSIONED = ("lfdm-export", "numpy", "torch", "onnx", "onnxscript", "transformers")


def export_bundle(
    model: LfdmModel,
    out_dir: str | os.PathLike[str],
    *,
    engine: str = "fp32",
    dataset: str | None = None,
    frames: int | None = None,
    image_size: int | None = None,
    text_encoder: BertTextEncoder | str | os.PathLike[str] | None = None,
    labels: Sequence[str] | None = None,
    preprocessing: Preprocessing | None = None,
    drive: bool = True,
    reference: bool = True,
    torch_weights: bool = False,
    tuned: TunedSampler | None = None,
    progress: Progress | None = None,
) -> Bundle:
    """Export a model as a bundle, atomically: an interrupted export leaves an earlier bundle unchanged.

    Args:
        model: the model, from `load_model`.
        out_dir: folder of the bundle: a new path, an empty folder, or a bundle, which is replaced.
        engine: precision of the graphs, one of `stages.PRECISIONS`; see docs/precision.md.
        dataset: the training data, "mug", "mhad" or "natops": sets text encoder, labels and preprocessing, unless they
            are given.
        frames: T, frames per clip; fixed in the bundle. None: as in the model's training, else 40.
        image_size: H = W in pixels; fixed in the bundle. None: as in the model's training, else 128.
        text_encoder: the BERT that the model was trained with: a folder, a hub name, or loaded. With it the bundle
            accepts free text. "none": no text encoder, even with `dataset`; labels are then only the model's own.
        labels: the bundle's labels, embedded by the text encoder, or chosen from the model's own labels. None: those
            of `dataset`, else all of the model's own.
        preprocessing: how a picture is prepared for the model. None: the rule of `dataset`, else the default.
        drive: include `estimate_motion`, which only motion transfer needs: half of a bundle of the published size.
        reference: also run the untouched networks and store their outputs, so that the bundle can be verified without
            them.
        torch_weights: include weights for the target torch; for fp32, tf32, fp16 and bf16.
        tuned: tables of few steps, learned for these weights (`TunedSampler.load`). A distilled DM brings
            its own, which becomes the bundle's default sampler.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        The bundle.

    Raises:
        InputError: an argument is invalid.
        ExportError: the export failed or is not valid.
        BundleError: the bundle cannot be written.
    """
    check_precision(engine)
    if torch_weights:
        check_torch_precision(engine)
    if dataset is not None:
        facts = dataset_facts(dataset)
        preprocessing = facts.preprocessing if preprocessing is None else preprocessing
        if text_encoder != NO_ENCODER:
            text_encoder = facts.text_encoder if text_encoder is None else text_encoder
            labels = facts.labels if labels is None else labels
    if text_encoder == NO_ENCODER:
        text_encoder = None
    tuned, defaults = _few_step_sampler(model, tuned)
    trained_frames, trained_size = trained_geometry(model)
    frames = trained_frames if frames is None else frames
    geometry = geometry_of(model.config, frames, trained_size if image_size is None else image_size)
    _require_cosine_schedule(model)
    encoder = load_text_encoder(text_encoder, geometry.text_width)
    if labels is not None:
        _check_labels(labels)
    table = _label_table(model, labels, encoder)
    specs = stage_specs(geometry, with_text=encoder is not None, with_drive=drive)
    with BundleWriter(out_dir) as writer:
        graphs = trace_graphs(model, encoder, specs, frames, progress)
        lowered = typed_graphs(Traced(graphs, model, geometry, table), engine, progress)
        write_graphs(lowered.graphs, specs, writer.folder / ONNX_FOLDER)
        if lowered.sensitivity is not None:
            lowered.sensitivity.write(writer.folder / PARITY_FOLDER)
        del graphs, lowered
        if torch_weights:
            write_weights(model, writer.folder / TORCH_WEIGHTS)
        rows = np.array(list(table.values()), np.float32).reshape(len(table), geometry.text_width)
        writer.write_embeddings(rows, model.diffusion.denoise_fn.null_cond_emb.detach().numpy()[0])
        if encoder is not None:
            encoder.save_tokenizer(writer.folder / TOKENIZER_FOLDER)
        if reference:
            seed = draw_seed()
            writer.write_reference(
                make_reference(model, geometry, seed=seed, text_encoder=encoder, drive=drive, progress=progress)
            )
        return writer.finish(
            Manifest(
                config=model.config,
                geometry=geometry,
                precision=engine,
                stages=tuple(specs.values()),
                labels=tuple(table),
                preprocessing=preprocessing or Preprocessing(),
                sampler=defaults,
                tuned=tuned,
                provenance=dict(model.provenance),
                versions={"python": platform.python_version(), **package_versions(_VERSIONED)},
            )
        )


def _few_step_sampler(model: LfdmModel, tuned: TunedSampler | None) -> tuple[TunedSampler | None, SamplingOptions]:
    """The tables of few steps and the default sampler: of a distilled DM the steps that it was distilled for.

    Raises:
        InputError: `tuned` was learned for other weights, or the model's provenance is wrong.
    """
    found = dm_sha256_of(model.provenance)
    if tuned is not None:
        tuned.require_weights(found)
    distilled = TunedSampler.of_distilled(model.provenance, found)
    if distilled is None:
        return tuned, DEFAULTS
    defaults = SamplingOptions(TUNED, distilled.tables[0].steps, None, distilled.guidance_scale)
    if tuned is not None:
        distilled = replace(tuned, tables=distilled.with_tables(tuned.tables))
    return distilled, defaults


def trained_geometry(model: LfdmModel) -> tuple[int, int]:
    """Frames per clip and pixels per side of a model's training; the published values if the model does not say."""
    found = (model.provenance.get(name) for name in ("frames", "image_size"))
    frames, image_size = (value if isinstance(value, int) else None for value in found)
    return frames or _PUBLISHED_FRAMES, image_size or _PUBLISHED_SIZE


def geometry_of(config: LfdmConfig, frames: int, image_size: int) -> Geometry:
    """The sizes of all stages.

    Raises:
        InputError: the networks do not support the image size, or `frames` is below 1.
    """
    if frames < 1:
        raise InputError(f"frames is {frames}, expected 1 or more")
    if max(frames, image_size) > LARGEST_SIZE:
        raise InputError(
            f"found {frames} frames of {image_size} pixels per side, expected at most {LARGEST_SIZE} of each"
        )
    try:
        latent_size = config.latent_size(image_size)
    except ValueError as error:
        raise InputError(str(error)) from error
    return Geometry(
        image_size=image_size,
        latent_size=latent_size,
        frames=frames,
        chunk_frames=min(CHUNK_FRAMES, frames),
        skip_channels=tuple(config.lfae.generator_channels(level) for level in range(config.lfae.down_blocks + 1)),
        context_channels=config.dm.width,
        text_width=config.dm.text_width,
    )


def _require_cosine_schedule(model: LfdmModel) -> None:
    """Check the noise schedule: a bundle stores only its length, because there is only one published schedule."""
    found = model.diffusion.schedule()
    expected = cosine_schedule(found.steps)
    for name, values in expected.buffers().items():
        if not np.allclose(found.buffers()[name], values, rtol=1e-4, atol=1e-6):
            raise ExportError(
                f"the DM's noise schedule is not the cosine schedule of {found.steps} steps (its {name} differs); "
                "expected the published schedule; train the DM with it"
            )


def trace_graphs(
    model: LfdmModel,
    encoder: BertTextEncoder | None,
    specs: Mapping[str, StageSpec],
    frames: int,
    progress: Progress | None = None,
) -> dict[str, ir.Model]:
    """The float32 graph of every stage, by name; weights are the model's own tensors unless a rewrite changed them."""
    modules = stage_modules(model, frames)
    if encoder is not None:
        modules[TEXT_STAGE] = encoder
    traced = [name for name in specs if not name.startswith("denoise")]
    graphs: dict[str, ir.Model] = {}
    for done, name in enumerate(traced):
        report(progress, name, done, len(traced))
        spec = specs[name]
        if name not in _UNET_GRAPHS:
            graphs[name] = trace.trace(modules[name], spec.inputs, spec.outputs)
            continue
        stages = [specs[stage] for stage in _UNET_GRAPHS[name]]
        outputs = [tensor for stage in reversed(stages) for tensor in stage.outputs]
        graph = trace.trace(modules[name], spec.inputs, outputs)
        graphs |= {stage.name: trace.select(graph, stage) for stage in stages}
    report(progress, "done", len(traced), len(traced))
    return graphs


def write_graphs(graphs: Mapping[str, ir.Model], specs: Mapping[str, StageSpec], folder: Path) -> None:
    """Write and check every stage's graph; the UNet's graphs share one file of weights.

    Raises:
        ExportError: a graph is not valid ONNX.
    """
    unet = [stage for stages in _UNET_GRAPHS.values() for stage in stages]
    trace.save({name: graphs[name] for name in unet}, folder, _UNET_DATA)
    for name in specs:
        if name not in unet:
            trace.save({name: graphs[name]}, folder, f"{name}.data")
    trace.check(folder, specs)


def load_text_encoder(
    source: BertTextEncoder | str | os.PathLike[str] | None, text_width: int
) -> BertTextEncoder | None:
    """Load a text encoder if necessary, and check that it fits the DM; None for None.

    Raises:
        InputError: it cannot be loaded, or its embeddings have another width.
    """
    if source is None:
        return None
    try:
        encoder = source if isinstance(source, BertTextEncoder) else BertTextEncoder.load(source)
    except TextEncoderError as error:
        raise InputError(str(error)) from error
    if encoder.width != text_width:
        raise InputError(
            f"the text encoder gives embeddings of {encoder.width} values, the DM expects {text_width}; "
            "give the encoder that the DM was trained with"
        )
    return encoder


def _check_labels(labels: Sequence[str]) -> None:
    try:
        check_labels(labels)
    except ValueError as error:
        raise InputError(f"the labels cannot be used: {error}; give each once, in printable text") from error


def _label_table(
    model: LfdmModel, labels: Sequence[str] | None, encoder: BertTextEncoder | None
) -> dict[str, NDArray[np.float32]]:
    """Embedding of each label, from the text encoder if there is one, else from the model."""
    wanted = list(model.label_embeddings) if labels is None else list(labels)
    if not wanted:
        logger.info("the bundle knows no labels: give labels and a text encoder, or generate with text embeddings")
        return {}
    if encoder is not None:
        return dict(zip(wanted, encoder.embed(wanted), strict=True))
    missing = [label for label in wanted if label not in model.label_embeddings]
    if missing:
        raise InputError(
            f"there is no text embedding for the label {missing[0]!r} (of {len(missing)} without one); "
            "give the text encoder that the DM was trained with (the published models: bert-base-cased)"
        )
    return {label: model.label_embeddings[label] for label in wanted}
