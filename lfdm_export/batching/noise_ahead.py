"""Noise drawn while the engine runs. NumPy only.

A draw takes 0.6 ms for the small model and 16 times as long for the published size, per sample and per step that
draws noise: negligible compared with a step on a CPU, but as long as the step itself on a GPU.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from lfdm_export.batching.jobs import Float32
from lfdm_export.machine import available_cores
from lfdm_export.sampling.noise import noise_for

_MOST_THREADS = 4


class NoiseAhead:
    """Draws for the jobs of one sampler, each equal to `noise_for`, some of them started early."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Start with no draws.

        Args:
            shape: (3, T, h, w), the shape of one sample.
        """
        self._shape = shape
        threads = max(1, min(_MOST_THREADS, available_cores() - 1))
        self._pool = ThreadPoolExecutor(threads, "lfdm-noise")

    def begin(self, seed: int, step: int) -> Future[Float32]:
        """Start the draw (3, T, h, w) of a step."""
        return self._pool.submit(self.draw, seed, step)

    def draw(self, seed: int, step: int) -> Float32:
        """Return the draw (3, T, h, w) of a step now."""
        drawn: Float32 = noise_for((seed,), step, self._shape)[0]
        return drawn

    def close(self) -> None:
        """Start no more draws and drop those that wait."""
        self._pool.shutdown(cancel_futures=True)
