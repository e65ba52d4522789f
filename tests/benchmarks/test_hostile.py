"""The attacks of `benchmarks/hostile.py`: the front refuses each kind, and a fault of the server would be found."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from benchmarks import hostile_requests, kills
from benchmarks.hostile_requests import KINDS
from lfdm_export.errors import InputError
from tests.fake_triton import FakeTriton
from tests.security.doors import Doors


@pytest.fixture
def fake() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def doors(fake: FakeTriton) -> Iterator[hostile_requests.Doors]:
    with Doors(fake) as found:
        yield hostile_requests.Doors.at(f"127.0.0.1:{found.http}", found.grpc)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_front_refuses_it(doors: hostile_requests.Doors, kind: Callable[..., str]):
    ends = {kind(random.Random(seed), doors) for seed in range(3)}
    # What is right by chance, or what only the models know to be wrong, is answered; the fake answers all of that.
    assert ends <= {"refused", "answered"}


@pytest.mark.parametrize("code", ["INTERNAL", "UNKNOWN", "UNAVAILABLE"])
def test_a_fault_of_the_server_is_found(fake: FakeTriton, doors: hostile_requests.Doors, code: str):
    fake.refusals.append((code, "out of order"))
    request = hostile_requests._message(
        "lfdm", image=("UINT8", [8, 8, 3], bytes(192)), label=("BYTES", [1], b"\1\0\0\0x")
    )
    assert doors.call(request).startswith(f"gRPC {code}")


def test_a_status_is_judged():
    ends = {status: hostile_requests._judged(status) for status in (200, 400, 413, 500, 503)}
    assert ends == {200: "answered", 400: "refused", 413: "refused", 500: "HTTP status 500", 503: "HTTP status 503"}


# --- Kills -----------------------------------------------------------------------------------------


def writer(place: Path, code: str) -> Callable[[int], list[str]]:
    """A command that writes a version of a file by `code`."""
    return lambda version: [
        sys.executable,
        "-S",
        "-c",
        f"import pathlib\nplace = pathlib.Path({str(place)!r})\nversion = {version}\n{code}",
    ]


def digest(place: Path) -> str:
    text = place.read_text()
    if not text.endswith("\n"):
        raise InputError("half a file")
    return text


def test_kills_of_a_writer_that_replaces_violate_nothing(tmp_path: Path):
    code = "part = place.with_suffix('.part')\npart.write_text(f'{version}' * 9 + '\\n')\npart.rename(place)"
    found = kills.kill_writer(tmp_path / "file", writer(tmp_path / "file", code), digest, 5, random.Random(0))
    assert sum(found.counts.values()) == 5
    assert found.counts["neither"] == 0


def test_a_file_that_is_half_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A writer that is to be killed stops at half of the file."""

    def kill_at_half(command: Sequence[str], _seconds: float) -> bool:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "STOP": "1"}
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"half\n"
            process.kill()
        return True

    monkeypatch.setattr(kills, "kill", kill_at_half)
    code = """
import os, sys
place.write_text('half')
if 'STOP' in os.environ:
    print('half', flush=True)
    sys.stdin.read()
place.write_text(f'{version}\\n')
"""
    found = kills.kill_writer(tmp_path / "file", writer(tmp_path / "file", code), digest, 2, random.Random(0))
    assert found.counts == {"neither": 2}
    assert any("half a file" in line for line in found.wrong)


def test_what_is_left_is_found(tmp_path: Path):
    code = "place.write_text(f'{version}\\n')\nplace.with_suffix('.part').touch()"
    found = kills.kill_writer(tmp_path / "file", writer(tmp_path / "file", code), digest, 0, random.Random(0))
    assert found.wrong == ["left after the next run: ['file.part']"]
