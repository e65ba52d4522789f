"""Tunes times, gains and noise of a sampler of few steps for a bundle, without changing its weights.

The few steps are compared with a long chain with noise of the same bundle, over the same images and labels: the mean of
the latents of each label, and their spread along principal directions. An evolution strategy (CMA-ES) minimizes both
distances; it needs no gradient, so any engine of the bundle works. Matching a long chain's latents one by one, as LD3
does, requires samplers without noise, and with those this family of models gives worse clips.

Source: Hansen, The CMA Evolution Strategy: A Tutorial (arXiv 1604.00772); for learned times Sabour et al., Align Your
    Steps (arXiv 2404.14507), and Tong et al., Learning to Discretize Denoising Diffusion ODEs (arXiv 2405.15506).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lfdm_export.evaluation.distance import frechet_distance
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.sampling.tuned import TunedSteps
from lfdm_models.schedule import Schedule

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
#: (table, slice of the conditions, index of the draw) -> latents (N, 3, T, h, w).
Sample = Callable[[SamplerTable, slice, int], Float32]

#: Side of the squares over which latents are averaged before comparison, in elements.
_POOL = 2
#: Number of principal directions whose spread is compared.
_DIRECTIONS = 16
#: Start of the search: times fall evenly between these shares of the schedule, most noise is fresh, and a gain enlarges
#: the first estimates, because the network's estimates at high noise are too small.
_FIRST, _LAST, _FRESH, _GAIN = 0.9, 0.166, 0.9, 1.5
#: Largest share of fresh noise at the start of a search; at 1 its logit is infinite.
_MOST_FRESH = 0.98
#: Standard deviation of the first candidates, in logits of times and noise and in logarithms of gains.
_SIGMA = 0.3


@dataclass(frozen=True)
class Search:
    """Options of the search.

    Attributes:
        clips: conditions per candidate; more are more exact and slower.
        generations: generations of the evolution strategy; each evaluates its candidates on other conditions.
        candidates: candidates per generation.
        seed: seed of the search and of all noise.
    """

    clips: int = 16
    generations: int = 8
    candidates: int = 10
    seed: int = 0


class Target:
    """Latents of the long chain, by condition; the target of the few steps.

    Args:
        latents: (N, 3, T, h, w) float32.
        groups: (N,), index of the label of each latent.
    """

    def __init__(self, latents: Float32, groups: NDArray[np.int64]) -> None:
        self._groups = groups
        channels = latents.transpose(1, 0, 2, 3, 4).reshape(latents.shape[1], -1)
        self._scale = np.maximum(channels.std(axis=1), 1e-6)[None, :, None, None, None]
        self._features = self._pooled(latents)
        self._mean = self._features.mean(axis=0)
        _, spread, directions = np.linalg.svd(self._features - self._mean, full_matrices=False)
        kept = min(_DIRECTIONS, len(latents) - 1)
        self._directions = directions[:kept].T
        self._variance = float((spread[:kept] ** 2).sum() / len(latents))

    def distance(self, latents: Float32, part: slice) -> float:
        """Return the distance of latents from the long chain's for the same conditions; 0 for equal latents."""
        found, wanted, groups = self._pooled(latents), self._features[part], self._groups[part]
        gaps = [
            np.square((found[groups == group] - wanted[groups == group]).mean(axis=0)).sum()
            for group in np.unique(groups)
        ]
        seen, expected = ((one - self._mean) @ self._directions for one in (found, wanted))
        spread = frechet_distance(seen - seen.mean(axis=0), expected - expected.mean(axis=0))
        return (float(np.mean(gaps)) + spread) / self._variance

    def _pooled(self, latents: Float32) -> Float64:
        batch, channels, frames, height, width = latents.shape
        rows, columns = height // _POOL, width // _POOL
        whole = (latents / self._scale)[..., : rows * _POOL, : columns * _POOL]
        squares = whole.reshape(batch, channels, frames, rows, _POOL, columns, _POOL)
        pooled: Float64 = squares.mean(axis=(4, 6), dtype=np.float64).reshape(batch, -1)
        return pooled


def tune(
    schedule: Schedule,
    steps: int,
    sample: Sample,
    target: Target,
    count: int,
    search: Search,
    progress: Callable[[int, int], None],
    start: TunedSteps | None = None,
) -> TunedSteps:
    """Search for the times, gains and noise of a chain of `steps` steps.

    Args:
        schedule: schedule of the model.
        steps: number of steps.
        sample: runs a table on a slice of the conditions; the same draw index gives the same noise.
        target: latents of the long chain for all conditions.
        count: number of conditions.
        search: options of the search.
        progress: called with the number of candidates done, and the total.
        start: the table from which the search starts; None for one of `steps` even times.
    """
    with warnings.catch_warnings():  # it warns that matplotlib, which is not used here, is missing
        warnings.simplefilter("ignore", UserWarning)
        import cma

    # Its own generator: given a seed, the library would seed NumPy's global state.
    draws = np.random.RandomState(search.seed + 1).randn
    options = {"randn": draws, "seed": math.nan, "verbose": -9, "popsize": search.candidates}
    strategy = cma.CMAEvolutionStrategy(
        _start(steps) if start is None else _encoded(start, schedule.steps), _SIGMA, options
    )
    clips, total = min(search.clips, count), search.generations * search.candidates
    for generation in range(search.generations):
        first = generation * clips % (count - clips + 1)
        part = slice(first, first + clips)
        candidates = strategy.ask()
        losses = []
        for number, candidate in enumerate(candidates):
            table = _decoded(candidate, schedule.steps).table(schedule)
            losses.append(target.distance(sample(table, part, generation), part))
            progress(generation * search.candidates + number + 1, total)
        strategy.tell(candidates, losses)
    return _decoded(strategy.result.xfavorite, schedule.steps)


def _start(steps: int) -> list[float]:
    times = np.linspace(_FIRST, _LAST, steps)
    falls = [_FIRST, *(times[1:] / times[:-1])]
    gains = np.linspace(math.log(_GAIN), 0.0, steps)
    return [*map(_logit, falls), *gains, *[_logit(_FRESH)] * (steps - 1)]


def _encoded(table: TunedSteps, training_steps: int) -> list[float]:
    """The numbers of a table; `_decoded` is the inverse."""
    before = (training_steps, *table.times)
    falls = [_logit(max(time, 0.5) / last) for time, last in zip(table.times, before, strict=False)]
    fresh = [_logit(min(max(share, 1 - _MOST_FRESH), _MOST_FRESH)) for share in table.fresh]
    return [*falls, *map(math.log, table.gains), *fresh]


def _decoded(numbers: Sequence[float] | Float64, training_steps: int) -> TunedSteps:
    """Convert unbounded numbers to time decrements, log gains and shares of fresh noise."""
    steps = (len(numbers) + 1) // 3
    falls, gains, fresh = np.split(np.asarray(numbers, np.float64), [steps, 2 * steps])
    times: list[int] = []
    time = float(training_steps)
    for index, fall in enumerate(falls):
        time *= _share(fall)
        times.append(min(max(round(time), steps - 1 - index), times[-1] - 1 if times else training_steps - 1))
    return TunedSteps(
        tuple(times), tuple(float(np.exp(np.clip(gain, -3, 3))) for gain in gains), tuple(map(_share, fresh))
    )


def _logit(share: float) -> float:
    return math.log(share / (1 - share))


def _share(number: float) -> float:
    return float(1 / (1 + np.exp(-np.clip(number, -30, 30))))
