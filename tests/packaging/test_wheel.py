"""The wheel in an empty environment and an empty folder: run with `make test-wheel`, for pip fetches packages."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "character.png"
#: What a run must not take from the checkout, nor from the environment of the tests.
_FOREIGN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")


class Environment:
    """A virtual environment with the wheel and some of its extras."""

    def __init__(self, folder: Path, wheel: Path, extras: str) -> None:
        self.bin = folder / "bin"
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        constraints = ("-c", ROOT / "constraints.txt")
        self("python", "-m", "pip", "install", "-q", *constraints, f"{wheel}[{extras}]", folder=folder)

    def __call__(self, program: str, *arguments: str | Path, folder: Path) -> str:
        """What a program of the environment prints, in a folder."""
        command = [self.bin / program, *arguments]
        done = subprocess.run(
            command, cwd=folder, env=self.variables, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, f"{program}: {done.stdout}{done.stderr}"
        return done.stdout

    @property
    def variables(self) -> dict[str, str]:
        return {name: value for name, value in os.environ.items() if name not in _FOREIGN}

    def packages(self, folder: Path) -> set[str]:
        listed = json.loads(self("python", "-m", "pip", "list", "--format", "json", folder=folder))
        return {package["name"].lower() for package in listed}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build: list[str | Path] = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(build, check=True, timeout=600)
    (found,) = folder.glob("lfdm_export-*-py3-none-any.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Environment]:
    made: dict[str, Environment] = {}

    def make(extras: str) -> Environment:
        if extras not in made:
            made[extras] = Environment(tmp_path_factory.mktemp("environment"), wheel, extras)
        return made[extras]

    return make


def test_the_wheel_holds_what_is_not_python(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    folders = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert folders == {"lfdm_export", "lfdm_models"}
    tracked = subprocess.run(
        ["git", "ls-files", "lfdm_export", "models/lfdm_models"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    sources = {name.removeprefix("models/") for name in tracked.stdout.splitlines()}
    assert sources - names == set()


def test_a_clip_without_pytorch_and_onnx(environment: Callable[[str], Environment], tmp_path: Path):
    run = environment("run")
    assert {"torch", "onnx", "lfdm-models"} & run.packages(tmp_path) == set()
    clip = tmp_path / "clip.gif"
    wanted = ("--image", PICTURE, "--label", "nod", "--seed", "1", "--out", clip)
    run("lfdm-generate", "characters", *wanted, folder=tmp_path)
    assert clip.read_bytes().startswith(b"GIF89a")
    where = run("python", "-c", "import lfdm_export; print(lfdm_export.__file__)", folder=tmp_path)
    assert Path(where.strip()).is_relative_to(run.bin.parent)


def test_a_server_and_its_client(environment: Callable[[str], Environment], tmp_path: Path):
    serve = environment("run,serve")
    assert {"torch", "onnx"} & serve.packages(tmp_path) == set()
    serve("lfdm-serve", "--quiet", "--install-server", folder=tmp_path)
    clip = tmp_path / "clip.gif"
    free = ("--grpc-port", "0", "--http-port", "0", "--metrics-port", "0")
    with started(
        serve, "lfdm-serve", "characters", *free, folder=tmp_path, until=r"(?s)gRPC +(\S+).*^ready"
    ) as address:
        wanted = ("--image", PICTURE, "--label", "nod", "--seed", "1", "--out", clip)
        serve("lfdm-generate", "--url", address, *wanted, folder=tmp_path)
    assert clip.read_bytes().startswith(b"GIF89a")


def test_the_video_interface(environment: Callable[[str], Environment], tmp_path: Path):
    web = environment("web")
    assert {"torch", "onnx"} & web.packages(tmp_path) == set()
    command = ("characters", "--port", "0", "--state", tmp_path / "videos")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with (
        started(web, "lfdm-web", *command, folder=tmp_path, until=r"(http://\S+/v1/videos)") as address,
        direct.open(address, timeout=60) as answer,
    ):
        assert json.load(answer)["data"] == []


@contextlib.contextmanager
def started(environment: Environment, program: str, *arguments: str | Path, folder: Path, until: str) -> Iterator[str]:
    """A server of the environment; what the first group of `until` found in what it says."""
    command = [environment.bin / program, *arguments]
    with subprocess.Popen(
        command, cwd=folder, env=environment.variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        said, found = "", None
        for line in process.stdout:
            said += line
            found = re.search(until, said, re.MULTILINE)
            if found:
                break
        assert found is not None, said
        try:
            yield found[1]
        finally:
            process.send_signal(signal.SIGTERM)
            said += process.stdout.read()
    assert process.returncode in (0, 128 + signal.SIGTERM), said
