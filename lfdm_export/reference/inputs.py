"""The inputs for comparing stages, drawn from a seed. NumPy only, so that any program can draw them again.

They resemble a stage's real inputs: smooth pictures and motions, and latents with the noise of their timestep, with one
half of the batch early and one half late in the schedule. Each tensor has its own generator,
``default_rng([seed, crc32(name)])``, so that none depends on the others.

Encoder outputs and tokens cannot be drawn; a `Reference` stores them.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.manifest import dm_sha256_of
from lfdm_export.pictures.preprocess import to_float
from lfdm_export.sampling.options import AS_TRAINED, SamplingOptions
from lfdm_export.sampling.rows import X0_FROM_LATENT, X0_FROM_PREDICTED_NOISE, SamplerTable
from lfdm_export.sampling.tuned import FEW_STEPS, TunedSampler
from lfdm_export.stages import COEFFICIENTS, Geometry
from lfdm_export.wording import count
from lfdm_models.config import LfdmConfig
from lfdm_models.schedule import Schedule, cosine_schedule

Float32: TypeAlias = NDArray[np.float32]
UInt8: TypeAlias = NDArray[np.uint8]

#: Samples of every drawn tensor.
BATCH_SIZE = 2
#: The stage inputs that `draw_inputs` returns.
DRAWN = (
    "coefficients", "driving", "guidance_scale", "history", "image", "latent", "noise", "noisy_latent",
    "text_embedding", "timestep",
)  # fmt: skip
#: The chain's sampling options; the number of steps is the sampler's default.
CHAIN_OPTIONS = SamplingOptions("ddim", eta=1.0, guidance_scale=AS_TRAINED)

# Range of each sample's timestep, as shares of the training steps.
_TIMES = ((0.02, 0.3), (0.5, 0.9))
# Range of each sample's guidance scale.
_GUIDANCE = ((0.0, 1.0), (1.0, 5.0))
# The largest displacement of a drawn motion, in half widths of the image: part of it leads out of the image.
_MOTION = 0.3


def draw_inputs(config: LfdmConfig, geometry: Geometry, seed: int) -> dict[str, NDArray[Any]]:
    """Every stage input that can be drawn, by tensor name, with BATCH_SIZE samples each.

    Args:
        config: architecture of the networks.
        geometry: sizes of the stages.
        seed: seed of all inputs.
    """
    g, schedule = geometry, cosine_schedule(config.dm.training_steps)
    latent_shape = (BATCH_SIZE, 3, g.frames, g.latent_size, g.latent_size)
    image = to_float(draw_pictures(_generator(seed, "image"), BATCH_SIZE, g.image_size))
    timestep = _timesteps(_generator(seed, "timestep"), schedule.steps)
    normal = {
        name: _generator(seed, name).standard_normal(shape, np.float32)
        for name, shape in {
            "text_embedding": (BATCH_SIZE, g.text_width),
            "noise": latent_shape,
            "history": (BATCH_SIZE, 2, *latent_shape[1:]),
        }.items()
    }
    return {
        "image": image,
        "driving": _moved(image, _generator(seed, "driving")),
        "latent": _motion(_generator(seed, "latent"), g.chunk_frames, g.latent_size, config.residual_flow),
        "noisy_latent": _noisy_latent(config, g, schedule, timestep, _generator(seed, "noisy_latent")),
        "timestep": timestep,
        "guidance_scale": _between(_generator(seed, "guidance_scale"), _GUIDANCE).astype(np.float32),
        "coefficients": _coefficients(_generator(seed, "coefficients"), schedule, timestep),
        **normal,
    }


def draw_pictures(rng: np.random.Generator, count: int, size: int) -> UInt8:
    """Smooth colored pictures with some texture, (count, size, size, 3) uint8."""
    shape = (count, 3, size, size)
    picture = 0.75 * _smooth(rng, shape, 4) + 0.2 * _smooth(rng, shape, 12) + 0.05 * _smooth(rng, shape, 40)
    pictures: UInt8 = (picture.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    return pictures


def chain_conditions(labels: Sequence[Float32], geometry: Geometry, seed: int) -> tuple[UInt8, Float32]:
    """Picture (H, W, 3) uint8 and text embedding (text_width,) of the chain: of the first label, if any."""
    picture = draw_pictures(_generator(seed, "chain_image"), 1, geometry.image_size)[0]
    if len(labels):
        return picture, np.array(labels[0], np.float32)
    return picture, _generator(seed, "chain_embedding").standard_normal(geometry.text_width, np.float32)


def chain_table(schedule: Schedule, provenance: Mapping[str, object]) -> SamplerTable:
    """The steps of the chain: DDIM as in the released program, 10 of them on an ordinary schedule.

    Of a distilled DM, the steps that it was distilled for: it predicts nothing useful at other times.

    Args:
        schedule: the schedule of the model.
        provenance: of the model.

    Raises:
        InputError: the provenance's steps are wrong.
    """
    distilled = TunedSampler.of_distilled(provenance, dm_sha256_of(provenance))
    if distilled is None:
        return CHAIN_OPTIONS.table(schedule)
    return distilled.table(schedule, distilled.tables[0].steps)


def chain_words(provenance: Mapping[str, object], steps: int) -> str:
    """The sampler of the chain, in words."""
    if FEW_STEPS in provenance:
        return f"as distilled, {count(steps, 'step')}"
    chain = CHAIN_OPTIONS
    return f"{chain.sampler}, {steps} steps, eta {chain.eta:g}, guidance {chain.scale:g}"


def _generator(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def _between(rng: np.random.Generator, ranges: Sequence[tuple[float, float]]) -> NDArray[np.float64]:
    low, high = np.transpose(ranges)
    drawn: NDArray[np.float64] = low + (high - low) * rng.random(len(ranges))
    return drawn


def _timesteps(rng: np.random.Generator, training_steps: int) -> NDArray[np.int64]:
    return (_between(rng, _TIMES) * training_steps).astype(np.int64)


def _smooth(rng: np.random.Generator, shape: tuple[int, ...], cells: int) -> Float32:
    """Values in [0, 1] that vary smoothly over the last two axes: random nodes, interpolated linearly."""
    height, width = shape[-2:]
    nodes = rng.random((*shape[:-2], cells + 1, cells + 1), np.float32)
    rows = _interpolate(nodes, height, axis=-2)
    return _interpolate(rows, width, axis=-1)


def _interpolate(nodes: Float32, size: int, axis: int) -> Float32:
    cells = nodes.shape[axis] - 1
    position = (np.arange(size) + 0.5) * cells / size
    before = position.astype(np.intp)
    weight = (position - before).astype(np.float32)
    if axis == -2:
        weight = weight[:, None]
    # Sums and products of float32, one at a time: the same bits on every machine.
    values: Float32 = np.take(nodes, before, axis) * (1 - weight) + np.take(nodes, before + 1, axis) * weight
    return values


def _moved(image: Float32, rng: np.random.Generator) -> Float32:
    """The image shifted by a few pixels and a little darker, like another frame of a clip."""
    size = image.shape[-1]
    shift = rng.integers(1, max(2, size // 16), 2)
    return np.ascontiguousarray(np.roll(image, shift, axis=(2, 3)) * np.float32(0.9))


def _motion(rng: np.random.Generator, frames: int, size: int, residual_flow: bool) -> Float32:
    """Latents (BATCH_SIZE, 3, frames, size, size): a smooth displacement of the identity, and smooth occlusion."""
    fields = 2 * _smooth(rng, (BATCH_SIZE, 3, frames, size, size), 3) - 1
    fields[:, :2] *= np.float32(_MOTION)
    if not residual_flow:
        line = (2 * np.arange(size) / max(size - 1, 1) - 1).astype(np.float32)
        fields[:, 0] += line
        fields[:, 1] += line[:, None]
    return fields


def _noisy_latent(
    config: LfdmConfig, g: Geometry, schedule: Schedule, timestep: NDArray[np.int64], rng: np.random.Generator
) -> Float32:
    """Motions with the noise level of their timesteps."""
    motion = _motion(rng, g.frames, g.latent_size, config.residual_flow)
    signal = schedule.sqrt_alphas_cumprod[timestep].reshape(-1, 1, 1, 1, 1)
    level = schedule.sqrt_one_minus_alphas_cumprod[timestep].reshape(-1, 1, 1, 1, 1)
    return signal * motion + level * rng.standard_normal(motion.shape, np.float32)


def _coefficients(rng: np.random.Generator, schedule: Schedule, timestep: NDArray[np.int64]) -> Float32:
    """Coefficients of the schedule for the x0 estimate, random values elsewhere, so that every column matters."""
    rows = 2 * rng.random((BATCH_SIZE, COEFFICIENTS), np.float32) - 1
    rows[:, X0_FROM_LATENT] = schedule.sqrt_recip_alphas_cumprod[timestep]
    rows[:, X0_FROM_PREDICTED_NOISE] = -schedule.sqrt_recipm1_alphas_cumprod[timestep]
    return rows
