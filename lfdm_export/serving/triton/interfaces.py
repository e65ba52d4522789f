"""Inputs and outputs of each Triton model, derived from the stages' specifications and the contract."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lfdm_export.protocol.contract import (
    CANCEL_INPUT,
    CANCEL_OUTPUT,
    CLIP_INPUTS,
    CLIP_MODEL,
    CLIP_OUTPUTS,
    CONDITION_INPUTS,
    CONDITION_MODEL,
    DECODE_MODEL,
    ENCODE_MODEL,
    IMAGE_INPUTS,
    PREPROCESS_MODEL,
    SAMPLE_MODEL,
    SAMPLING_INPUTS,
    STREAM_INPUTS,
    STREAM_MODEL,
    STREAM_OUTPUTS,
    USED_SEED,
    WireTensor,
    WireType,
)
from lfdm_export.stages import COEFFICIENTS, Geometry, StageSpec, TensorSpec, stage_specs

#: The model that runs decode if one of Triton's backends does; `lfdm_decode` calls it once per chunk.
DECODE_CHUNK_MODEL = "lfdm_decode_chunk"

#: Placeholder sizes: only the number of encoder levels is used.
ANY_GEOMETRY = Geometry(
    image_size=128,
    latent_size=32,
    frames=40,
    chunk_frames=8,
    skip_channels=(1, 1, 1),
    context_channels=1,
    text_width=768,
)
_WIRE: Mapping[str, WireType] = {"float32": "FP32", "int64": "INT64"}

#: The model's input picture, RGB.
PIXELS = WireTensor("pixels", "UINT8", ("size", "size", 3))
SEED = WireTensor("seed", "INT64", (1,))
GUIDANCE_SCALE = WireTensor("guidance_scale", "FP32", (1,))
# The rows of a `SamplerTable`.
TIMESTEPS = WireTensor("timesteps", "INT64", ("steps",))
COEFFICIENT_ROWS = WireTensor("coefficients", "FP32", ("steps", COEFFICIENTS))
DRAWS_NOISE = WireTensor("draws_noise", "BOOL", ("steps",))
#: The steps at which guidance acts.
GUIDED = WireTensor("guided", "BOOL", ("steps",))
#: The first three of the contract's timings.
SAMPLE_TIMINGS = WireTensor("sample_timings", "FP32", (3,))


@dataclass(frozen=True)
class ModelInterface:
    """Inputs and outputs of one Triton model.

    Attributes:
        name: name of the model.
        inputs, outputs: its tensors, in order.
    """

    name: str
    inputs: tuple[WireTensor, ...]
    outputs: tuple[WireTensor, ...]


def wire_tensor(tensor: TensorSpec, *, exact: bool = True) -> WireTensor:
    """A stage's tensor as a Triton tensor; every axis is open unless `exact`."""
    shape = tensor.shape if exact else tuple(f"axis_{index}" for index in range(len(tensor.shape)))
    return WireTensor(tensor.name, _WIRE[tensor.dtype], shape)


def interfaces(geometry: Geometry | None, *, on_device: bool = False) -> dict[str, ModelInterface]:
    """All models of a repository by name: the ensemble's steps in order, then the ensemble and the stream.

    Args:
        on_device: see `ServingSettings`.
        geometry: determines the stages' shapes; axes that the contract names stay names. None leaves all axes of
            the stages open, which fits every model with as many encoder levels as the published ones.
    """
    encode = stage_specs(geometry or ANY_GEOMETRY)["encode"]
    image, *skips, context = (
        wire_tensor(tensor, exact=geometry is not None) for tensor in (*encode.inputs, *encode.outputs)
    )
    embedding = next(tensor for tensor in CONDITION_INPUTS if tensor.name == "text_embedding")
    table = (TIMESTEPS, COEFFICIENT_ROWS, DRAWS_NOISE, GUIDED)
    sampler = (replace(embedding, optional=False), SEED, GUIDANCE_SCALE, *table)
    outputs = {tensor.name: tensor for tensor in CLIP_OUTPUTS}
    latent, used_seed = (replace(outputs[name], optional=False) for name in ("latent", USED_SEED.name))
    # A cancel request to the sampler has none of the other inputs.
    sample_inputs = (*(replace(tensor, optional=True) for tensor in (context, *sampler)), CANCEL_INPUT)
    decoded = (outputs["frames"], outputs["warped"], outputs["timings"])
    results: tuple[WireTensor, ...] = (latent, SAMPLE_TIMINGS)
    if on_device:
        sample_inputs = (replace(image, optional=True), *sample_inputs[1:])
        results = (*decoded[:2], latent, decoded[2])
    found = (
        ModelInterface(PREPROCESS_MODEL, IMAGE_INPUTS, (PIXELS,)),
        ModelInterface(CONDITION_MODEL, (PIXELS, *CONDITION_INPUTS, *SAMPLING_INPUTS), (image, *sampler, used_seed)),
        ModelInterface(ENCODE_MODEL, (image,), (*skips, context)),
        ModelInterface(SAMPLE_MODEL, sample_inputs, (*results, CANCEL_OUTPUT)),
        ModelInterface(DECODE_MODEL, (image, *skips, latent, SAMPLE_TIMINGS), decoded),
        ModelInterface(CLIP_MODEL, CLIP_INPUTS, CLIP_OUTPUTS),
        ModelInterface(STREAM_MODEL, STREAM_INPUTS, STREAM_OUTPUTS),
    )
    return {interface.name: interface for interface in found}


def engine_interface(name: str, stage: StageSpec, *, exact: bool = True) -> ModelInterface:
    """A stage as a model that one of Triton's backends runs, with the graph's own inputs and outputs."""
    inputs, outputs = (
        tuple(wire_tensor(tensor, exact=exact) for tensor in tensors) for tensors in (stage.inputs, stage.outputs)
    )
    return ModelInterface(name, inputs, outputs)
