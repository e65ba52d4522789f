"""ThresholdedStep and its noise on GPU tensors: torch operators around the kernels."""
# An operator's shape function takes the same arguments as the operator.
# ruff: noqa: ARG001

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lfdm_export.ops.cuda.launcher import STORAGES, dense, launch
from lfdm_export.ops.thresholded_step import kernels
from lfdm_export.sampling.loop import quantile_rank


def thresholded_step_on_gpu(
    latent: Tensor, predicted_noise: Tensor, history: Tensor, noise: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.thresholded_step` on a GPU; the predicted noise may have a narrower dtype than the others."""
    results: tuple[Tensor, Tensor] = _step(latent, predicted_noise, history, noise, coefficients)
    return results


def noise_on_gpu(seeds: Tensor, steps: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise, generated on the GPU: the same values as `lfdm_export.sampling.noise.noise_for`.

    The steps are in the GPU's memory, so that a captured graph can be replayed for every step.

    Args:
        seeds: (B,) int64 with the bits of the unsigned seeds.
        steps: (B,) int64, from 0; -1 for the start of a chain; (1,) is the step of all samples.
        shape: shape of one sample.

    Returns:
        (B, *shape) float32.
    """
    noise: Tensor = _noise(seeds, steps.expand(len(seeds)), list(shape))
    return noise


@torch.library.custom_op(
    "lfdm::thresholded_step",
    mutates_args=(),
    schema="(Tensor latent, Tensor predicted_noise, Tensor history, Tensor noise, Tensor coefficients) "
    "-> (Tensor, Tensor)",
)
def _step(
    latent: Tensor, predicted_noise: Tensor, history: Tensor, noise: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    state = latent.dtype
    inputs = [
        dense(latent),
        dense(predicted_noise),
        dense(history.to(state)),
        dense(noise.to(state)),
        dense(coefficients.to(torch.float32)),
    ]
    elements, batch = math.prod(latent.shape[1:]), len(latent)
    lower, weight = quantile_rank(elements)
    results: tuple[Tensor, Tensor] = _step_results(*inputs)
    storages = STORAGES[state], STORAGES[predicted_noise.dtype]
    if batch >= kernels.ONE_KERNEL_FROM:
        alone = kernels.step_launch(elements, lower, float(weight), batch)
        launch(kernels.step_kernel(*storages), alone, inputs, results)
        return results
    # Bits of uint32, a type for which torch has few operators.
    counts = latent.new_zeros((batch, kernels.COUNTS), dtype=torch.int32)
    counted, plan = [inputs[0], inputs[1], inputs[4]], kernels.count_launch(elements, lower, batch)
    for number in range(kernels.PASSES):
        launch(kernels.count_kernel(*storages, number), plan, counted, [counts])
    update = kernels.update_launch(elements, lower, float(weight), batch)
    launch(kernels.update_kernel(*storages), update, [*inputs, counts], results)
    return results


@_step.register_fake
def _step_results(
    latent: Tensor, predicted_noise: Tensor, history: Tensor, noise: Tensor, coefficients: Tensor
) -> tuple[Tensor, Tensor]:
    return latent.new_empty(latent.shape), latent.new_empty(history.shape)


@torch.library.custom_op("lfdm::noise", mutates_args=(), schema="(Tensor seeds, Tensor steps, int[] shape) -> Tensor")
def _noise(seeds: Tensor, steps: Tensor, shape: list[int]) -> Tensor:
    result: Tensor = _noise_result(seeds, steps, shape)
    elements = math.prod(shape)
    launch(kernels.noise_kernel(), kernels.noise_launch(elements, len(seeds)), [dense(seeds), dense(steps)], [result])
    return result


@_noise.register_fake
def _noise_result(seeds: Tensor, steps: Tensor, shape: list[int]) -> Tensor:
    return seeds.new_empty((seeds.shape[0], *shape), dtype=torch.float32)
