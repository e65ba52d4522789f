"""Which job has which row of a batch. No arrays: `Rows` has them on the host, `DeviceRows` on a device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from lfdm_export.batching.jobs import Latent
from lfdm_export.batching.live_job import LiveJob


@dataclass(frozen=True)
class Ran:
    """Seconds of a step in the engine, 0 if unknown, and of drawing its noise (for new jobs also their start)."""

    engine: float
    noise: float


class Seating(ABC):
    """A batch of `step` or `step_guided`.

    The first rows are the ones in use; the row of a job that leaves goes to a new job, else to the job in the last row.
    """

    def __init__(self) -> None:
        """Start with empty rows."""
        #: The jobs in rows 0, 1, …
        self.jobs: list[LiveJob] = []

    def seat(self, jobs: Sequence[LiveJob]) -> None:
        """Give the rows to exactly these jobs; a job that leaves keeps its state, unless it has ended.

        Args:
            jobs: at most as many as slots, in any order; jobs that have a row keep it.
        """
        wanted = set(jobs)
        free = [row for row, job in enumerate(self.jobs) if job not in wanted]
        seated = set(self.jobs)
        coming = [job for job in jobs if job not in seated]
        if not free and not coming:
            return
        for row in free:
            if not self.jobs[row].ended:
                self._save(row)
        self._reserve(len(self.jobs) + max(0, len(coming) - len(free)))
        for job in coming:
            row = free.pop(0) if free else len(self.jobs)
            self._sit(job, row)
            if row < len(self.jobs):
                self.jobs[row] = job
            else:
                self.jobs.append(job)
        for row in reversed(free):  # from the back, so that the last row is never free itself
            last = len(self.jobs) - 1
            if row != last:
                self._copy(last, row)
                self.jobs[row] = self.jobs[last]
            self._empty(last)
            self.jobs.pop()

    @abstractmethod
    def step(self) -> Ran:
        """One step of every job in a row.

        Raises:
            Exception: what the stage raised; the rows are unchanged.
        """

    @abstractmethod
    def clear(self) -> None:
        """Empty all rows after a failed step, without saving any state."""

    @abstractmethod
    def finite(self) -> list[bool]:
        """Whether the latent is known to be finite, per job."""

    @abstractmethod
    def latent(self, row: int) -> Latent:
        """A copy of a row's latent."""

    @abstractmethod
    def estimate(self, row: int) -> Latent:
        """A copy of a row's newest x0 estimate."""

    @abstractmethod
    def _reserve(self, count: int) -> None:
        """Make `count` rows writable."""

    @abstractmethod
    def _save(self, row: int) -> None:
        """Keep the state of the job in a row."""

    @abstractmethod
    def _sit(self, live: LiveJob, row: int) -> None:
        """Fill a row with a new job, or with the kept state of one that had a row before."""

    @abstractmethod
    def _copy(self, source: int, target: int) -> None:
        """Copy a row."""

    @abstractmethod
    def _empty(self, row: int) -> None:
        """Empty a row that no job has any more."""
