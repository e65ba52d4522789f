"""How files are written: whole or not at all, through links, into devices and pipes, by one or by many."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.errors import InputError
from lfdm_export.files import atomic, folders
from lfdm_export.files.atomic import locked, rehearse, replacing, temporary_folder, write_file
from lfdm_export.files.digests import sha256_and_size
from lfdm_export.files.folders import give_back, publish, settle
from lfdm_export.files.names import require_utf8, user_name, user_path, visible
from lfdm_export.files.places import destination, refuse_inputs
from lfdm_export.pictures.clip import rehearse_saving
from lfdm_export.pictures.clip_files import ClipFormat, save_clip


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ------------------------------------------------------------------------------------------ files


def test_a_file_is_there_when_it_is_whole(tmp_path: Path):
    target = tmp_path / "new" / "file"
    with replacing(target) as stream:
        stream.write(b"all")
        assert not target.exists()
        assert [path.parent for path in tmp_path.rglob("*.part")] == [target.parent]
    assert target.read_bytes() == b"all"
    assert names(target.parent) == ["file"]


def write_half(target: Path, error: BaseException) -> None:
    with replacing(target) as stream:
        stream.write(b"half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_what_fails_leaves_nothing_and_keeps_the_old(tmp_path: Path, error: BaseException):
    old = tmp_path / "old"
    old.write_bytes(b"old")
    for target in (old, tmp_path / "new" / "folder" / "file"):
        with pytest.raises(type(error)):
            write_half(target, error)
    assert names(tmp_path) == ["old"]
    assert old.read_bytes() == b"old"


def test_no_room_for_what_is_still_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "file", b"new")
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_file_system_without_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unable(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", unable)
    write_file(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "日" * 85, "\udcff" * 255])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str):
    write_file(tmp_path / name, b"new")
    assert names(tmp_path) == [name]
    with temporary_folder(tmp_path / name) as part:
        assert part.is_dir()
    with pytest.raises(OSError, match="too long"):
        write_file(tmp_path / (name + "xx"), b"new")


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_a_new_file_has_the_usual_permissions_and_a_replaced_one_its_own(tmp_path: Path, umask: int):
    private = tmp_path / "private"
    private.touch()
    private.chmod(0o640)
    before = os.umask(umask)
    try:
        write_file(private, b"new")
        write_file(tmp_path / "new", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE(private.stat().st_mode) == 0o640
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask


def test_a_folder_is_not_replaced_by_a_file(tmp_path: Path):
    with pytest.raises(IsADirectoryError):
        write_file(tmp_path, b"new")


# ------------------------------------------------------------------------------ links, devices, pipes


@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_written_through(tmp_path: Path, there: bool):
    for folder in ("links", "files"):
        (tmp_path / folder).mkdir()
    real = tmp_path / "files" / "clip"
    if there:
        real.write_bytes(b"old")
    (tmp_path / "files" / "second").symlink_to("clip")
    link = tmp_path / "links" / "first"
    link.symlink_to("../files/second")
    write_file(link, b"new")
    assert link.is_symlink()
    assert real.read_bytes() == b"new"
    assert not real.is_symlink()
    assert names(tmp_path / "links") == ["first"]
    assert names(tmp_path / "files") == ["clip", "second"]


def test_a_loop_of_links(tmp_path: Path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match="symbolic links"):
        write_file(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink()


def test_a_pipe_is_written_to(tmp_path: Path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    with replacing(pipe) as stream:
        stream.write(b"xxx")
        stream.seek(0)  # some formats go back
        stream.write(b"new")
    reader.join()
    assert received == [b"new"]
    assert stat.S_ISFIFO(pipe.lstat().st_mode)


def test_devices_are_written_to():
    rehearse("/dev/null")
    write_file("/dev/null", b"new")
    with pytest.raises(OSError, match="No space left"):
        write_file("/dev/full", b"new")
    assert all(stat.S_ISCHR(Path(path).stat().st_mode) for path in ("/dev/null", "/dev/full"))


@pytest.mark.parametrize("name", ["/dev/fd/{}", "/proc/self/fd/{}"])
def test_an_open_file_of_this_process_goes_on_where_it_is(tmp_path: Path, name: str):
    with (tmp_path / "log").open("w+b") as log:
        log.write(b"before ")
        log.flush()
        write_file(name.format(log.fileno()), b"new")
        os.write(log.fileno(), b" after")
    assert (tmp_path / "log").read_bytes() == b"before new after"


def test_stdout_as_a_pipe():
    code = "from lfdm_export.files.atomic import write_file; write_file('/dev/stdout', b'new')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"new", b"")


# ---------------------------------------------------------------------------------------- leftovers

_WRITER = """
import os, sys, pathlib
from lfdm_export.files.atomic import replacing, temporary_folder
target = pathlib.Path(sys.argv[1])
with replacing(target) as stream, temporary_folder(target) as folder:
    (folder / "inside").write_bytes(b"half")
    stream.write(b"half")
    print("writing", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def writer(tmp_path: Path):
    started = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _WRITER, os.fspath(tmp_path / "file")]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path, writer: Callable[[], subprocess.Popen[str]]):
    process = writer()
    assert len(names(tmp_path)) == 2
    process.kill()
    process.wait()
    write_file(tmp_path / "another", b"new")
    assert names(tmp_path) == ["another"]


def test_a_large_folder_is_not_looked_through_at_each_write(
    tmp_path: Path, writer: Callable[[], subprocess.Popen[str]], monkeypatch: pytest.MonkeyPatch
):
    for number in range(1000):
        (tmp_path / f"{number}.gif").touch()
    process = writer()
    process.kill()
    process.wait()
    looked: list[object] = []
    real = os.scandir

    def counting(folder: Any) -> Any:
        looked.append(folder)
        return real(folder)

    monkeypatch.setattr("lfdm_export.files.atomic.os.scandir", counting)
    write_file(tmp_path / "first", b"new")
    assert [name for name in names(tmp_path) if name.startswith(".")] == [], "the first write clears up"
    (tmp_path / ".late.lfdm-0123456789ab.part").touch()
    for number in range(40):
        write_file(tmp_path / str(number), b"new")
    assert len(looked) <= 5
    assert [name for name in names(tmp_path) if name.startswith(".")] == [], "and so do later ones"


def test_a_folder_that_another_takes_for_a_leftover_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Between its making and its lock, a writer that clears up may remove it."""
    taken: list[Path] = []
    real = os.open

    def taking(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if not taken and str(path).endswith(".part"):
            taken.append(Path(path))
            Path(path).rmdir()
        return real(path, flags, *rest, **options)

    monkeypatch.setattr("lfdm_export.files.atomic.os.open", taking)
    with temporary_folder(tmp_path / "folder") as folder:
        assert taken
        assert folder not in taken
        (folder / "inside").write_bytes(b"whole")
    assert names(tmp_path) == []


def test_what_a_living_writer_is_at_stays(tmp_path: Path, writer: Callable[[], subprocess.Popen[str]]):
    process = writer()
    write_file(tmp_path / "file", b"of another")
    assert len(names(tmp_path)) == 3
    process.communicate("")
    assert process.returncode == 0
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"half"


def test_files_of_others_that_look_alike_stay(tmp_path: Path):
    mine = [".notes.part", ".lfdm-0123456789ab.part.txt", "a.lfdm-0123456789ab.part"]
    for name in mine:
        (tmp_path / name).touch()
    write_file(tmp_path / "file", b"new")
    assert names(tmp_path) == sorted(["file", *mine])


def test_without_locks_nothing_of_others_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unable(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    (tmp_path / ".a.lfdm-0123456789ab.part").touch()
    monkeypatch.setattr(atomic, "_flock", unable)
    write_file(tmp_path / "file", b"new")
    assert names(tmp_path) == [".a.lfdm-0123456789ab.part", "file"]


def test_those_who_lock_a_folder_take_turns(tmp_path: Path):
    with locked(tmp_path):
        other = os.open(tmp_path, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


# ------------------------------------------------------------------------------------------ folders


def replace_folder(target: Path, content: bytes, **options: object) -> None:
    with temporary_folder(target) as part:
        (part / "content").write_bytes(content)
        publish(part, target, **options)  # type: ignore[arg-type]


@pytest.fixture(params=["exchange", "renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "renames":
        monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    return str(request.param)


def test_a_folder_replaces_another_and_carries_on(tmp_path: Path, way: str):
    target = tmp_path / "target"
    replace_folder(target, b"old")
    (target / "plans").mkdir()
    target.chmod(0o700)
    replace_folder(target, b"new", carry=["plans"])
    assert names(tmp_path) == ["target"]
    assert names(target) == ["content", "plans"]
    assert (target / "content").read_bytes() == b"new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o700


def test_a_folder_that_is_not_to_be_replaced(tmp_path: Path):
    target = tmp_path / "target"
    replace_folder(target, b"old")
    replace_folder(target, b"new", replace=False)
    assert (target / "content").read_bytes() == b"old"
    assert names(tmp_path) == ["target"]


_KILLED = """
import os, pathlib, signal, sys
from lfdm_export.files import folders
from lfdm_export.files.atomic import temporary_folder
target, moment, exchange = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "exchange"
moments = iter(range(1000))
def kill(event, arguments):
    if event in ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "ctypes.call_function", "shutil.rmtree"):
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)
if not exchange:
    folders._exchange = lambda *_: False
sys.addaudithook(kill)
with temporary_folder(target) as part:
    (part / "content").write_bytes(b"new")
    folders.publish(part, target, carry=["plans"])
"""


@pytest.mark.parametrize("how", ["exchange", "renames"])
def test_whenever_a_swap_is_killed_the_old_folder_or_the_new_one_is_there(tmp_path: Path, how: str):
    found = set()
    for moment in range(100):
        target = tmp_path / how / str(moment) / "target"
        target.parent.mkdir(parents=True)
        replace_folder(target, b"old")
        (target / "plans").mkdir()
        command = [sys.executable, "-c", _KILLED, os.fspath(target), str(moment), how]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        assert give_back(target)
        found.add((target / "content").read_bytes())
        settle(target, carry=["plans"])
        assert names(target.parent) == ["target"]
        assert names(target) == ["content", "plans"]
        if done.returncode == 0:
            break
    assert done.returncode == 0, "never ended by itself"
    assert found == {b"old", b"new"}


def test_a_failure_between_two_renames_gives_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    target = tmp_path / "target"
    replace_folder(target, b"old")
    real = folders._rename

    def fail(old: Path, new: Path) -> None:
        if new == target and old.suffix == ".part":
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    monkeypatch.setattr(folders, "_rename", fail)
    with pytest.raises(KeyboardInterrupt):
        replace_folder(target, b"new")
    assert (target / "content").read_bytes() == b"old"
    assert names(tmp_path) == ["target"]


# -------------------------------------------------------------------------------------- names, places


def test_the_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", os.fspath(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert user_path("~/clip.gif") == tmp_path / "clip.gif"
    assert user_name("~/frames/") == f"{tmp_path}/frames/"
    assert user_path("./~/clip.gif") == Path("~/clip.gif")
    assert user_path("~$notes.docx") == Path("~$notes.docx"), "a file of that name, not a user"
    with pytest.raises(InputError, match=r"home folder ~nobody-of-this-name of .* is not known"):
        user_path("~nobody-of-this-name/clip.gif")
    with pytest.raises(InputError, match="null character"):
        user_path("a\0b")


def test_paths_that_are_not_utf8_are_blamed():
    assert require_utf8("/tmp/ö", "PyAV") == "/tmp/ö"
    with pytest.raises(InputError, match=r"/tmp/\\xff\.mp4: the path is not UTF-8, which PyAV needs"):
        require_utf8("/tmp/\udcff.mp4", "PyAV")


def test_terminals_obey_no_names():
    assert visible("a\x1b[31mb\x9bc\r\n\t\udcffd\u202ee") == r"a\x1b[31mb\x9bc\x0d\x0a\x09\xffd\u202ee"
    assert visible("Größe 日本 ✓ – 👩\u200d🎨\n", keep="\n") == "Größe 日本 ✓ – 👩\u200d🎨\n"


def test_an_output_that_is_an_input_is_refused(tmp_path: Path):
    photo, other = tmp_path / "photo", tmp_path / "other"
    photo.write_bytes(b"mine")
    other.write_bytes(b"mine")
    (tmp_path / "soft").symlink_to("photo")
    (tmp_path / "hard").hardlink_to(photo)
    for name in ("photo", "soft", "hard"):
        with pytest.raises(InputError, match=r"is the same as --image .*, which it would replace"):
            refuse_inputs(tmp_path / name, {"--drive": None, "--image": photo})
    refuse_inputs(other, {"--image": photo})
    refuse_inputs(tmp_path / "new", {"--image": photo})
    refuse_inputs("/dev/null", {"--image": "/dev/null"})


def test_a_file_of_a_folder_that_is_read_is_refused(tmp_path: Path):
    (tmp_path / "frames" / "more").mkdir(parents=True)
    for name in ("frames/0.png", "frames/more/1.png"):
        (tmp_path / name).touch()
        with pytest.raises(InputError, match=r"is [01]\.png of --drive"):
            refuse_inputs(tmp_path / name, {"--drive": tmp_path / "frames"})
    with pytest.raises(InputError, match="is the same as --drive"):
        refuse_inputs(tmp_path / "frames", {"--drive": tmp_path / "frames"})
    refuse_inputs(tmp_path / "frames" / "new.gif", {"--drive": tmp_path / "frames"})


def test_a_rehearsal_writes_nothing(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"old")
    rehearse(tmp_path / "file")
    rehearse(tmp_path / "new" / "deep" / "file")
    rehearse(tmp_path / "frames", as_folder=True)
    for wrong in (tmp_path, tmp_path / "file" / "below", tmp_path / ("x" * 256)):
        with pytest.raises(OSError, match=r"directory|too long"):
            rehearse(wrong)
    assert names(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.npz", "frames/", "/dev/null"])
def test_saving_a_clip_needs_no_folder_but_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    path = str(tmp_path / name) + "/" * name.endswith("/")
    form: ClipFormat | None = "gif" if name == "/dev/null" else None
    rehearse_saving(path, format=form)
    assert names(tmp_path) == []
    save_clip(path, np.zeros((2, 16, 16, 3), np.uint8), format=form)
    with pytest.raises(InputError, match=r"cannot be written: (Not a directory|File name too long)"):
        rehearse_saving(tmp_path / ("x" * 300 + ".gif"))


def test_a_video_comes_whole_through_a_pipe(tmp_path: Path):
    av = pytest.importorskip("av")
    pipe, received = tmp_path / "pipe", tmp_path / "received.mp4"
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: received.write_bytes(pipe.read_bytes()))
    reader.start()
    save_clip(pipe, np.zeros((5, 16, 16, 3), np.uint8), format="mp4")
    reader.join()
    with av.open(received) as container:
        assert sum(1 for _ in container.decode(video=0)) == 5
    content = received.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat"), "players can start before all is there"


def test_where_paths_lead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert destination("new").path == tmp_path / "new"
    assert destination(".").path == tmp_path
    assert destination("..").path == tmp_path.parent


def test_digests(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert sha256_and_size(tmp_path / "file") == (digest, 3)


def test_a_locale_of_ascii_keeps_other_names(tmp_path: Path):
    code = "import sys; from lfdm_export.files.atomic import write_file; write_file(sys.argv[1], b'1')"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    path = tmp_path / "клип é.gif"
    subprocess.run([sys.executable, "-c", code, os.fsencode(path)], env=environment, check=True)
    assert path.read_bytes() == b"1"
