"""One `tritonserver` process: start, readiness, log and end."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lfdm_export.errors import ServerError
from lfdm_export.protocol.contract import CLIP_MODEL, MOTION_MODELS, STREAM_MODEL
from lfdm_export.serving.server.control import Control
from lfdm_export.serving.server.files import ServerFiles
from lfdm_export.serving.server.options import ServerOptions
from lfdm_export.serving.server.shared_memory import make_private, remove_shared_memory
from lfdm_export.serving.server.sockets import Sockets
from lfdm_export.serving.server.watchdog import live_stubs

logger = logging.getLogger(__name__)

#: Seconds that a model's process may take to load its engines.
_STUB_TIMEOUT = 600
#: Shared memory of each model at the start. A region never shrinks: with Triton's 1 MB, two pictures of 512 x 512
#: pixels at a time make it larger for good.
_REGION_BYTES = 2 << 20
#: Models that are loaded at a time; there are fewer.
_LOAD_THREADS = 8
#: Seconds that the server waits at SIGTERM for remaining requests (those of a killed process), and seconds until
#: SIGKILL.
_EXIT_TIMEOUT, _TERM_TIMEOUT = 3, 8.0
#: Parts of messages that a server logs on every machine without a GPU.
_NOISE = ("CudaDriverHelper", "CUDA driver version is insufficient", "NVML", "DCGM", "pinned system memory", "NODELAY")
_LAUNCHER = Path(__file__).with_name("launch.py")


@dataclass(frozen=True)
class Recipe:
    """Everything needed to start or restart a server.

    Attributes:
        files: paths of the server.
        repository: the model repository.
        options: the server's options, with ports.
        region_prefix: prefix of the names of its shared memory regions.
        environment: variables of its process.
    """

    files: ServerFiles
    repository: Path
    options: ServerOptions
    region_prefix: str
    environment: Mapping[str, str]


class TritonProcess:
    """A server process with all models ready.

    Attributes:
        sockets: sockets that it listens on.
        control: its control client.
    """

    def __init__(self, recipe: Recipe, sockets: Sockets, stopping: threading.Event) -> None:
        """Start the process and wait until all its models are ready; it ends with the thread that starts it.

        Args:
            recipe: the server's files, models and options.
            sockets: sockets to listen on.
            stopping: ends the wait when set.

        Raises:
            ServerError: the server does not become ready; the message has its last log lines.
        """
        self.sockets, self._recipe = sockets, recipe
        self.control = Control(sockets.grpc_target)
        self._served = served(recipe.repository)
        self._log_lines: deque[str] = deque(maxlen=400)
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(_LAUNCHER), str(os.getpid()), *_command(recipe, sockets)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env=recipe.environment,
            start_new_session=True,  # Ctrl-C goes to this process only, which drains first
        )
        self._reader = threading.Thread(target=self._read, name="lfdm-server-log", daemon=True)
        self._reader.start()
        try:
            self._wait_ready(stopping)
            make_private(recipe.region_prefix)
        except BaseException:
            self.kill()
            raise

    @property
    def running(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    @property
    def process_id(self) -> int:
        """Its number."""
        return self._process.pid

    def wait(self, seconds: float) -> bool:
        """Wait for the process to end; returns whether it has."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return not self.running

    def last_words(self) -> str:
        """The server's last logged errors, in one line."""
        lines = [line for line in self._log_lines if _matters(line)]
        errors = [line for line in lines if line.startswith(("E", "error")) or "Error" in line]
        return " | ".join((errors or lines)[-3:]) or "it logged nothing"

    def terminate(self) -> None:
        """Stop the server with SIGTERM, or kill it if it does not end."""
        if self.running:
            self._process.terminate()
            self.wait(_TERM_TIMEOUT)
        self.kill()

    def kill(self) -> None:
        """Kill the server now, and clean up."""
        if self.running:
            self._process.kill()
        self._process.wait()
        for stub in live_stubs(self._recipe.region_prefix):  # they do not always notice the server's end
            with suppress(OSError):
                os.kill(stub.pid, signal.SIGKILL)
        self._reader.join(5.0)
        self.control.close()
        remove_shared_memory(self._recipe.region_prefix)

    def _wait_ready(self, stopping: threading.Event) -> None:
        seconds = self._recipe.options.start_timeout
        deadline = time.monotonic() + seconds
        # A gRPC channel that was refused may notice only seconds later that the server listens now.
        while not (
            self.sockets.listened() and self.control.ready() and all(map(self.control.model_ready, self._served))
        ):
            if not self.running:
                self._reader.join(5.0)
                raise ServerError(f"tritonserver did not start: {self.last_words()}", "UNAVAILABLE")
            if time.monotonic() > deadline:
                raise ServerError(
                    f"tritonserver was not ready within {seconds:.0f} s: {self.last_words()}", "UNAVAILABLE"
                )
            if stopping.wait(0.05):
                raise ServerError("the server is being stopped", "UNAVAILABLE")

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.rstrip()
            self._log_lines.append(text)
            if self._recipe.options.verbose or _matters(text):
                logger.warning("%s", text)


def served(repository: Path) -> tuple[str, ...]:
    """The models that clients use; loading them loads the models that they consist of.

    Raises:
        ServerError: the repository has no ensemble.
    """
    try:
        ensemble = (repository / CLIP_MODEL / "config.pbtxt").read_text(encoding="utf-8")
    except OSError as error:
        raise ServerError(f"{repository} is no model repository of this program: {error}") from error
    # The models for motions may or may not be parts of the ensemble.
    apart = [model for model in MOTION_MODELS if f'model_name: "{model}"' not in ensemble]
    return (CLIP_MODEL, STREAM_MODEL, *apart)


def _matters(line: str) -> bool:
    """Whether a line of the server's log is relevant to an operator: warnings, errors, output of models."""
    return bool(line) and not line.startswith(("I", "+", "|")) and not any(noise in line for noise in _NOISE)


def _command(recipe: Recipe, sockets: Sockets) -> list[str]:
    files, options = recipe.files, recipe.options
    command = [
        str(files.binary.absolute()),
        f"--model-repository={recipe.repository}",
        *([f"--backend-directory={files.backends}"] if files.backends else []),
        "--model-control-mode=explicit",
        *(f"--load-model={model}" for model in served(recipe.repository)),
        "--exit-on-error=true",
        "--strict-readiness=true",
        # All models at once: by default four, and those that load longest would wait for the others.
        f"--model-load-thread-count={_LOAD_THREADS}",
        "--disable-auto-complete-config",  # else each Python process is started twice: once to ask for its interface
        *sockets.arguments(),
        f"--backend-config=python,shm-region-prefix-name={recipe.region_prefix}",
        f"--backend-config=python,shm-default-byte-size={_REGION_BYTES}",
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
