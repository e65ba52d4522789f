"""Worker processes on this machine; a worker that dies is replaced, and its jobs are retried."""

from __future__ import annotations

import collections
import contextlib
import logging
import multiprocessing
import signal
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from lfdm_export.bulk.job import Job
from lfdm_export.bulk.maker import Maker, MakerSettings
from lfdm_export.bulk.records import Record, failed_record
from lfdm_export.errors import EngineError, LfdmExportError
from lfdm_export.wording import describe_error

logger = logging.getLogger(__name__)

Unit = Sequence[Job]
#: Workers that may die on the same jobs before these count as failed.
MOST_DEATHS = 2


def make_in_processes(settings: MakerSettings, units: Iterable[Unit], workers: int) -> Iterator[list[Record]]:
    """Run jobs in worker processes.

    Args:
        settings: settings of each worker.
        units: batches of jobs.
        workers: number of processes.

    Yields:
        The records of each unit, in order of completion.

    Raises:
        LfdmExportError: no worker can run: it dies at once, cannot load an engine, or cannot write a clip.
    """
    with contextlib.closing(_Team(settings, units)) as team:
        team.hire(workers)
        while team.at_work:
            yield from team.next_answers()


class _Team:
    """Workers, the unit of each, and the units left."""

    def __init__(self, settings: MakerSettings, units: Iterable[Unit]) -> None:
        self._settings = settings
        self._units = iter(units)
        self._again: list[Unit] = []
        self._deaths: collections.Counter[str] = collections.Counter()
        self._suspected: list[tuple[Unit, str]] = []
        self._answered = False
        self.at_work: dict[Connection, tuple[BaseProcess, Unit]] = {}

    def hire(self, workers: int) -> None:
        """Start up to `workers` workers, while units are left."""
        for _ in range(workers):
            unit = self._next_unit()
            if unit is not None:
                process, connection = _start(self._settings)
                self._send(process, connection, unit)

    def next_answers(self) -> Iterator[list[Record]]:
        """Wait until a worker is done or dead, and send it or its successor the next unit.

        Raises:
            LfdmExportError: no worker can run.
        """
        for connection in wait(list(self.at_work)):
            assert isinstance(connection, Connection)
            process, unit = self.at_work.pop(connection)
            try:
                answer = connection.recv()
            except (EOFError, OSError):
                connection.close()
                process.join()
                yield from self._after_death(process, unit)
                self.hire(1)
                continue
            if isinstance(answer, str):
                self.at_work[connection] = process, unit  # so that `close` ends it too
                raise LfdmExportError(answer)
            self._answered = True
            while self._suspected:
                yield from self._give_up(*self._suspected.pop())
            following = self._next_unit()
            if following is None:
                connection.close()  # signals that no unit is left
                process.join()
            else:
                self._send(process, connection, following)
            yield answer

    def close(self) -> None:
        """End every worker."""
        for connection, (process, _) in self.at_work.items():
            process.terminate()
            process.join()
            connection.close()

    def _next_unit(self) -> Unit | None:
        return self._again.pop() if self._again else next(self._units, None)

    def _send(self, process: BaseProcess, connection: Connection, unit: Unit) -> None:
        self.at_work[connection] = process, unit
        with contextlib.suppress(OSError):  # a dead worker is detected by `recv`
            connection.send(unit)

    def _after_death(self, process: BaseProcess, unit: Unit) -> Iterator[list[Record]]:
        """Retry a dead worker's jobs, or record them as failed."""
        code = process.exitcode or 0
        gone = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        logger.warning("a worker %s at %s", gone, ", ".join(job.id for job in unit[:3]))
        self._deaths[unit[0].id] += 1
        if self._deaths[unit[0].id] < MOST_DEATHS:
            self._again.append(unit)
        elif self._answered:
            yield from self._give_up(unit, gone)
        elif self.at_work and not self._suspected:  # an answer of another worker would show that the jobs are at fault
            self._suspected.append((unit, gone))
        else:
            raise EngineError(f"no worker does anything: each {gone}; try --workers 1, and look at its memory")

    def _give_up(self, unit: Unit, gone: str) -> Iterator[list[Record]]:
        """Make each of several jobs by itself, because one of them may be at fault; record a single one as failed."""
        if len(unit) > 1:
            self._again.extend((job,) for job in unit)
        else:
            sentence = f"{MOST_DEATHS} workers died at this row: the last one {gone}; it may need more memory"
            yield [failed_record(unit[0], self._settings.bundle_id, sentence)]


def _start(settings: MakerSettings) -> tuple[BaseProcess, Connection]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(settings, theirs), name="lfdm-bulk-worker", daemon=True)
    process.start()
    theirs.close()  # otherwise the worker's end would not be detected
    return process, ours


def _work(settings: MakerSettings, connection: Connection) -> None:
    """Run a worker: process units until the connection closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process handles Ctrl-C and ends this one
    maker = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            unit: Unit = connection.recv()
            answer: list[Record] | str
            try:
                maker = maker or Maker(settings)
                answer = maker.make(unit)
            except LfdmExportError as error:
                answer = describe_error(error)
            connection.send(answer)
