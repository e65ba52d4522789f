from __future__ import annotations

import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.ops.cuda.host import HostKernels
    from lfdm_models.model import LfdmModel
    from tests.running_server import RunningServer

ROOT = Path(__file__).resolve().parents[1]
#: Environment variables of shells, CI systems or containers that change how programs behave or print.
FOREIGN = (
    "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONDEVMODE",
    "PYTHONFAULTHANDLER", "PYTHONWARNINGS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "WORLD_SIZE", "RANK",
    "LOCAL_RANK", "LFDM_BUNDLE",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # Must precede the imports of torch and rich; commands that tests start inherit it.
    for name in FOREIGN:
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm-256color"
    # A shell that starts the tests in the background has SIGINT ignored; tests interrupt themselves and their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The small models of the default tests run faster on one thread; the full-size chains need every core.
    if config.option.markexpr != "full":
        os.environ["OMP_NUM_THREADS"] = "1"
    # Engines that tests compile are of no use in the user's cache.
    os.environ.setdefault("LFDM_CACHE_SIZE", "0")
    # Only tests that request the self-check compare engines; the others do not load two engines to choose one.
    os.environ.setdefault("LFDM_SELF_CHECK", "0")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """Seed torch's global state, so that a test's draws do not depend on earlier tests."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


#: Largest absolute errors against golden arrays, by name of the comparison; printed after the tests.
GOLDEN_ERRORS = pytest.StashKey[dict[str, float]]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    errors = config.stash.get(GOLDEN_ERRORS, {})
    if errors:
        terminalreporter.section("largest absolute errors against the golden cases")
        for name, error in errors.items():
            terminalreporter.write_line(f"{name:<50} {error:.1e}")


@pytest.fixture(scope="session")
def golden_errors(request: pytest.FixtureRequest) -> dict[str, float]:
    return request.config.stash.setdefault(GOLDEN_ERRORS, {})


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder of golden cases and images, beside the repository."""
    path = ROOT.parent / "shared"
    assert path.is_dir(), f"{path} is missing: the golden cases lie beside the repository"
    return path


@pytest.fixture(scope="session")
def golden_checkpoints(
    shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, Path]]]:
    """Checkpoints (LFAE, DM) of published size per golden variant: 0.9 GB in all, removed at the end."""
    make = runpy.run_path(str(shared_dir / "golden" / "make_checkpoints.py"))["make"]
    folder = tmp_path_factory.mktemp("golden")
    yield {name: make(name, folder / name) for name in ("mug128", "natops128")}
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def small_model() -> LfdmModel:
    """The small untrained model; read-only."""
    from lfdm_models.demo import untrained_model

    return untrained_model()


@pytest.fixture(scope="session")
def small_bundle(small_model: LfdmModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bundle of the small model: 10 frames of 64 pixels, with a partial last chunk of decoding; read-only."""
    from lfdm_export import Bundle

    return Bundle.open(export_small(small_model, shared_folder(tmp_path_factory)))


def export_small(model: LfdmModel, shared: Path) -> Path:
    """Export the small model into a shared folder, if no other process has done or is doing so."""
    from lfdm_export import export_bundle
    from lfdm_export.files.atomic import locked

    folder = shared / "small"
    folder.mkdir(exist_ok=True)
    bundle = folder / "export" / "bundle"
    with locked(folder):
        if not bundle.exists():
            export_bundle(model, bundle, frames=10, image_size=64)
    return bundle


_EXPORT_SMALL = """
import sys, pathlib, torch
from lfdm_models.demo import untrained_model
from tests.conftest import export_small
torch.set_num_threads(1)
export_small(untrained_model(), pathlib.Path(sys.argv[1]))
"""


@pytest.fixture(scope="session", autouse=True)
def small_bundle_ahead(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Begin the small bundle beside the first tests, so that the processes of pytest-xdist do not all wait for it."""
    wanted = any("small_bundle" in getattr(item, "fixturenames", ()) for item in request.session.items)
    if not wanted or os.environ.get("PYTEST_XDIST_WORKER") != "gw0":
        yield
        return
    command = [sys.executable, "-c", _EXPORT_SMALL, os.fspath(shared_folder(tmp_path_factory))]
    process = subprocess.Popen(command, cwd=ROOT)
    yield
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def traced_already(small_bundle: Bundle) -> Iterator[None]:
    """Reuse the graphs of the small bundle for exports of 10 frames of a model with the small architecture."""
    import onnx_ir as ir

    from lfdm_export.export import bundle_export

    graphs = {name: ir.load(small_bundle.stage_path(name)) for name in small_bundle.stages}
    for graph in graphs.values():
        ir.external_data.load_to_model(graph)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            bundle_export,
            "trace_graphs",
            lambda _model, _encoder, specs, *_: {name: graphs[name].clone() for name in specs},
        )
        yield


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Cache OpenVINO's compiled models during the tests, shared by all test files with equal graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LFDM_CACHE_SIZE", "2GB")
        patch.setenv("XDG_CACHE_HOME", os.fspath(shared_folder(tmp_path_factory) / "cache"))
        yield


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder shared by the worker processes of pytest-xdist; each worker's own folder is inside."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def device_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels of a chain that stays on a device, built for the host."""
    from lfdm_export.ops.cuda.host import HostKernels, build
    from lfdm_export.ops.pictures.kernels import not_finite_kernel, pictures_kernel
    from lfdm_export.ops.thresholded_step.kernels import noise_kernel

    kernels = (noise_kernel(), pictures_kernel(), not_finite_kernel())
    return HostKernels(build(kernels, tmp_path_factory.mktemp("device") / "kernels.so"), kernels)


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """All kernels, built for the host."""
    from lfdm_export.ops.cuda.host import HostKernels, build
    from tests.kernel_arrays import KERNELS

    return HostKernels(build(KERNELS, tmp_path_factory.mktemp("kernels") / "kernels.so"), KERNELS)


@pytest.fixture(scope="session")
def triton_server(small_bundle: Bundle) -> Iterator[RunningServer]:
    """A real Triton server on the small bundle, shared by all test files; only for requests that do not change it."""
    from lfdm_export.serving.server.files import install_server
    from tests.running_server import ServeCommand

    install_server()  # downloads nothing if installed, as after `make server`
    command = ServeCommand(small_bundle.path, "--threads=1", "--slots=4")
    try:
        yield command.server
    finally:
        errors = command.stop()
    assert command.process.returncode == 0, errors
    assert "Traceback" not in errors, errors
