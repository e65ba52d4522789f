"""Fakes for tests of the sampler: exact stages in NumPy, a manual clock, and a collector of results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.batching.jobs import Outcome, Sampled, SampleJob, Timings
from lfdm_export.batching.observer import Tick
from lfdm_export.sampling.loop import sample
from lfdm_export.sampling.noise import START, seeded_noise
from lfdm_export.sampling.tables import sampler_table
from lfdm_models.schedule import cosine_schedule
from tests import fake_bundle
from tests.fake_bundle import GEOMETRY, NULL, WIDTH

Float32 = NDArray[np.float32]
SHAPE = (3, GEOMETRY.frames, GEOMETRY.latent_size, GEOMETRY.latent_size)
SCHEDULE = cosine_schedule(fake_bundle.TRAINING_STEPS)


def make_job(
    seed: int = 0,
    *,
    sampler: str = "ddim",
    steps: int | None = 4,
    guidance_scale: float = 1.0,
    priority: int = 0,
    deadline: float | None = None,
    preview_every: int | None = None,
    progress_every: int | None = None,
    context: Float32 | None = None,
) -> SampleJob:
    """Return a job whose context and embedding depend on its seed."""
    random = np.random.default_rng(seed)
    side = GEOMETRY.latent_size
    return SampleJob(
        random.random((1, GEOMETRY.context_channels, side, side), np.float32) if context is None else context,
        random.random(WIDTH, np.float32),
        sampler_table(sampler, SCHEDULE, steps),
        guidance_scale,
        seed,
        priority,
        deadline,
        preview_every,
        progress_every,
    )


def expected_latent(job: SampleJob, on_step: Callable[[int, Float32, Float32], None] | None = None) -> Float32:
    """Compute the job's latent with the sampling loop of the library."""
    stages = NumpyStages()
    embedding = (NULL if job.guidance_scale == 0 else job.embedding)[None]
    guidance = [np.array([job.guidance_scale], np.float32)] if job.guided else []

    def step(
        noisy_latent: Float32,
        timestep: NDArray[np.int64],
        history: Float32,
        noise: Float32,
        coefficients: Float32,
    ) -> tuple[Float32, Float32]:
        inputs: list[NDArray[Any]] = [noisy_latent, job.context, embedding, timestep, *guidance, history, noise]
        next_latent, next_history = stages.run("step_guided" if job.guided else "step", *inputs, coefficients)
        return next_latent, next_history

    source = seeded_noise([job.seed], SHAPE)
    return sample(step, job.table, source(START), source, on_step=on_step)


@dataclass
class NumpyStages:
    """The fake bundle's steps, computed row by row, so that rows are independent.

    Attributes:
        before: called with stage and inputs before each run; may block or raise.
        runs: stage and number of rows of each run.
    """

    before: Callable[[str, tuple[NDArray[Any], ...]], None] | None = None
    runs: list[tuple[str, int]] = field(default_factory=list)

    def run(self, stage: str, *tensors: NDArray[Any]) -> tuple[Float32, ...]:
        self.runs.append((stage, len(tensors[0])))
        if self.before is not None:
            self.before(stage, tensors)
        latent, context, embedding, timestep, *guidance, history, noise, coefficients = tensors
        following, histories = [], []
        for row in range(len(latent)):
            one = slice(row, row + 1)
            scale = float(guidance[0][row]) if guidance else 1.0
            predicted = fake_bundle.predicted_noise(latent[one], context[one], embedding[one], timestep[one], scale)
            updated = fake_bundle.update(latent[one], predicted, history[one], noise[one], coefficients[one])
            following.append(updated[0])
            histories.append(updated[1])
        return np.concatenate(following), np.concatenate(histories)


class Clock:
    """Clock that only advances when set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Answers:
    """Collects results of jobs: `done` and `errors` by name, in `order`; previews and progress by name."""

    def __init__(self) -> None:
        self.done: dict[Any, Sampled] = {}
        self.errors: dict[Any, Exception] = {}
        self.order: list[Any] = []
        self.previews: dict[Any, list[tuple[int, Float32]]] = {}
        self.progress: dict[Any, list[int]] = {}
        self.threads: set[str] = set()
        self._lock = threading.Lock()

    def on_done(self, name: Any) -> Callable[[Sampled], None]:
        def called(sampled: Sampled) -> None:
            with self._lock:
                self.threads.add(threading.current_thread().name)
                self.order.append(name)
                self.done[name] = sampled

        return called

    def on_error(self, name: Any) -> Callable[[Exception], None]:
        def called(error: Exception) -> None:
            with self._lock:
                self.threads.add(threading.current_thread().name)
                self.order.append(name)
                self.errors[name] = error

        return called

    def on_preview(self, name: Any) -> Callable[[int, Float32], None]:
        return lambda step, estimate: self.previews.setdefault(name, []).append((step, estimate))

    def on_progress(self, name: Any) -> Callable[[int], None]:
        return lambda step: self.progress.setdefault(name, []).append(step)


class Events:
    """An observer that stores all events."""

    def __init__(self) -> None:
        self.rejections = 0
        self.joins: list[tuple[float, int]] = []
        self.ticks: list[Tick] = []
        self.ends: list[tuple[Outcome, Timings]] = []

    def rejected(self) -> None:
        self.rejections += 1

    def joined(self, queued: float, ticks: int) -> None:
        self.joins.append((queued, ticks))

    def ticked(self, tick: Tick) -> None:
        self.ticks.append(tick)

    def ended(self, outcome: Outcome, timings: Timings) -> None:
        self.ends.append((outcome, timings))
