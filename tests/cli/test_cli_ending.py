"""How commands end: on signals, closed pipes and full disks; and their output on a terminal."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export.bundle.reader import Bundle
from lfdm_export.cli import export_main, generate_main, verify_main
from lfdm_export.errors import BundleError, InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.clip import Clip
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.serving.triton.repository import require_apart
from tests.fake_bundle import EMBEDDINGS, write_fake_bundle

_COMMAND = """
import argparse, pathlib, sys
from lfdm_export.cli import console
from lfdm_export.files.atomic import replacing, temporary_folder
args = argparse.Namespace(quiet=False, debug=False)
"""
#: Program that runs until it is stopped.
_WRITING = """
target = pathlib.Path(sys.argv[1])
def work():
    with replacing(target / "new" / "file") as stream, temporary_folder(target / "folder"):
        stream.write(b"half")
        print("writing", flush=True)
        sys.stdin.read()
    return 0
raise SystemExit(console.run("lfdm-test", args, work))
"""
#: Program that prints, works, and prints again.
_PRINTING = """
def work():
    console.say(args, "first" * 10_000)
    pathlib.Path(sys.argv[1]).write_bytes(b"done")
    print("second")
    console.say(args, "third")
    return 0
raise SystemExit(console.run("lfdm-test", args, work))
"""


def start(code: str, *arguments: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _COMMAND + code, *map(str, arguments)]
    pipe = subprocess.PIPE
    options = {"stdin": pipe, "stdout": pipe, "stderr": pipe, **options}
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    return subprocess.Popen(command, encoding="utf-8", env=environment, **options)


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(("name", "said"), [
    ("SIGINT", "interrupted"), ("SIGTERM", "ended by SIGTERM"), ("SIGHUP", "ended by SIGHUP"),
])  # fmt: skip
def test_a_signal_leaves_nothing_and_is_told_by_the_status(tmp_path: Path, name: str, said: str):
    number = signal.Signals[name]
    # A test run in the background inherits ignored signals.
    process = start(_WRITING, tmp_path, preexec_fn=lambda: signal.signal(number, signal.SIG_DFL))
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(number)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (128 + number, f"lfdm-test: {said}\n")
    assert list(tmp_path.iterdir()) == []


def test_under_nohup_the_end_of_the_terminal_changes_nothing(tmp_path: Path):
    process = start(_WRITING, tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate("")
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "new" / "file").read_bytes() == b"half"


def test_a_second_signal_does_not_disturb_the_cleaning_and_a_third_ends_it(tmp_path: Path):
    code = """
def work():
    try:
        print("working", flush=True)
        sys.stdin.readline()
    finally:
        print("cleaning", flush=True)
        sys.stdin.readline()
        pathlib.Path(sys.argv[1], "cleaned").touch()
        print("cleaned", flush=True)
        sys.stdin.readline()
raise SystemExit(console.run("lfdm-test", args, work))
"""
    process = start(code, tmp_path)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)
    process.stdin.write("go on\n")
    process.stdin.flush()
    assert process.stdout.readline() == "cleaned\n"
    process.send_signal(signal.SIGTERM)
    process.communicate()
    assert process.returncode == -signal.SIGTERM
    assert (tmp_path / "cleaned").exists()


def test_a_signal_before_the_work_shows_no_traceback(tmp_path: Path):
    code = """
import argparse, os, signal
from lfdm_export.cli import generate_main
def parse(*_):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
argparse.ArgumentParser.parse_known_args = parse
raise SystemExit(generate_main(["bundle"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (128 + signal.SIGTERM, "")


def test_ctrl_c_while_modules_load_shows_no_traceback():
    code = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == "lfdm_export.cli.verify":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)
import lfdm_export.cli
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    code = "import signal, lfdm_export.cli; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    command = [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler); {code}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "True\n"


def test_handlers_are_given_back():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(SystemExit):
        verify_main(["--version"])
    assert verify_main(["/nowhere"]) == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


# ----------------------------------------------------------------------------------- standard files


def test_a_reader_that_has_enough(tmp_path: Path):
    reading, writing = os.pipe()
    os.close(reading)
    process = start(_PRINTING, tmp_path / "file", stdout=writing)
    os.close(writing)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "")
    assert (tmp_path / "file").read_bytes() == b"done"


def test_nobody_reads_errors_either(tmp_path: Path):
    reading, writing = os.pipe()
    os.close(reading)
    failing = "raise SystemExit(console.run('lfdm-test', args, lambda: 1 / 0))"
    for code, status in ((_PRINTING, 0), (failing, 1)):
        process = start(code, tmp_path / "file", stdout=writing, stderr=writing)
        process.communicate()
        assert process.returncode == status
    os.close(writing)


def test_a_full_disk_for_what_is_printed(tmp_path: Path):
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        process = start(_PRINTING, tmp_path / "file", stdout=full)
        _, errors = process.communicate()
    assert (process.returncode, errors) == (0, "warning: results cannot be printed: No space left on device\n")
    assert (tmp_path / "file").read_bytes() == b"done"


def test_facts_that_cannot_be_printed_are_an_error(bundle: Bundle):
    code = f"from lfdm_export.cli import info_main; raise SystemExit(info_main([{os.fspath(bundle.path)!r}, '--json']))"
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "warning: results cannot be printed: No space left on device\n")


@pytest.mark.parametrize("closed", ["<&- >&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_files(tmp_path: Path, closed: str):
    code = (
        _COMMAND
        + """
import os
def work():
    with replacing(sys.argv[1]) as stream:
        stream.write(b"done")
        os.write(1, b"a library's own words")
        console.say(args, "said")
    return 0
raise SystemExit(console.run("lfdm-test", args, work))
"""
    )
    command = ["sh", "-c", f'"$0" -c "$1" "$2" {closed}', sys.executable, code, os.fspath(tmp_path / "file")]
    assert subprocess.run(command, check=False).returncode == 0
    assert (tmp_path / "file").read_bytes() == b"done"


def test_help_without_a_reader():
    reading, writing = os.pipe()
    os.close(reading)
    code = "from lfdm_export.cli import generate_main; generate_main(['--help'])"
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_terminals_obey_neither_names_nor_files_nor_servers(tmp_path: Path):
    code = """
import logging
from rich.table import Table
def work():
    console.say(args, "name \\x1b]0;title\\x07 \\udcff\\nnext")
    table = Table()
    table.add_column("\\x1b[31mred")
    console.say(args, table)
    logging.getLogger("lfdm_export").warning("server \\x1b[2J")
    raise RuntimeError("file \\x9b31m")
raise SystemExit(console.run("lfdm-test", args, work))
"""
    results, errors = start(code, tmp_path).communicate()
    assert results.startswith("name \\x1b]0;title\\x07 \\xff\nnext\n")
    assert "\\x1b[31" in results
    assert "server \\x1b[2J" in errors
    assert "file \\x9b31m" in errors
    assert not {"\x1b", "\x9b", "\x07"} & set(results + errors)


def test_usage_errors_are_escaped(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        verify_main(["bundle", "--\x1b[31m"])
    assert "\x1b" not in capsys.readouterr().err


# ----------------------------------------------------------------------------------------- commands


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("ending") / "fake")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def pipeline(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Fake of the pipeline that opens no engine and returns a clip at once."""

    class Choice:
        reason = "of the test"

    class Stages:
        target, choice = "onnxruntime", Choice()

    class Ready:
        stages = Stages()

        def __init__(self) -> None:
            self.bundle = bundle

        def resolve(self, options: SamplingOptions) -> tuple[SamplingOptions, SimpleNamespace]:
            return options, SimpleNamespace(name="ddim", steps=2)

        def generate(self, *_: object, **__: object) -> Clip:
            return Clip(
                frames=np.zeros((1, 2, 16, 16, 3), np.uint8),
                warped=np.zeros((1, 2, 16, 16, 3), np.uint8),
                latent=np.zeros((1, 3, 2, 4, 4), np.float32),
                source=np.zeros((1, 16, 16, 3), np.uint8),
                residual_flow=False,
            )

    monkeypatch.setattr(Pipeline, "open", lambda *_, **__: Ready())
    return Ready


def generate(bundle: Bundle, photo: object, *options: object) -> int:
    return generate_main([str(bundle.path), "--image", str(photo), *map(str, options)])


def test_the_photograph_is_not_replaced(bundle: Bundle, photo: Path, pipeline: Any, capsys: pytest.CaptureFixture[str]):
    before = photo.read_bytes()
    assert generate(bundle, photo, "--label", "anger", "--out", photo) == 1
    assert "is the same as --image" in capsys.readouterr().err
    assert photo.read_bytes() == before


@pytest.mark.parametrize("option", ["--drive", "--embedding"])
def test_no_other_input_is_replaced(
    bundle: Bundle, photo: Path, tmp_path: Path, option: str, pipeline: Any, capsys: pytest.CaptureFixture[str]
):
    if option == "--drive":
        other = tmp_path / "drive.gif"
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(other)
    else:
        other = tmp_path / "embedding.npy"
        np.save(other, EMBEDDINGS[0])
    before = other.read_bytes()
    assert generate(bundle, photo, option, other, "--format", "gif", "--out", other) == 1
    assert f"is the same as {option}" in capsys.readouterr().err
    assert other.read_bytes() == before


def test_a_file_of_the_bundle_is_not_replaced(
    bundle: Bundle, photo: Path, pipeline: Any, capsys: pytest.CaptureFixture[str]
):
    assert generate(bundle, photo, "--label", "anger", "--out", bundle.path / "embeddings.npz") == 1
    assert "is embeddings.npz of BUNDLE" in capsys.readouterr().err
    Bundle.open(bundle.path)


def test_the_tilde_of_every_path(
    bundle: Bundle, photo: Path, tmp_path: Path, pipeline: Any, monkeypatch: pytest.MonkeyPatch
):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    photo.rename(home / "photo.png")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(here)
    assert generate(bundle, "~/photo.png", "--label", "anger", "--out=~/clip.gif", "-q") == 0
    assert generate(bundle, "~/photo.png", "--label", "anger", "--out=~/frames/", "-q") == 0
    assert sorted(path.name for path in home.iterdir()) == ["clip.gif", "frames", "photo.png"]
    assert list(here.iterdir()) == []
    assert write_fake_bundle(Path("~/bundle")).path == home / "bundle"
    assert Bundle.open("~/bundle").path == home / "bundle"
    assert export_main(["--lfae=~/lfae.pth", "--dm=~/dm.pth", "--out=~nobody-of-this-name/bundle", "-q"]) == 1
    assert list(here.iterdir()) == []


def test_a_clip_goes_to_stdout_and_words_to_stderr(bundle: Bundle, photo: Path, tmp_path: Path):
    code = """
import numpy as np
from lfdm_export.pictures.clip import Clip
args.out = "/dev/stdout"
def work():
    zeros = lambda *shape: np.zeros(shape, np.uint8)
    clip = Clip(zeros(1, 2, 16, 16, 3), zeros(1, 2, 16, 16, 3), zeros(1, 3, 2, 4, 4), zeros(1, 16, 16, 3), False)
    console.say(args, clip.save(args.out, format="gif"))
    return 0
raise SystemExit(console.run("lfdm-test", args, work))
"""
    process = subprocess.run([sys.executable, "-c", _COMMAND + code], capture_output=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout.startswith(b"GIF89a")
    assert process.stdout.endswith(b";")
    assert b"/dev/stdout" in process.stderr


def test_a_report_that_cannot_be_kept_is_shown(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    class Shown:
        passed = True

        def write(self, folder: Path) -> Path:
            raise BundleError(f"the report cannot be written to {folder} (Read-only file system)")

        def table(self) -> str:
            return "all checks passed"

    monkeypatch.setattr("lfdm_export.parity.verify.verify_bundle", lambda *_, **__: Shown())
    assert verify_main([str(bundle.path)]) == 0
    printed = capsys.readouterr()
    assert "all checks passed" in printed.out
    assert printed.err.count("\n") == 1
    assert "lfdm-verify: warning: the report cannot be written to" in printed.err


@pytest.mark.parametrize("name", ["bundle", "bundle/triton", "."])
def test_a_repository_and_its_bundle_lie_apart(tmp_path: Path, name: str):
    with pytest.raises(Exception, match="must not contain each other"):
        require_apart(tmp_path / "bundle", tmp_path / name)
    require_apart(tmp_path / "bundle", tmp_path / "triton")


def test_a_bundle_whose_path_is_not_utf8_is_refused_before_it_is_made(tmp_path: Path):
    with pytest.raises(InputError, match=r"\\xff: the path is not UTF-8"):
        write_fake_bundle(tmp_path / "\udcff")
    assert list(tmp_path.iterdir()) == []
