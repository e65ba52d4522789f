"""Processes of this machine that make clips side by side; one that dies is replaced, and its jobs are tried again."""

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
#: Workers that may die at the same jobs before these are given up.
MOST_DEATHS = 2


def make_in_processes(settings: MakerSettings, units: Iterable[Unit], workers: int) -> Iterator[list[Record]]:
    """Make jobs in processes of their own.

    Args:
        settings: of each worker.
        units: jobs that are made together.
        workers: how many processes.

    Yields:
        The records of each unit, in the order in which they end.

    Raises:
        LfdmExportError: no worker can do anything: they die at once, engines cannot be loaded, clips not be written.
    """
    with contextlib.closing(_Team(settings, units)) as team:
        team.hire(workers)
        while team.at_work:
            yield from team.next_answers()


class _Team:
    """Workers, what each is at, and what is left."""

    def __init__(self, settings: MakerSettings, units: Iterable[Unit]) -> None:
        self._settings = settings
        self._units = iter(units)
        self._again: list[Unit] = []
        self._deaths: collections.Counter[str] = collections.Counter()
        self._suspected: list[tuple[Unit, str]] = []
        self._answered = False
        self.at_work: dict[Connection, tuple[BaseProcess, Unit]] = {}

    def hire(self, workers: int) -> None:
        """Start workers, as long as there is something for them."""
        for _ in range(workers):
            unit = self._next_unit()
            if unit is not None:
                process, connection = _start(self._settings)
                self._send(process, connection, unit)

    def next_answers(self) -> Iterator[list[Record]]:
        """Wait until a worker is done, or dead, and give the next one its work.

        Raises:
            LfdmExportError: see `make_in_processes`.
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
                self.at_work[connection] = process, unit  # ended with the others
                raise LfdmExportError(answer)
            self._answered = True
            while self._suspected:
                yield from self._give_up(*self._suspected.pop())
            following = self._next_unit()
            if following is None:
                connection.close()  # which tells it that nothing is left
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
        with contextlib.suppress(OSError):  # a worker that is dead already: `recv` tells
            connection.send(unit)

    def _after_death(self, process: BaseProcess, unit: Unit) -> Iterator[list[Record]]:
        """Try a dead worker's jobs again, or give them up."""
        code = process.exitcode or 0
        gone = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        logger.warning("a worker %s at %s", gone, ", ".join(job.id for job in unit[:3]))
        self._deaths[unit[0].id] += 1
        if self._deaths[unit[0].id] < MOST_DEATHS:
            self._again.append(unit)
        elif self._answered:
            yield from self._give_up(unit, gone)
        elif (
            self.at_work and not self._suspected
        ):  # the first answer of another worker shows that the jobs are at fault
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
    theirs.close()  # else its end would not show
    return process, ours


def _work(settings: MakerSettings, connection: Connection) -> None:
    """A worker: makes what it is sent, until nobody sends any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started it, which ends this one
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
