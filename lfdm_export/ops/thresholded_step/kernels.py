"""The kernels of `kernel.cuh`, `passes.cuh` and `noise.cuh` by storage type, and their launches."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from lfdm_export.ops.cuda.source import SHORT_NAMES, Kernel, Launch, Storage

#: Blocks per sample where one kernel computes the whole step. Each block finds the quantile itself, so more blocks save
#: time only in the update, which with 8 should be the smaller part (see kernel.cuh).
SPLITS = 8
#: Samples from which one kernel is faster than the passes: at 1, 8 and 32 samples of the published size it took 55.5,
#: 56.3 and 135.2 us, the passes 26.8, 41.0 and 146.9 us (NVIDIA H200; benchmarks/results/gpu/2026-11-27-h200-c).
ONE_KERNEL_FROM = 32
#: Supported pairs of types: state (latents, history, noise), and prediction.
STORAGES: tuple[tuple[Storage, Storage], ...] = (
    ("float32", "float32"),
    ("float32", "float16"),
    ("float32", "bfloat16"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
)

#: Counting passes, and uint32 counts per sample: 3 · 2048 bins and four values.
PASSES, COUNTS = 3, 3 * 2048 + 4

# As in the kernel files.
_STEP_THREADS, _STEP_VALUES = 1024, 4
_NOISE_THREADS, _NOISE_VALUES = 256, 4

Size = TypeVar("Size")


def step_kernel(state: Storage, predicted: Storage) -> Kernel:
    """ThresholdedStep(latent, predicted noise, history, noise, coefficients) into the next latent and history.

    Args:
        state: storage of latents, history and noise; coefficients are float32.
        predicted: storage of the predicted noise.
    """
    name = f"lfdm_thresholded_step_{_suffix(state, predicted)}"
    definition = f"LFDM_STEP_KERNEL({name}, {state}, {predicted})"
    return Kernel(name, "thresholded_step/kernel.cuh", definition, _STEP_THREADS, (5, 2), 3)


def count_kernel(state: Storage, predicted: Storage, number: int) -> Kernel:
    """Latent, predicted noise and coefficients into counts (B, `COUNTS`) uint32, which must be 0 before the first pass.

    Args:
        state: storage of the latents.
        predicted: storage of the predicted noise.
        number: index of the pass, below `PASSES`.
    """
    name = f"lfdm_step_count_{number}_{_suffix(state, predicted)}"
    definition = f"LFDM_STEP_COUNT_KERNEL({name}, {state}, {predicted}, {number})"
    return Kernel(name, "thresholded_step/passes.cuh", definition, _STEP_THREADS, (3, 1), 2)


def update_kernel(state: Storage, predicted: Storage) -> Kernel:
    """The inputs of `step_kernel`, followed by the counts of all passes, into the next latent and history."""
    name = f"lfdm_step_update_{_suffix(state, predicted)}"
    definition = f"LFDM_STEP_UPDATE_KERNEL({name}, {state}, {predicted})"
    return Kernel(name, "thresholded_step/passes.cuh", definition, _STEP_THREADS, (6, 2), 3)


def count_launch(elements: int, lower_rank: int, batch: Size) -> Launch[Size]:
    """The launch of a counting pass; arguments as in `step_launch`."""
    return Launch((_shares(elements), batch, 1), (elements, lower_rank))


def update_launch(elements: int, lower_rank: int, weight: float, batch: Size) -> Launch[Size]:
    """The launch of the kernel after the passes; arguments as in `step_launch`."""
    scalars = step_launch(elements, lower_rank, weight, batch).scalars
    return Launch((_shares(elements), batch, 1), scalars)


def step_launch(elements: int, lower_rank: int, weight: float, batch: Size) -> Launch[Size]:
    """The launch of a step kernel.

    Args:
        elements: elements of one sample's latent.
        lower_rank: rank of the quantile's lower order statistic.
        weight: weight of its upper neighbor; passed as its float32 bits, because a plugin passes integers only.
        batch: number of samples.
    """
    weight_bits = int(np.float32(weight).view(np.int32))
    return Launch((SPLITS, batch, 1), (elements, lower_rank, weight_bits))


def noise_kernel() -> Kernel:
    """Noise(seeds (B,) uint64, steps (B,) int64) into (B, …) float32: the values of `sampling.noise.noise_for`."""
    name = "lfdm_noise"
    return Kernel(name, "thresholded_step/noise.cuh", f"LFDM_NOISE_KERNEL({name})", _NOISE_THREADS, (2, 1), 1)


def noise_launch(elements: int, batch: Size) -> Launch[Size]:
    """The launch of the noise kernel, for samples of that many elements."""
    blocks = -(-elements // (_NOISE_THREADS * _NOISE_VALUES))
    return Launch((blocks, batch, 1), (elements,))


def _suffix(state: Storage, predicted: Storage) -> str:
    return SHORT_NAMES[state] if state == predicted else f"{SHORT_NAMES[state]}_{SHORT_NAMES[predicted]}"


def _shares(elements: int) -> int:
    """Blocks per sample, so that each thread has one pack of values."""
    return -(-elements // (_STEP_THREADS * _STEP_VALUES))
