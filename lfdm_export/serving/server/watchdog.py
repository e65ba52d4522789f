"""Finds Python models whose process died or hangs, and reloads them: the server itself does neither.

A killed process is missing from the system's process list at once, which is cheap to read, and one that a signal has
stopped is marked there. A hanging process is found by small real requests, to those models that support such.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lfdm_export.errors import ServerError
from lfdm_export.protocol.contract import CANCEL_INPUT, IMAGE_INPUTS, PREPROCESS_MODEL, SAMPLE_MODEL, Array, WireTensor
from lfdm_export.serving.server.control import Control
from lfdm_export.serving.server.shared_memory import make_private, remove_shared_memory
from lfdm_export.serving.server.stopped import StoppedProcesses

logger = logging.getLogger(__name__)

#: Seconds between two checks of the processes, and between two probes.
LOOK_EVERY, PROBE_EVERY = 0.05, 5.0
#: Timeout in seconds of a probe, after which its model counts as hanging; it includes the wait for earlier requests.
PROBE_TIMEOUT = 30.0
#: Seconds until a failed load is retried: at first, and at most.
RETRY, LONGEST_RETRY = 1.0, 30.0
_STUB = "triton_python_backend_stub"

#: Requests that a model answers at once, whatever else it is doing.
_PROBES: Mapping[str, tuple[Sequence[WireTensor], Mapping[str, Array]]] = {
    PREPROCESS_MODEL: (IMAGE_INPUTS, {"image": np.zeros((1, 1, 3), np.uint8)}),
    SAMPLE_MODEL: ((CANCEL_INPUT,), {CANCEL_INPUT.name: np.array([b""], np.object_)}),
}


@dataclass(frozen=True)
class Stub:
    """The process of a Python model.

    Attributes:
        model: name of the model.
        pid: process id.
        region: name of its shared memory region.
    """

    model: str
    pid: int
    region: str


def live_stubs(region_prefix: str) -> list[Stub]:
    """The live processes of one server's Python models, even if the server itself has ended.

    Args:
        region_prefix: prefix of the names of the server's shared memory regions.

    Raises:
        OSError: this process can open no more files.
    """
    processes = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [stub for stub in map(_stub, processes) if stub is not None and stub.region.startswith(region_prefix)]


def _stub(pid: int) -> Stub | None:
    """The Python model that a process runs; None if it runs none, or has ended."""
    try:
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):  # it may well live
            raise
        return None
    # A zombie process has no arguments.
    if len(arguments) < 3 or not arguments[0].endswith(_STUB):
        return None
    return Stub(Path(arguments[1]).parent.parent.name, pid, arguments[2])


class Watchdog:
    """Watches a server's models on its own thread."""

    def __init__(
        self, control: Control, models: Sequence[str], region_prefix: str, died: Callable[[str], None]
    ) -> None:
        """Start to watch.

        Args:
            control: the server's control client.
            models: the Python models that should be running.
            region_prefix: prefix of the names of the server's shared memory regions.
            died: called with the name of a model whose process has died, before it is loaded again.
        """
        self._control, self._models, self._prefix, self._died = control, tuple(models), region_prefix, died
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for work, name in ((self._watch, "lfdm-watchdog"), (self._probe, "lfdm-probe"))
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop watching; waits for a reload in progress."""
        self._stop.set()
        for thread in self._threads:
            thread.join(PROBE_TIMEOUT)

    def _watch(self) -> None:
        wait = dict.fromkeys(self._models, 0.0)
        not_before = dict.fromkeys(self._models, 0.0)
        stubs, stopped = live_stubs(self._prefix), StoppedProcesses()
        while not self._stop.wait(LOOK_EVERY):
            stopped.end({stub.pid: stub.model for stub in stubs})
            try:
                if len(stubs) < len(self._models) or any(_stub(stub.pid) != stub for stub in stubs):
                    stubs = live_stubs(self._prefix)
            except OSError:  # no more files can be opened now: who lives is not known
                continue
            alive = {stub.model for stub in stubs}
            for model in self._models:
                if model in alive or time.monotonic() < not_before[model]:
                    continue
                if self._reload(model):
                    wait[model] = 0.0
                else:
                    wait[model] = min(max(RETRY, 2 * wait[model]), LONGEST_RETRY)
                    not_before[model] = time.monotonic() + wait[model]

    def _reload(self, model: str) -> bool:
        """Unload and load a model, which starts a new process; returns whether that succeeded."""
        began = time.monotonic()
        self._died(model)
        try:
            self._control.unload(model)
            remove_shared_memory(self._prefix, [stub.region for stub in live_stubs(self._prefix)])
            self._control.load(model)
            make_private(self._prefix)
        except (ServerError, OSError) as error:
            logger.error("%s could not be loaded again: %s", model, error)
            return False
        logger.warning("%s serves again after %.1f s", model, time.monotonic() - began)
        return True

    def _probe(self) -> None:
        while not self._stop.wait(PROBE_EVERY):
            for model in _PROBES:
                if model in self._models and not self._stop.is_set():
                    self._probe_model(model)

    def _probe_model(self, model: str) -> None:
        try:
            stubs = [stub for stub in live_stubs(self._prefix) if stub.model == model]
        except OSError:  # as above
            return
        try:
            self._control.infer(model, *_PROBES[model], timeout=PROBE_TIMEOUT)
        except ServerError as error:
            # The other thread handles a process that has died; a model that is being loaded answers NOT_FOUND.
            if (
                error.code not in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
                or not stubs
                or not self._control.model_ready(model)
            ):
                return
            logger.error("%s has not answered for %.0f s: its process is ended", model, PROBE_TIMEOUT)
            for stub in stubs:
                with suppress(OSError):
                    os.kill(stub.pid, signal.SIGKILL)
