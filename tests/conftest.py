from __future__ import annotations

import hashlib
import os
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.ops.cuda.host import HostKernels
    from lfdm_export.ops.cuda.source import Kernel
    from lfdm_models.model import LfdmModel
    from tests.running_server import RunningServer

ROOT = Path(__file__).resolve().parents[1]
#: Environment variables of shells, CI systems or containers that change how programs behave or print.
FOREIGN = (
    "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONDEVMODE",
    "PYTHONFAULTHANDLER", "PYTHONWARNINGS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "WORLD_SIZE", "RANK",
    "LOCAL_RANK", "LFDM_BUNDLE",
)  # fmt: skip

#: Long files that need no bundle: they come first, while another process exports the small one.
WITHOUT_BUNDLE = (
    "ops/test_kernels.py", "benchmarks/test_gpu_suite.py", "test_imports.py", "models/test_training.py",
    "parity/test_golden.py", "models/test_training_recipe.py", "ops/test_kernels_in_modules.py",
)  # fmt: skip
#: Files that share one Triton server: if processes of pytest-xdist divided them, each would start its own.
ONE_SERVER = ("serving/test_triton_server.py", "client/test_client_server.py", "security/test_live_server.py")
#: Other long files, which follow.
WITH_BUNDLE = (
    "serving/test_triton_faults.py", "engines/test_openvino_engine.py", "parity/test_verify_engines.py",
    "parity/test_verify.py", "engines/test_torch_engine.py", "quantize/test_quantize_export.py",
    "engines/test_tensorrt_build.py", "evaluation/test_evaluate.py",
)  # fmt: skip
FIRST = (*WITHOUT_BUNDLE, *ONE_SERVER, *WITH_BUNDLE)


def pytest_configure(config: pytest.Config) -> None:
    # Must precede the imports of torch and rich; commands that tests start inherit it.
    for name in FOREIGN:
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm-256color"
    # Else every process that tests start compiles the project's files again.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    # A shell that starts the tests in the background has SIGINT ignored; tests interrupt themselves and their children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The small models of the default tests run faster on one thread; the full-size chains need every core.
    if config.option.markexpr != "full":
        os.environ["OMP_NUM_THREADS"] = "1"
    # Engines that tests compile are of no use in the user's cache.
    os.environ.setdefault("LFDM_CACHE_SIZE", "0")
    # Only tests that request the self-check compare engines; the others do not load two engines to choose one.
    os.environ.setdefault("LFDM_SELF_CHECK", "0")


def file_of(nodeid: str) -> str:
    """The file of a test, within the folder of tests."""
    return nodeid.partition("::")[0].removeprefix("tests/")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take long, so that none of them is still running when the others are done."""
    places = {file: place for place, file in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(file_of(item.nodeid), len(FIRST)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """``--dist loadfile``, in the order of `pytest_collection_modifyitems`, and with one process for `ONE_SERVER`."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class LoadFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "one server" if file_of(nodeid) in ONE_SERVER else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return LoadFile(config, log)


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
def loaded_once() -> Iterator[None]:
    """Reuse ONNX Runtime's sessions of equal graphs, weights and options: loading takes longer than running."""
    from lfdm_export.engines.onnxruntime import engine

    sessions: dict[object, Any] = {}
    real = engine.open_session

    def open_session(path: Path, **options: Any) -> Any:
        graph = path.read_bytes() if path.is_file() else b""
        weights = [data.read_bytes() for data in sorted(path.parent.glob("*.data")) if data.name.encode() in graph]
        key = (hashlib.sha256(b"".join([graph, *weights])).digest(), *sorted(options.items()))
        if key not in sessions:
            sessions[key] = real(path, **options)
        return sessions[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "open_session", open_session)
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


def built_once(kernels: Sequence[Kernel], library: Path) -> HostKernels:
    """Build kernels for the host, if no other process has done or is doing so."""
    from lfdm_export.files.atomic import locked
    from lfdm_export.ops.cuda.host import HostKernels, build

    library.parent.mkdir(exist_ok=True)
    with locked(library.parent):
        if not library.exists():
            build(kernels, library.with_name(f"new-{library.name}")).rename(library)
    return HostKernels(library, kernels)


@pytest.fixture(scope="session")
def device_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels of a chain that stays on a device, built for the host."""
    from lfdm_export.ops.pictures.kernels import not_finite_kernel, pictures_kernel
    from lfdm_export.ops.thresholded_step.kernels import noise_kernel

    kernels = (noise_kernel(), pictures_kernel(), not_finite_kernel())
    return built_once(kernels, shared_folder(tmp_path_factory) / "device" / "kernels.so")


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """All kernels, built for the host."""
    from tests.kernel_arrays import KERNELS

    return built_once(KERNELS, shared_folder(tmp_path_factory) / "kernels" / "kernels.so")


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
