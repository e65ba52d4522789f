"""The rows of the batch of one stage on a device: a job's state stays there from its first step to its clip. No arrays.

An engine that fails at a step's end may report it one step late. A value that is not finite is found when the clip is
decoded: until then nothing of it is on the host.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Generic

import numpy as np

from lfdm_export.batching.jobs import Float32, Latent
from lfdm_export.batching.live_job import LiveJob
from lfdm_export.batching.seating import Ran, Seating
from lfdm_export.engines.device import A
from lfdm_export.engines.device_batch import DeviceLatent, DeviceSample, RowStep
from lfdm_export.engines.device_chain import DeviceChain, DeviceEncoded


class DeviceRows(Seating, Generic[A]):
    """A batch of `step` or `step_guided` whose memory is on a device."""

    def __init__(
        self,
        chain: DeviceChain[A],
        stage: str,
        null_embedding: Float32,
        slots: int,
        *,
        fixed_batch: bool = False,
    ) -> None:
        """Allocate memory for all slots, and prepare the stage.

        Args:
            chain: the stages on the device.
            stage: name of the stage.
            null_embedding: (text_width,) float32, for a guidance scale of 0.
            slots: maximum number of rows.
            fixed_batch: run all slots each time; unused rows hold zeros, and remain zero.

        Raises:
            EngineError: the stage cannot be prepared for that many rows.
        """
        super().__init__()
        self._chain, self._stage, self._null = chain, stage, null_embedding
        self._batch = chain.batch(stage, slots, fixed=fixed_batch)
        self._samples: weakref.WeakKeyDictionary[LiveJob, DeviceSample[A]] = weakref.WeakKeyDictionary()

    def seat(self, jobs: Sequence[LiveJob]) -> None:
        """Give the rows to exactly these jobs; see `Seating.seat`."""
        super().seat(jobs)
        if not self.jobs:
            self._batch.settle()

    def step(self) -> Ran:
        """One step of every job in a row; the time is that of the step before, and 0 if there was none."""
        rows = []
        for live in self.jobs:
            index = live.step_index
            rows.append(RowStep(self._samples[live], index, bool(live.job.table.draws_noise[index])))
        return Ran(self._batch.step(rows), 0.0)

    def clear(self) -> None:
        """Empty all rows after a failed step, without saving any state."""
        self.jobs.clear()
        self._batch.clear()

    def finite(self) -> list[bool]:
        """True for each job: the latent is checked where it is decoded."""
        return [True] * len(self.jobs)

    def latent(self, row: int) -> Latent:
        """A copy of a row's latent, on the device."""
        return self._batch.latent(row)

    def estimate(self, row: int) -> DeviceLatent[Any]:
        """A copy of a row's newest x0 estimate, on the device."""
        return self._batch.estimate(row)

    def _reserve(self, count: int) -> None:
        """All rows are always writable."""

    def _save(self, row: int) -> None:
        self.jobs[row].paused = self._batch.save(row)

    def _sit(self, live: LiveJob, row: int) -> None:
        if live not in self._samples:
            self._samples[live] = self._uploaded(live)
        if live.paused is None:
            self._batch.begin(row, self._samples[live])
        else:
            self._batch.resume(row, self._samples[live], live.paused)
            live.paused = None

    def _uploaded(self, live: LiveJob) -> DeviceSample[A]:
        job = live.job
        assert isinstance(job.context, DeviceEncoded), "the context is not on a device"
        inputs = {
            "text_embedding": (self._null if job.guidance_scale == 0.0 else job.embedding)[None],
            "guidance_scale": np.array([job.guidance_scale], np.float32),
        }
        return self._chain.sample(self._stage, job.context, inputs, job.seed, job.table)

    def _copy(self, source: int, target: int) -> None:
        self._batch.move(source, target)

    def _empty(self, row: int) -> None:
        self._batch.clear(row)
