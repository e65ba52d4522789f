"""The rows of the batch of one stage in arrays of the host, and one step of all jobs. NumPy only."""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from lfdm_export.batching.jobs import Float32
from lfdm_export.batching.live_job import LiveJob
from lfdm_export.batching.noise_ahead import NoiseAhead
from lfdm_export.batching.seating import Ran, Seating
from lfdm_export.sampling.noise import START
from lfdm_export.stages import COEFFICIENTS, Geometry


class Stages(Protocol):
    """What runs stages, such as `lfdm_export.generate.stage_runner.StageRunner`."""

    def run(self, stage: str, *tensors: NDArray[np.generic]) -> tuple[Float32, ...]:
        """Run one stage on its inputs, in the order of its `StageSpec`; it never writes to its outputs again."""


class Rows(Seating):
    """A batch of `step` or `step_guided`.

    Constant inputs of a job are written when it joins. Latent and history are the engine's own outputs of the step
    before, passed back unchanged: rows are copied only when a job joins or leaves.
    """

    def __init__(
        self,
        stages: Stages,
        stage: str,
        geometry: Geometry,
        null_embedding: Float32,
        slots: int,
        noise: NoiseAhead,
        *,
        guided: bool,
        fixed_batch: bool,
    ) -> None:
        """Allocate memory for all slots.

        Args:
            stages: runs the stages.
            stage: name of the stage.
            geometry: gives the shapes.
            null_embedding: (text_width,) float32, for a guidance scale of 0.
            slots: maximum number of rows.
            noise: draws the noise.
            guided: whether the stage has a guidance scale as input.
            fixed_batch: run all slots each time; unused rows hold zeros, and remain zero.
        """
        super().__init__()
        self._stages, self._stage, self._null, self._ahead = stages, stage, null_embedding, noise
        self._guided, self._fixed, self._slots = guided, fixed_batch, slots
        side = geometry.latent_size
        self._shape = (3, geometry.frames, side, side)
        self._latent_home = np.zeros((slots, *self._shape), np.float32)
        self._history_home = np.zeros((slots, 2, *self._shape), np.float32)
        self._latent, self._history = self._latent_home, self._history_home
        self._context = np.zeros((slots, geometry.context_channels, side, side), np.float32)
        self._embedding = np.zeros((slots, geometry.text_width), np.float32)
        self._guidance = np.zeros(slots, np.float32)
        self._timestep = np.zeros(slots, np.int64)
        self._noise = np.zeros((slots, *self._shape), np.float32)
        self._coefficients = np.zeros((slots, COEFFICIENTS), np.float32)
        self._drawing = 0.0

    def step(self) -> Ran:
        """One step of every job in a row.

        Raises:
            Exception: what the stage raised; the rows are unchanged.
        """
        for row, live in enumerate(self.jobs):
            table = live.job.table
            index = live.step_index
            self._timestep[row], self._coefficients[row] = table.timesteps[index], table.coefficients[index]
            if table.draws_noise[index]:
                self._noise[row] = self._draw(live, index)
            elif index and table.draws_noise[index - 1]:
                self._noise[row] = 0
            draws_next = live.steps_left > 1 and table.draws_noise[index + 1]
            live.next_noise = self._ahead.begin(live.job.seed, index + 1) if draws_next else None
        used = slice(self._slots if self._fixed else len(self.jobs))
        started = time.perf_counter()
        outputs = self._stages.run(
            self._stage,
            self._latent[used],
            self._context[used],
            self._embedding[used],
            self._timestep[used],
            *([self._guidance[used]] if self._guided else []),
            self._history[used],
            self._noise[used],
            self._coefficients[used],
        )
        self._latent, self._history = outputs
        ran = Ran(time.perf_counter() - started, self._drawing)
        self._drawing = 0.0
        return ran

    def clear(self) -> None:
        """Empty all rows after a failed step, without saving any state."""
        self.jobs.clear()
        self._latent, self._history = self._latent_home, self._history_home
        for array in self._arrays():
            array[:] = 0

    def finite(self) -> list[bool]:
        """Whether the latent is finite, per job."""
        count = len(self.jobs)
        flat = self._latent[:count].reshape(count, -1)
        return [bool(finite) for finite in np.all(np.isfinite(flat), axis=1)]

    def latent(self, row: int) -> Float32:
        """A copy (1, 3, T, h, w) of a row's latent."""
        return self._latent[row : row + 1].copy()

    def estimate(self, row: int) -> Float32:
        """A copy (1, 3, T, h, w) of a row's newest x0 estimate."""
        return self._history[row : row + 1, 1].copy()

    def _draw(self, live: LiveJob, step: int) -> Float32:
        """The noise of a job's next step, or its start."""
        started = time.perf_counter()
        if live.next_noise is not None and step != START:
            drawn = live.next_noise.result()
        else:
            drawn = self._ahead.draw(live.job.seed, step)
        self._drawing += time.perf_counter() - started
        return drawn

    def _reserve(self, count: int) -> None:
        """Make the state writable, with enough rows: engine outputs have as many rows as the inputs."""
        needed = max(count, self._slots if self._fixed else 0)
        if not (self._latent.flags.writeable and self._history.flags.writeable and len(self._latent) >= needed):
            rows = len(self.jobs)
            self._latent_home[:rows], self._history_home[:rows] = self._latent[:rows], self._history[:rows]
            self._latent, self._history = self._latent_home, self._history_home

    def _save(self, row: int) -> None:
        job = self.jobs[row]
        job.latent, job.history = self._latent[row].copy(), self._history[row].copy()

    def _sit(self, live: LiveJob, row: int) -> None:
        job = live.job
        assert isinstance(job.context, np.ndarray), "the context is on a device"
        if live.latent is not None and live.history is not None:
            self._latent[row], self._history[row] = live.latent, live.history
        else:
            self._latent[row], self._history[row] = self._draw(live, START), 0
        live.latent = live.history = None
        self._context[row] = job.context[0]
        self._embedding[row] = self._null if job.guidance_scale == 0.0 else job.embedding
        self._guidance[row] = job.guidance_scale
        self._noise[row] = 0

    def _copy(self, source: int, target: int) -> None:
        for array in self._arrays():
            array[target] = array[source]

    def _empty(self, row: int) -> None:
        if self._fixed:  # with coefficients of 0 a row of zeros gives zeros
            for array in self._arrays():
                array[row] = 0

    def _arrays(self) -> tuple[NDArray[Any], ...]:
        """All arrays with one row per job."""
        return (
            self._latent,
            self._history,
            self._context,
            self._embedding,
            self._guidance,
            self._noise,
            self._timestep,
            self._coefficients,
        )
