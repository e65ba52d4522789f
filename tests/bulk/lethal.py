"""A worker that dies on some rows; in its own module, because a new process must import it."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection

from lfdm_export.bulk.maker import Maker, MakerSettings

#: Prefix of the IDs of rows that kill their worker.
LETHAL = "lethal"


def work(settings: MakerSettings, connection: Connection) -> None:
    maker = Maker(settings)
    try:
        while True:
            unit = connection.recv()
            if any(job.id.startswith(LETHAL) for job in unit):
                os.kill(os.getpid(), signal.SIGKILL)
            connection.send(maker.make(unit))
    except EOFError:
        pass


def die(settings: MakerSettings, connection: Connection) -> None:
    raise SystemExit(7)
