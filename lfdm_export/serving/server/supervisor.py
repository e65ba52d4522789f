"""A Triton server from start to stop: started on a repository behind the front, watched, restarted, drained."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from lfdm_export.errors import LfdmExportError, MissingDependencyError, ServerError
from lfdm_export.serving.front.memory import share_heap
from lfdm_export.serving.server.control import Control
from lfdm_export.serving.server.files import ServerFiles
from lfdm_export.serving.server.open_files import allow_enough
from lfdm_export.serving.server.options import ServerOptions
from lfdm_export.serving.server.process import Recipe, TritonProcess
from lfdm_export.serving.server.run_folder import run_folder
from lfdm_export.serving.server.shared_memory import own_prefix
from lfdm_export.serving.server.sockets import Sockets
from lfdm_export.serving.server.stopped import StoppedProcesses
from lfdm_export.serving.server.watchdog import Watchdog, live_stubs

if TYPE_CHECKING:
    from lfdm_export.serving.front.access import Access
    from lfdm_export.serving.front.front import Front

logger = logging.getLogger(__name__)

#: Failed starts in a row after which the supervisor gives up.
_MOST_STARTS = 5
#: Seconds until the next start: zero after the first end, then the first value, doubled up to the second.
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
#: A server that ran for this many seconds is restarted at once.
_LONG = 10.0
_LOOK = 0.1
#: Triton's own end while it starts on a machine under heavy load: its Python backend aborts at a mutex whose owner has
#: ended. It is no fault of the models, and the next start may succeed.
_ABORTED, _MOST_ABORTS = "lock_exception", 2


class TritonServer:
    """A running server behind its front: ready after construction, restarted if it dies, stopped by `__exit__`.

    It ends with the thread that constructs it, however that thread ends.

    Attributes:
        options: the options, with the actual ports.
        region_prefix: prefix of the names of its shared memory regions.
    """

    def __init__(self, files: ServerFiles, repository: Path, options: ServerOptions) -> None:
        """Start a server, wait until all its models are ready, and accept clients.

        Args:
            files: paths of the server.
            repository: the model repository.
            options: the server's options.

        Raises:
            InputError: a port is in use, the host is not an address of this machine, or a file cannot be used.
            MissingDependencyError: a package that the front needs is not installed.
            ServerError: the server does not become ready; the message has its last log lines.
        """
        share_heap()  # before gRPC starts its threads
        front_class, read_access = _import_front()
        allow_enough()
        self.options = options.with_ports()
        access = read_access(options.token_file, options.tls_certificate, options.tls_key)
        self._stopping = threading.Event()
        self._failure: str | None = None
        self._watchdog: Watchdog | None = None
        self._starts = 0
        with ExitStack() as stack:
            self._folder = stack.enter_context(run_folder())
            try:
                self.region_prefix = stack.enter_context(own_prefix())
            except OSError as error:
                raise ServerError(f"/dev/shm, which the server needs, cannot be used ({error}); mount it") from error
            self._recipe = Recipe(files, repository, self.options, self.region_prefix, files.environment())
            self._process = self._start()
            stack.callback(lambda: self._process.kill())
            self._front: Front = front_class(self.options, access)
            stack.callback(self._front.close)
            try:
                self._front.attach(self._process.sockets)
            except (OSError, RuntimeError) as error:
                raise ServerError(f"the ports cannot be listened on: {error}", "UNAVAILABLE") from error
            self._watch()
            self._stack = stack.pop_all()
        self._ended = threading.Thread(target=self._supervise, name="lfdm-supervisor", daemon=True)
        self._ended.start()

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the server serves or is being restarted."""
        return self._ended.is_alive() and not self._stopping.is_set()

    @property
    def control(self) -> Control:
        """The control client of the current server process."""
        return self._process.control

    @property
    def sockets(self) -> Sockets:
        """The private sockets of the current server process, which only this user can reach."""
        return self._process.sockets

    @property
    def process_id(self) -> int:
        """Of `tritonserver`."""
        return self._process.process_id

    def last_words(self) -> str:
        """The server's last logged errors, in one line."""
        return self._failure or self._process.last_words()

    def stop(self) -> None:
        """Refuse new requests, wait for those in flight, stop the server and clean up."""
        if not self._front.drain(self.options.drain_timeout):
            logger.warning("some requests were not done within %g s; they fail", self.options.drain_timeout)
        self._stopping.set()
        self._ended.join()
        self._front.detach()
        self._unwatch()
        self._process.terminate()
        self._stack.close()

    def kill(self) -> None:
        """Kill the server now, also while `stop` waits."""
        self._stopping.set()
        self._front.close()
        self._process.kill()
        self._ended.join()
        self._unwatch()
        self._stack.close()

    # --- The server process, and its successors ---------------------------------------------------

    def _start(self) -> TritonProcess:
        for _ in range(_MOST_ABORTS):
            try:
                return self._start_once()
            except ServerError as error:
                if _ABORTED not in str(error):
                    raise
                logger.warning("tritonserver aborted while it started; it is started again")
        return self._start_once()

    def _start_once(self) -> TritonProcess:
        self._starts += 1
        folder = self._folder / str(self._starts)
        folder.mkdir(mode=0o700)
        sockets = Sockets(folder, self.options.http_port, self.options.grpc_port)
        return TritonProcess(self._recipe, sockets, self._stopping)

    def _watch(self) -> None:
        models = sorted({stub.model for stub in live_stubs(self.region_prefix)})
        self._watchdog = Watchdog(self._process.control, models, self.region_prefix, self._lost)

    def _unwatch(self) -> None:
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None

    def _lost(self, model: str) -> None:
        count = self._front.lose(model)
        logger.error("the process of %s has died: it is loaded again; %d requests in flight get an error", model, count)

    def _supervise(self) -> None:
        """Restart the server whenever it ends; the thread must live as long as the process that it starts."""
        pause = 0.0
        while not self._stopping.is_set():
            began, stopped = time.monotonic(), StoppedProcesses()
            while not self._process.wait(_LOOK):
                if self._stopping.is_set():
                    return
                stopped.end({self._process.process_id: "tritonserver"})
            lost = self._front.detach()
            logger.error(
                "tritonserver has ended by itself (%s): it is started again; %d requests in flight get an error",
                self._process.last_words(),
                lost,
            )
            self._unwatch()
            self._process.kill()  # cleans up
            pause = 0.0 if time.monotonic() > began + _LONG else pause
            if not self._restart(pause):
                return
            pause = min(max(_FIRST_PAUSE, 2 * pause), _LONGEST_PAUSE)

    def _restart(self, pause: float) -> bool:
        """Restart the server, and accept clients; False if it keeps failing, or is being stopped."""
        for _ in range(_MOST_STARTS):
            if self._stopping.wait(pause):
                return False
            began = time.monotonic()
            try:
                self._process = self._start()
                self._front.attach(self._process.sockets)
                self._watch()
            except (LfdmExportError, OSError) as error:
                self._failure = str(error)
                if self._stopping.is_set():
                    return False
                logger.error("the server could not be started again: %s", error)
                pause = min(max(_FIRST_PAUSE, 2 * pause), _LONGEST_PAUSE)
                continue
            self._failure = None
            logger.warning("serves again after %.1f s", time.monotonic() - began)
            return True
        return False


def wait_for_signal(server: TritonServer, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> int:
    """Wait for one of the signals; a second one kills the server without draining it.

    Returns:
        The signal's number.

    Raises:
        ServerError: the server ended by itself, and could not be restarted.
    """
    came: list[int] = []

    def handle(number: int, _frame: object) -> None:
        came.append(number)
        if len(came) > 1:
            server.kill()

    for number in numbers:
        signal.signal(number, handle)
    while not came:
        if not server.running:
            raise ServerError(f"tritonserver has ended by itself: {server.last_words()}", "UNAVAILABLE")
        time.sleep(0.2)
    return came[0]


def _import_front() -> tuple[type[Front], Callable[[str | None, str | None, str | None], Access]]:
    try:
        from lfdm_export.serving.front.access import read_access
        from lfdm_export.serving.front.front import Front
    except ImportError as error:
        raise MissingDependencyError("aiohttp", "serving", "serve") from error
    return Front, read_access
