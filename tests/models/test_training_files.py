"""Files of training runs: whole or not at all, like those of the toolkit."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lfdm_models.training.cli import main
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.files import refuse_input, save, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, content: bytes = b"new") -> None:
    write_whole(path, lambda part: part.write_bytes(content))


@pytest.mark.parametrize("name", ["lfae.pth", "x" * 255, "日" * 85])
def test_a_file_is_written_whole(tmp_path: Path, name: str):
    write(tmp_path / "run" / name)
    assert names(tmp_path / "run") == [name]
    assert (tmp_path / "run" / name).read_bytes() == b"new"


def test_equal_content_gives_equal_files(tmp_path: Path):
    for name in ("one.pth", "another-name.pth"):
        save(tmp_path / name, {"weights": {"a": torch.arange(5.0)}, "step": 3, "labels": ["nod"]})
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "another-name.pth").read_bytes()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_keeps_the_old_file(tmp_path: Path, error: BaseException):
    def fail(part: Path) -> None:
        part.write_bytes(b"half")
        raise error

    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises((TrainingError, KeyboardInterrupt)):
        write_whole(tmp_path / "file", fail)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_links_are_written_through_and_devices_written_to(tmp_path: Path):
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"
    write(Path("/dev/null"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    assert names(tmp_path) == ["link", "real"]


def test_what_a_killed_run_left_goes_and_what_another_is_at_stays(tmp_path: Path):
    code = f"""
import sys
from pathlib import Path
from lfdm_models.training.files import write_whole
def fill(part):
    part.write_bytes(b"half")
    print("writing", flush=True)
    sys.stdin.read()
write_whole(Path({str(tmp_path / "other")!r}), fill)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    write(tmp_path / "file")
    assert len(names(tmp_path)) == 2, "the other's is locked"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    write(tmp_path / "file")
    assert names(tmp_path) == ["file"]


def test_an_input_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    start = tmp_path / "run" / "dm.pth"
    write(start, b"weights")
    (tmp_path / "hard").hardlink_to(start)
    with pytest.raises(TrainingError, match="is the same file as --start"):
        refuse_input(start, {"--lfae": None, "--start": tmp_path / "hard"})
    refuse_input(tmp_path / "new", {"--start": start})
    arguments = ["dm", "--lfae", str(tmp_path / "lfae.pth"), "--start", str(tmp_path / "hard"), "--steps", "1"]
    assert main([*arguments, "--out", str(tmp_path / "run"), "-q"]) == 1
    assert "is the same file as --start" in capsys.readouterr().err
    assert start.read_bytes() == b"weights"


def test_the_tilde_and_control_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    assert main(["lfae", "--data", "mug", "--root", "~/no\x1b[31m", "--out", "~/run", "--steps", "1", "-q"]) == 1
    said = capsys.readouterr().err
    assert f"{tmp_path}/no\\x1b[31m" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out: a path is empty"),
        ("s3://bucket/run", "--out: s3://bucket/run is an address, expected a file"),
        ("~nobody-of-this-name/run", "--out: the home folder ~nobody-of-this-name of"),
    ],
)
def test_what_is_no_path_becomes_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str, message: str
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["lfae", f"--out={out}", "--steps", "1"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
