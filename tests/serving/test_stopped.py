"""Processes that a signal has stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lfdm_export.serving.server import stopped
from lfdm_export.serving.server.stopped import StoppedProcesses, is_stopped
from tests.running_server import DEADLINE, eventually


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    found = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield found
    found.kill()
    found.communicate()


def test_only_a_process_that_stays_stopped_is_ended(process: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch):
    names, processes = {process.pid: "a model"}, StoppedProcesses()
    monkeypatch.setattr(stopped, "_LOOK", 0.0)
    processes.end(names)
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: is_stopped(process.pid), "it is stopped")
    monkeypatch.setattr(stopped, "STOPPED_SECONDS", DEADLINE)
    processes.end(names)
    process.send_signal(signal.SIGCONT)
    eventually(lambda: not is_stopped(process.pid), "it continues")
    monkeypatch.setattr(stopped, "STOPPED_SECONDS", 0.0)
    processes.end(names)
    assert process.poll() is None
    process.send_signal(signal.SIGSTOP)
    eventually(lambda: is_stopped(process.pid), "it is stopped again")
    processes.end(names)
    assert process.wait(DEADLINE) == -signal.SIGKILL


def test_a_process_that_has_ended_is_not_stopped(process: subprocess.Popen[bytes]):
    process.kill()
    process.wait(DEADLINE)
    assert not is_stopped(process.pid)
