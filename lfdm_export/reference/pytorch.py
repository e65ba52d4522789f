"""Outputs of the untouched PyTorch networks: the reference for exports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lfdm_export.bundle.manifest import TEXT_STAGE
from lfdm_export.errors import ExportError
from lfdm_export.machine import torch_threads
from lfdm_export.pictures.preprocess import to_float, to_uint8
from lfdm_export.progress import Progress, report
from lfdm_export.reference.inputs import BATCH_SIZE, chain_conditions, chain_table, draw_inputs
from lfdm_export.reference.stored import (
    MAX_VALUES,
    TOKEN_COUNT,
    ChainReference,
    Reference,
    from_levels,
    kept_frames,
    probes,
    skip_specs,
    stored_specs,
    thin,
)
from lfdm_export.sampling.loop import apply_step, sample, step_from_denoiser
from lfdm_export.sampling.noise import START, check_seeds, seeded_noise
from lfdm_export.stages import DRIVE_STAGE, Geometry, stage_specs
from lfdm_models.lfae import flow_to_latent, latent_to_flow
from lfdm_models.model import LfdmModel
from lfdm_models.text import BertTextEncoder
from lfdm_models.unet import LATENT_CHANNELS

Float32: TypeAlias = NDArray[np.float32]
Arrays: TypeAlias = Mapping[str, NDArray[Any]]

# Inputs of the stage `text`, of different lengths, so that one is padded.
_TEXTS = ("happiness", "a person waves with the right hand")
# Quantization steps of an encoder output.
_LEVELS = 255


def make_reference(
    model: LfdmModel,
    geometry: Geometry,
    *,
    seed: int,
    text_encoder: BertTextEncoder | None = None,
    drive: bool = True,
    whole: bool = False,
    progress: Progress | None = None,
) -> Reference:
    """Run the untouched networks, in float32 on the CPU, on inputs drawn from a seed.

    Args:
        model: both networks.
        geometry: sizes of the stages.
        seed: seed of all inputs and of the chain's noise, 0 … 2^64-1.
        text_encoder: for the stage `text`; None if the bundle has none.
        drive: include the stage `estimate_motion`.
        whole: keep every value of the stages' outputs; a stored reference keeps only some.
        progress: called as ``progress("reference", done, total)``.

    Raises:
        InputError: the seed is out of range.
        ExportError: the networks' own clip has values that are not finite.
    """
    check_seeds([seed])
    stages = stage_specs(geometry, with_text=text_encoder is not None, with_drive=drive)
    steps = chain_table(model.diffusion.schedule(), model.provenance).steps
    tick = _ticker(progress, 2 * BATCH_SIZE + geometry.chunk_frames + steps + geometry.frames)
    with torch.inference_mode(), torch_threads():
        drawn = draw_inputs(model.config, geometry, seed)
        encoded = _encode(model, torch.from_numpy(drawn["image"]))
        rounded = [_round(output) for output in encoded[:-1]]
        context = _context(model, torch.from_numpy(from_levels(*rounded[-1])))
        tokens = () if text_encoder is None else _tokens(text_encoder)
        skips = {spec.name: levels for spec, (levels, _) in zip(skip_specs(stages), rounded, strict=True)}
        units = np.array([unit for _, unit in rounded], np.float32)
        stored = dict(zip((t.name for t in stored_specs(stages)), (_array(context), *tokens), strict=True))
        known = {name: from_levels(levels, unit) for (name, levels), unit in zip(skips.items(), units, strict=True)}
        inputs = {**drawn, **known, **stored}
        results = {"encode": tuple(map(_array, encoded)), **_denoised(model, inputs, tick)}
        results["decode"] = _decoded(model, inputs, list(known.values()), tick)
        if drive:
            results[DRIVE_STAGE] = (_motion(model, inputs),)
        if text_encoder is not None:
            results[TEXT_STAGE] = (_array(text_encoder(*map(torch.from_numpy, tokens))),)
        chain = _chain(model, geometry, seed, tick)
    limit = None if whole else MAX_VALUES
    return Reference(
        seed=seed,
        skips=skips,
        units=units,
        stored=stored,
        outputs={
            stage: {
                tensor.name: thin(seed, f"{stage}/{tensor.name}", values, limit)
                for tensor, values in zip(spec.outputs, results[stage], strict=True)
            }
            for stage, spec in stages.items()
        },
        probes=probes(drawn),
        chain=chain,
    )


def _ticker(progress: Progress | None, total: int) -> Callable[[int], None]:
    """A function that counts and reports finished work."""
    done = 0

    def tick(more: int) -> None:
        nonlocal done
        done += more
        report(progress, "reference", done, total)

    tick(0)
    return tick


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.numpy()


def _encode(model: LfdmModel, image: Tensor) -> tuple[Tensor, ...]:
    """Outputs of the stage `encode`: encoder outputs, then context."""
    outputs = model.lfae.generator.encode(image)
    return (*outputs, _context(model, outputs[-1]))


def _context(model: LfdmModel, feature: Tensor) -> Tensor:
    """The first convolution's response to the feature, with a latent of zeros, for one frame."""
    silent = F.pad(feature, (0, 0, 0, 0, LATENT_CHANNELS, 0))  # the latent's channels come first
    output: Tensor = model.diffusion.denoise_fn.init_conv(silent[:, :, None])
    return output[:, :, 0]


def _round(output: Tensor) -> tuple[NDArray[np.uint8], np.float32]:
    """A nonnegative encoder output as levels, and the unit of one level."""
    unit = np.float32(max(float(output.max()), 1e-6) / _LEVELS)
    return (_array(output) / unit).round().astype(np.uint8), unit


def _tokens(encoder: BertTextEncoder) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask of the texts, (BATCH_SIZE, TOKEN_COUNT) int64 each."""
    ids, mask = (_array(tokens)[:, :TOKEN_COUNT] for tokens in encoder.tokenize(_TEXTS))
    missing = TOKEN_COUNT - ids.shape[1]
    # A masked ID is ignored; 0 is in every vocabulary.
    return np.pad(ids, ((0, 0), (0, missing))), np.pad(mask, ((0, 0), (0, missing)))


def _denoised(model: LfdmModel, inputs: Arrays, tick: Callable[[int], None]) -> dict[str, tuple[Float32, ...]]:
    """The outputs of the four stages of the UNet, which share their inputs."""
    unet = model.diffusion.denoise_fn
    latent, feature, embedding, timestep, scale = (
        torch.from_numpy(inputs[name])
        for name in ("noisy_latent", "feature", "text_embedding", "timestep", "guidance_scale")
    )
    conditional = unet(latent, feature, embedding, timestep)
    tick(BATCH_SIZE)
    unconditional = unet(latent, feature, unet.null_cond_emb.expand_as(embedding), timestep)
    tick(BATCH_SIZE)
    # Like `Unet3D.guided`, which takes one scale for all samples.
    guided = unconditional + scale.view(-1, 1, 1, 1, 1) * (conditional - unconditional)
    rest = inputs["history"], inputs["noise"], inputs["coefficients"]
    plain, mixed = _array(conditional), _array(guided)
    return {
        "denoise": (plain,),
        "denoise_guided": (mixed,),
        "step": apply_step(inputs["noisy_latent"], plain, *rest),
        "step_guided": apply_step(inputs["noisy_latent"], mixed, *rest),
    }


def _decoded(
    model: LfdmModel, inputs: Arrays, skips: list[NDArray[Any]], tick: Callable[[int], None]
) -> tuple[Float32, Float32]:
    image, latent = torch.from_numpy(inputs["image"]), torch.from_numpy(inputs["latent"])
    return _decode_frames(model, image, list(map(torch.from_numpy, skips)), latent, tick)


def _decode_frames(
    model: LfdmModel, image: Tensor, skips: list[Tensor], latent: Tensor, tick: Callable[[int], None]
) -> tuple[Float32, Float32]:
    """Frames and warped images (B, 3, T, H, W) of a latent (B, 3, T, h, w), frame by frame."""
    frames, warped = [], []
    for index in range(latent.shape[2]):
        flow = latent_to_flow(latent[:, :, index], residual_flow=model.config.residual_flow)
        decoded = model.lfae.generator.decode(image, skips, flow)
        frames.append(decoded.frame)
        warped.append(decoded.warped)
        tick(1)
    return _array(torch.stack(frames, dim=2)), _array(torch.stack(warped, dim=2))


def _motion(model: LfdmModel, inputs: Arrays) -> Float32:
    flow = model.lfae.estimate_motion(torch.from_numpy(inputs["image"]), torch.from_numpy(inputs["driving"]))
    return _array(flow_to_latent(flow, residual_flow=model.config.residual_flow))


def _chain(model: LfdmModel, geometry: Geometry, seed: int, tick: Callable[[int], None]) -> ChainReference:
    """The chain: one whole clip."""
    rows = list(model.label_embeddings.values())
    picture, embedding = chain_conditions(rows, geometry, seed)
    image = torch.from_numpy(to_float(picture[None]))
    *skips, _ = _encode(model, image)
    text = torch.from_numpy(embedding[None])
    latents = []

    def denoise(noisy_latent: Float32, timestep: NDArray[np.int64]) -> Float32:
        predicted = model.diffusion.denoise_fn(
            torch.from_numpy(noisy_latent), skips[-1], text, torch.from_numpy(timestep)
        )
        return _array(predicted)

    def keep(_index: int, latent: Float32, _history: Float32) -> None:
        latents.append(latent[0])
        tick(1)

    source = seeded_noise([seed], (3, geometry.frames, geometry.latent_size, geometry.latent_size))
    table = chain_table(model.diffusion.schedule(), model.provenance)
    latent = sample(step_from_denoiser(denoise), table, source(START), source, on_step=keep)
    frames, warped = _decode_frames(model, image, skips, torch.from_numpy(latent), tick)
    if not np.isfinite(frames).all() or not np.isfinite(warped).all():
        raise ExportError("the model itself gives frames that are not finite; check its weights")
    kept = kept_frames(geometry.frames)
    return ChainReference(
        image=picture,
        embedding=embedding,
        latents=np.stack(latents),
        frames=to_uint8(frames)[0],
        warped=to_uint8(warped)[0],
        kept=kept,
        kept_frames=frames[0].transpose(1, 0, 2, 3)[kept],
        kept_warped=warped[0].transpose(1, 0, 2, 3)[kept],
    )
