"""A server that may open few files."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lfdm_export.serving.server import open_files
from lfdm_export.serving.server.open_files import allow_enough
from lfdm_export.serving.server.watchdog import live_stubs


@pytest.fixture
def limits() -> Iterator[tuple[int, int]]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield before
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_limit_is_raised_as_far_as_the_system_lets_it(
    limits: tuple[int, int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    used = max(int(one.name) for one in Path("/proc/self/fd").iterdir()) + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (used, limits[1]))
    monkeypatch.setattr(open_files, "ENOUGH", used + 10)
    allow_enough()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (used + 10, limits[1])
    allow_enough()
    assert not caplog.records
    if limits[1] != resource.RLIM_INFINITY:
        monkeypatch.setattr(open_files, "ENOUGH", limits[1] + 1)
        allow_enough()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == limits[1]
        assert "may open only" in caplog.text


def test_a_process_that_cannot_be_looked_at_is_not_taken_for_dead(monkeypatch: pytest.MonkeyPatch):
    """Else the watchdog would load its model again, and end a process that works."""

    def fail(number: int) -> Any:
        def read_bytes(_: Path) -> bytes:
            raise OSError(number, os.strerror(number))

        return read_bytes

    monkeypatch.setattr(Path, "read_bytes", fail(errno.ENOENT))
    assert live_stubs("lfdm_serve_") == []
    monkeypatch.setattr(Path, "read_bytes", fail(errno.EMFILE))
    with pytest.raises(OSError, match="open files"):
        live_stubs("lfdm_serve_")
