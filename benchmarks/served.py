"""A server under measurement: `lfdm-serve` in its own process, its metrics, its memory."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import descendants
from lfdm_export.serving.server.control import open_directly

#: Timeouts in seconds of a server's start and stop.
_START, _STOP = 300.0, 90.0
_SERVE = "import sys; from lfdm_export.cli import serve_main; sys.exit(serve_main())"
#: Name of the process that ends the server if `lfdm-serve` is killed; nothing replaces it.
GUARD = "guard"
_METRIC = re.compile(r'^(\w+)\{model="(\w+)"(?:,\w+="(\w+)")?\} (\S+)$')


class ServerFailed(Exception):
    """The server did not start, or has ended."""


@dataclass(frozen=True)
class Served:
    """A running server.

    Attributes:
        address: gRPC address, HOST:PORT.
        http_address: HTTP address, HOST:PORT.
        metrics_url: URL of its metrics page.
        pid: process id of lfdm-serve.
    """

    address: str
    http_address: str
    metrics_url: str
    pid: int

    def metrics(self, model: str = "lfdm_sample") -> dict[str, float]:
        """This project's metrics of one model, by name, or by name and outcome (``lfdm_requests_total.finished``)."""
        with open_directly(self.metrics_url, 10) as answer:
            lines = answer.read().decode().splitlines()
        found = filter(None, map(_METRIC.match, lines))
        return {".".join(filter(None, (one[1], one[3]))): float(one[4]) for one in found if one[2] == model}

    def memory(self) -> dict[str, int]:
        """Bytes of each of the server's processes; shared pages are divided among the processes that share them."""
        usage = {}
        for pid, name in self.processes().items():
            with contextlib.suppress(OSError):  # the process has ended
                usage[name] = _proportional_bytes(pid)
        return usage

    def processes(self) -> dict[int, str]:
        """Names of the server's processes by process id: the model that one runs, or its program."""
        found = {}
        for pid in (self.pid, *descendants(self.pid)):
            with contextlib.suppress(OSError):  # the process has ended
                if name := _name(pid):
                    found[pid] = name
        return found


@contextlib.contextmanager
def serve(bundle: Path, log: Path, options: Sequence[str]) -> Iterator[Served]:
    """A ready server on free ports; stopped at the end.

    Args:
        bundle: the bundle to serve.
        log: file for its output.
        options: further options of lfdm-serve.

    Raises:
        ServerFailed: the server does not become ready.
    """
    ports = [f"--{name}-port=0" for name in ("grpc", "http", "metrics")]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", _SERVE, str(bundle), *ports, *options],
            stdout=file,
            stderr=file,
            env={**os.environ, "PYTHONPATH": _with_benchmarks()},
        )
    try:
        yield _wait_ready(process, log)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def print_logs(folder: Path) -> None:
    """Print the end of the servers' logs after a failure."""
    for log in sorted(folder.glob("*.log")):
        lines = log.read_text(errors="replace").splitlines()[-40:]
        print(f"--- {log.name}", *lines, sep="\n", file=sys.stderr)


def _with_benchmarks() -> str:
    """Where the server's models find `benchmarks.policies`."""
    return os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))


def _wait_ready(process: subprocess.Popen[bytes], log: Path) -> Served:
    end = time.monotonic() + _START
    while time.monotonic() < end:
        said = log.read_text(errors="replace")
        if re.search(r"^ready$", said, re.MULTILINE):
            addresses = dict(re.findall(r"^(gRPC|HTTP|metrics)\s+(\S+)$", said, re.MULTILINE))
            http = addresses["HTTP"].removeprefix("http://")
            return Served(addresses["gRPC"], http, addresses["metrics"], process.pid)
        if process.poll() is not None:
            raise ServerFailed(f"lfdm-serve ended with status {process.returncode}: {said[-2000:]}")
        time.sleep(0.2)
    raise ServerFailed(f"lfdm-serve was not ready within {_START:.0f} s: {log.read_text(errors='replace')[-2000:]}")


class MemoryWatch:
    """Samples a server's memory on its own thread."""

    def __init__(self, served: Served, every: float) -> None:
        """Start to sample.

        Args:
            served: the server.
            every: seconds between samples.
        """
        #: Seconds since the start, and bytes by process.
        self.samples: list[tuple[float, dict[str, int]]] = []
        self._served, self._every, self._stop = served, every, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Take no more samples."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        began = time.monotonic()
        while not self._stop.wait(self._every):
            self.samples.append((time.monotonic() - began, self._served.memory()))


def _name(pid: int) -> str:
    """Name of a process: its model, if it runs one; empty for a zombie."""
    words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    if any(word.endswith("/server/launch.py") for word in words):
        return GUARD
    models = [part for word in words[1:] for part in Path(word).parts if part.startswith("lfdm_")]
    return models[0] if models else Path(words[0]).name


def _proportional_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="utf-8").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) << 10
    return 0
