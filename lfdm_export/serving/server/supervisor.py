"""A Triton server from start to stop: started on a repository, watched, drained."""

from __future__ import annotations

import ctypes
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from lfdm_export.errors import InputError, ServerError
from lfdm_export.protocol.contract import CLIP_MODEL, IN_FLIGHT, METRICS_INTERVAL, STREAM_MODEL
from lfdm_export.serving.server.control import ADMIN_HEADER, PROTECTED, Control
from lfdm_export.serving.server.files import ServerFiles
from lfdm_export.serving.server.ports import check_ports
from lfdm_export.serving.server.watchdog import Watchdog, live_stubs, remove_shared_memory

logger = logging.getLogger(__name__)

#: What clients use; loading them loads what they are made of.
SERVED = (CLIP_MODEL, STREAM_MODEL)
#: Seconds that a model's process may take to load its engines.
_STUB_TIMEOUT = 600
#: Seconds that the server waits for what is left at SIGTERM (streams that clients keep open, requests that a killed
#: process had), and until it gets SIGKILL.
_EXIT_TIMEOUT, _TERM_TIMEOUT = 3, 8.0
#: What a server says on every machine without a GPU.
_NOISE = ("CudaDriverHelper", "CUDA driver version is insufficient", "NVML", "DCGM", "pinned system memory")


@dataclass(frozen=True)
class ServerOptions:
    """How a server is started.

    Attributes:
        host: address that it listens on.
        http_port, grpc_port, metrics_port: 0 takes a free one.
        start_timeout: seconds until all models must be ready.
        drain_timeout: seconds that requests in flight have when the server is stopped.
        trace_file: where traces of requests go; None traces nothing.
        trace_rate: one request in so many is traced.
        verbose: log everything that the server says.
        arguments: more arguments for `tritonserver`.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8001
    metrics_port: int = 8002
    start_timeout: float = 600.0
    drain_timeout: float = 60.0
    trace_file: str | None = None
    trace_rate: int = 1
    verbose: bool = False
    arguments: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            InputError: a value is out of range.
        """
        for name in ("http_port", "grpc_port", "metrics_port"):
            if not 0 <= getattr(self, name) <= 65535:
                raise InputError(f"{name} is {getattr(self, name)}, expected 0 to 65535")
        for name, least in (("start_timeout", 1), ("drain_timeout", 0), ("trace_rate", 1)):
            if not getattr(self, name) >= least:
                raise InputError(f"{name} is {getattr(self, name)}, expected {least} or more")

    def with_ports(self) -> ServerOptions:
        """The same with free ports in place of 0.

        Raises:
            InputError: a port is taken, or the host is no address of this machine.
        """
        http, grpc, metrics = "--http-port", "--grpc-port", "--metrics-port"  # what messages call them
        ports = check_ports(self.host, {http: self.http_port, grpc: self.grpc_port, metrics: self.metrics_port})
        return replace(self, http_port=ports[http], grpc_port=ports[grpc], metrics_port=ports[metrics])


class TritonServer:
    """A running server: ready when made, stopped when left.

    Attributes:
        options: with the ports that were taken.
        control: of the server.
        region_prefix: what the names of its shared memory begin with.
    """

    def __init__(self, files: ServerFiles, repository: Path, options: ServerOptions) -> None:
        """Start a server and wait until all its models are ready.

        Args:
            files: what to start.
            repository: the models.
            options: how.

        Raises:
            InputError: a port is taken, or the host is no address of this machine.
            ServerError: it does not become ready; the message has what it said last.
        """
        self.options = options.with_ports()
        remove_orphaned_memory()
        self.region_prefix = f"{_PREFIX}{os.getpid()}_{secrets.token_hex(3)}_"
        key = secrets.token_urlsafe(24)
        self.control = Control(f"http://{_reachable(self.options.host)}:{self.options.http_port}", key)
        self._said: deque[str] = deque(maxlen=400)
        self._stopping = False
        self._watchdog: Watchdog | None = None
        self._process = subprocess.Popen(
            _command(files, repository, self.options, key, self.region_prefix),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=files.environment(),
            start_new_session=True,  # Ctrl-C is for us, who drain first
            preexec_fn=_die_with_parent,
        )
        self._reader = threading.Thread(target=self._read, name="lfdm-server-log", daemon=True)
        self._reader.start()
        try:
            self._wait_ready()
        except BaseException:
            self.kill()
            raise
        models = sorted({stub.model for stub in live_stubs(self.region_prefix)})
        self._watchdog = Watchdog(self.control, models, self.region_prefix)

    def __enter__(self) -> TritonServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the process is there."""
        return self._process.poll() is None

    def last_words(self) -> str:
        """The last errors that the server logged, in one line."""
        lines = [line for line in self._said if not any(noise in line for noise in _NOISE)]
        errors = [line for line in lines if line.startswith(("E", "error")) or "Error" in line]
        return " | ".join((errors or lines)[-3:]) or "it said nothing"

    def stop(self) -> None:
        """Refuse new requests, wait for those in flight, end the server and what it leaves behind."""
        if self._watchdog is not None:
            self._watchdog.stop()
            self._watchdog = None
        if self.running:
            self._drain()
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_TERM_TIMEOUT)
        self.kill()

    def kill(self) -> None:
        """End the server now."""
        if self.running:
            self._process.kill()
        self._process.wait()
        for stub in live_stubs(self.region_prefix):  # they do not always notice that the server is gone
            with suppress(OSError):
                os.kill(stub.pid, signal.SIGKILL)
        self._reader.join(5.0)
        remove_shared_memory(self.region_prefix)

    def _drain(self) -> None:
        """Unload what clients use: it takes no more requests, and is gone when those that it has are answered.

        A server that gets SIGTERM at once fails the ensembles that are in flight. A model counts as being unloaded as
        long as a client keeps a stream to it open, whether anything is on it or not: streams are counted by our own
        metric.
        """
        began = time.monotonic()
        try:
            for model in SERVED:
                self.control.unload(model)
            while time.monotonic() < began + self.options.drain_timeout and self.running:
                unloading = [model for model, state in self.control.states().items() if state == "UNLOADING"]
                if (
                    STREAM_MODEL in unloading
                    and time.monotonic() > began + 2 * METRICS_INTERVAL
                    and not self._streams()
                ):
                    unloading.remove(STREAM_MODEL)
                if not unloading:
                    return
                time.sleep(0.1)
            logger.warning("some requests were not done within %.0f s; they fail", self.options.drain_timeout)
        except ServerError as error:
            logger.warning("the server could not be drained: %s", error)

    def _streams(self) -> int:
        """Streamed requests in flight; 1 if the server does not tell."""
        url = f"http://{_reachable(self.options.host)}:{self.options.metrics_port}/metrics"
        found = self.control.metric(url, IN_FLIGHT, STREAM_MODEL)
        return 1 if found is None else int(found)

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + self.options.start_timeout
        while not self._is_ready():
            if not self.running:
                self._reader.join(5.0)
                raise ServerError(f"tritonserver did not start: {self.last_words()}", "UNAVAILABLE")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"tritonserver was not ready within {self.options.start_timeout:.0f} s: {self.last_words()}",
                    "UNAVAILABLE",
                )
            time.sleep(0.1)

    def _is_ready(self) -> bool:
        """Whether our server, and no other one at the same port, has all its models ready."""
        if not self.control.ready():
            return False
        try:
            states = self.control.states()  # takes our key
        except ServerError:
            return False
        return all(states.get(model) == "READY" for model in SERVED)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.rstrip()
            self._said.append(text)
            if self.options.verbose or _matters(text):
                logger.warning("%s", text)


def _matters(line: str) -> bool:
    """Whether a line of the server's is worth an operator's attention: warnings, errors, what models print."""
    return bool(line) and not line.startswith(("I", "+", "|")) and not any(noise in line for noise in _NOISE)


#: What the names of our servers' shared memory begin with; the process id of lfdm-serve follows.
_PREFIX = "lfdm_serve_"


def remove_orphaned_memory() -> None:
    """Remove the shared memory of servers whose lfdm-serve is gone, killed for instance."""
    for path in Path("/dev/shm").glob(f"{_PREFIX}*"):
        owner = path.name.removeprefix(_PREFIX).split("_")[0]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            with suppress(OSError):
                path.unlink()


def wait_for_signal(server: TritonServer, numbers: Sequence[int] = (signal.SIGINT, signal.SIGTERM)) -> int:
    """Wait until one of the signals comes; a second one ends the server without draining it.

    Returns:
        The signal's number.

    Raises:
        ServerError: the server ended by itself.
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


def _command(files: ServerFiles, repository: Path, options: ServerOptions, key: str, prefix: str) -> list[str]:
    protected = ",".join(PROTECTED)
    command = [
        str(files.binary),
        f"--model-repository={repository}",
        *([f"--backend-directory={files.backends}"] if files.backends else []),
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in SERVED),
        "--exit-on-error=true",
        "--strict-readiness=true",
        f"--http-address={options.host}",
        f"--http-port={options.http_port}",
        f"--grpc-address={options.host}",
        f"--grpc-port={options.grpc_port}",
        f"--metrics-address={options.host}",
        f"--metrics-port={options.metrics_port}",
        f"--http-restricted-api={protected}:{ADMIN_HEADER}={key}",
        f"--grpc-restricted-protocol={protected}:{ADMIN_HEADER}={key}",
        f"--backend-config=python,shm-region-prefix-name={prefix}",
        f"--backend-config=python,stub-timeout-seconds={_STUB_TIMEOUT}",
        f"--exit-timeout-secs={_EXIT_TIMEOUT}",
    ]
    if options.trace_file:
        command += [
            f"--trace-config=triton,file={options.trace_file}",
            f"--trace-config=rate={options.trace_rate}",
            "--trace-config=level=TIMESTAMPS",
        ]
    return [*command, *options.arguments]


def _die_with_parent() -> None:
    """In the new process: be told to end when lfdm-serve is gone, however it went (Linux's PR_SET_PDEATHSIG)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))


def _reachable(host: str) -> str:
    """An address at which a server that listens on `host` is reached from here."""
    return "127.0.0.1" if host in ("", "0.0.0.0") else host
