"""The kernels of `kernel.cuh` and `noise.cuh` by storage type, and how they are launched."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from lfdm_export.ops.cuda.source import SHORT_NAMES, Kernel, Launch, Storage

#: Blocks that share one sample's update. Each finds the quantile for itself, so more of them save time in the update
#: only, which with 8 should be the smaller part (see kernel.cuh; not measured).
SPLITS = 8
#: Types of state (latents, history, noise) and of the prediction that go together.
STORAGES: tuple[tuple[Storage, Storage], ...] = (
    ("float32", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
)

_NOISE_THREADS, _NOISE_VALUES = 256, 4

Size = TypeVar("Size")


def step_kernel(state: Storage, predicted: Storage) -> Kernel:
    """ThresholdedStep(latent, predicted noise, history, noise, coefficients) into the next latent and history.

    Args:
        state: storage of latents, history and noise; coefficients are float32.
        predicted: storage of the predicted noise.
    """
    suffix = SHORT_NAMES[state] if state == predicted else f"{SHORT_NAMES[state]}_{SHORT_NAMES[predicted]}"
    name = f"lfdm_thresholded_step_{suffix}"
    definition = f"LFDM_STEP_KERNEL({name}, {state}, {predicted})"
    return Kernel(name, "thresholded_step/kernel.cuh", definition, 1024, (5, 2), 3)


def step_launch(elements: int, lower_rank: int, weight: float, batch: Size) -> Launch[Size]:
    """How a step kernel is launched.

    Args:
        elements: of one sample's latent.
        lower_rank: of the quantile's lower order statistic.
        weight: of its upper neighbour; handed over as its float32 bits, since a plugin passes integers only.
        batch: samples.
    """
    weight_bits = int(np.float32(weight).view(np.int32))
    return Launch((SPLITS, batch, 1), (elements, lower_rank, weight_bits))


def noise_kernel() -> Kernel:
    """Noise(seeds (B,) uint64, step (1,) int64) into (B, …) float32: the values of `sampling.noise.noise_for`."""
    name = "lfdm_noise"
    return Kernel(name, "thresholded_step/noise.cuh", f"LFDM_NOISE_KERNEL({name})", _NOISE_THREADS, (2, 1), 1)


def noise_launch(elements: int, batch: Size) -> Launch[Size]:
    """How the noise kernel is launched, for samples of that many elements."""
    blocks = -(-elements // (_NOISE_THREADS * _NOISE_VALUES))
    return Launch((blocks, batch, 1), (elements,))
