"""The noise of a sampler: from seeds, or from draws that the caller passes. NumPy only.

A noise source is a callable: ``source(START)`` returns the latent that sampling starts from, ``source(i)``
the noise of step i, each float32 (B, 3, T, h, w).
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from lfdm_export.errors import InputError

Float32Array: TypeAlias = NDArray[np.float32]
NoiseSource: TypeAlias = Callable[[int], Float32Array]

#: The value of `step` for the start of a chain.
START = -1


def noise_for(seeds: Sequence[int], step: int, shape: Sequence[int]) -> Float32Array:
    """Standard normal noise that depends only on the seed of each sample, the step and the element.

    The recipe lets other programs (a GPU kernel) draw the same values. For seed s, step i
    (START is -1) and element e, in C order over the shape of one sample:

    1. Philox4x64-10 with key (s, 0). Block j, with counter (j + 1, 0, i + 1, 0), gives the 64-bit words
       4j … 4j+3, in the order of the words of the counter. In NumPy these are the words of
       ``Philox(key=s, counter=[0, 0, i + 1, 0]).random_raw(n)``.
    2. A word w becomes the uniform u = ((w >> 12) + 0.5) * 2^-52, exact in float64, in (0, 1).
    3. Box-Muller on the words of each pair, u from word 2k and v from word 2k+1, in float64:
       r = sqrt(-2 log(u)), angle = (2 pi) * v; element 2k is r cos(angle), element 2k+1 r sin(angle).
    4. Round to float32. For an odd number of elements the last sine is dropped.

    The words are the same everywhere. Math libraries may differ in the last bits of a float64 logarithm or
    cosine; after rounding this changes about one element in 10^8, by one float32 ulp.

    Args:
        seeds: one per sample, each in 0 … 2^64-1.
        step: index in the chain, from 0; or START.
        shape: shape of one sample.

    Returns:
        (B, *shape), in the order of `seeds`.

    Raises:
        InputError: a seed is not an integer or out of range.

    Source: Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3 (Philox); Box and Muller, 1958.
    """
    noise = np.empty((len(seeds), *shape), np.float32)
    for sample, seed in zip(noise, check_seeds(seeds), strict=True):
        pairs = (sample.size + 1) // 2
        words = np.random.Philox(key=seed, counter=[0, 0, step + 1, 0]).random_raw(2 * pairs)
        uniforms = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        radius = np.sqrt(-2.0 * np.log(uniforms[0::2]))
        angle = (2.0 * np.pi) * uniforms[1::2]
        values = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
        sample[...] = values.ravel()[: sample.size].reshape(sample.shape)
    return noise


def seeded_noise(seeds: Sequence[int], shape: Sequence[int]) -> NoiseSource:
    """A source that draws `noise_for` these seeds; `shape` is the shape of one sample.

    Raises:
        InputError: a seed is not an integer or out of range.
    """
    checked = check_seeds(seeds)
    return lambda step: noise_for(checked, step, shape)


def handed_noise(draws: Iterable[Float32Array], shape: Sequence[int]) -> NoiseSource:
    """A source that returns the draws of the caller in order.

    Args:
        draws: float32 arrays: the start, then one per step that draws noise.
        shape: (B, 3, T, h, w), required of each draw.

    Returns:
        A source that raises InputError when the draws run out, or a draw has another dtype or shape or is not finite.
    """
    stream = iter(draws)
    expected = f"float32 {tuple(shape)}"

    def source(step: int) -> Float32Array:
        what = "start" if step == START else f"noise of step {step}"
        draw = next(stream, None)
        if draw is None:
            raise InputError(
                f"noise: the draws ended before the {what}; hand in the start and one for each step that draws noise"
            )
        if not isinstance(draw, np.ndarray) or draw.dtype != np.float32 or draw.shape != tuple(shape):
            found = f"{draw.dtype} {draw.shape}" if isinstance(draw, np.ndarray) else type(draw).__name__
            raise InputError(
                f"noise: the draw for the {what} is {found}, expected {expected}; hand in arrays like that"
            )
        if not np.isfinite(draw).all():
            raise InputError(f"noise: the draw for the {what} holds values that are not finite; hand in finite ones")
        return draw

    return source


def draw_seed() -> int:
    """Draw a seed for a clip without one: 32 bits, which people can type and every interface accepts."""
    return secrets.randbits(32)


def check_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """Return the seeds as plain integers.

    Raises:
        InputError: a seed is not an integer or out of range.
    """
    checked = []
    for seed in seeds:
        try:
            value = operator.index(seed)
        except TypeError:
            raise InputError(f"seed: found {seed!r}, expected an integer; pass one per sample") from None
        if not 0 <= value < 2**64:
            raise InputError(f"seed: found {value}, expected 0 to 2^64 - 1; choose one in that range")
        checked.append(value)
    return tuple(checked)
