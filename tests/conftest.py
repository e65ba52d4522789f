from __future__ import annotations

import os
import runpy
import shutil
import signal
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
#: What a user's shell, a CI system or a container may set, and what would change what programs do or print.
FOREIGN = (
    "COLUMNS", "FORCE_COLOR", "LINES", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHONDEVMODE",
    "PYTHONFAULTHANDLER", "PYTHONWARNINGS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "WORLD_SIZE", "RANK",
    "LOCAL_RANK", "LFDM_BUNDLE",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    # Before torch and rich are imported, and inherited by the commands that tests start.
    for name in FOREIGN:
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm-256color"
    # A shell that starts the tests in the background has it ignored; tests interrupt themselves and what they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # The small models of the ordinary tests run faster on one thread; the full-size chains want every core.
    if config.option.markexpr != "full":
        os.environ["OMP_NUM_THREADS"] = "1"
    # What tests compile is of no use to whoever runs them.
    os.environ.setdefault("LFDM_CACHE_SIZE", "0")
    # Engines are compared where tests ask for it; none of the others loads two of them in order to choose.
    os.environ.setdefault("LFDM_SELF_CHECK", "0")


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """A test's draws from torch's global state do not depend on the tests that ran before it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


#: Largest absolute errors against golden arrays, by what was compared; printed when the tests are done.
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
    """The folder of golden cases and photographs, which lies beside the repository."""
    path = ROOT.parent / "shared"
    assert path.is_dir(), f"{path} is missing: the golden cases lie beside the repository"
    return path


@pytest.fixture(scope="session")
def golden_checkpoints(
    shared_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Path, Path]]]:
    """(LFAE, DM) of published size for each golden variant: 0.9 GB in all, removed at the end."""
    make = runpy.run_path(str(shared_dir / "golden" / "make_checkpoints.py"))["make"]
    folder = tmp_path_factory.mktemp("golden")
    yield {name: make(name, folder / name) for name in ("mug128", "natops128")}
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def small_model() -> LfdmModel:
    """The small untrained model; not to be changed."""
    from lfdm_models.demo import untrained_model

    return untrained_model()


@pytest.fixture(scope="session")
def small_bundle(small_model: LfdmModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle of it, of 10 frames of 64 pixels, whose last decoded chunk is not full; not to be changed."""
    from lfdm_export import Bundle, export_bundle
    from lfdm_export.files.atomic import locked

    folder = shared_folder(tmp_path_factory) / "small"
    folder.mkdir(exist_ok=True)
    with locked(folder):
        if not (folder / "export" / "bundle").exists():
            export_bundle(small_model, folder / "export" / "bundle", frames=10, image_size=64)
    return Bundle.open(folder / "export" / "bundle")


@pytest.fixture(scope="module")
def traced_already(small_bundle: Bundle) -> Iterator[None]:
    """Exports of 10 frames of a model like the small one take the graphs that were traced for the small bundle."""
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
    """Keeps what OpenVINO compiles as long as the tests run, for all files of tests whose graphs are the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LFDM_CACHE_SIZE", "2GB")
        patch.setenv("XDG_CACHE_HOME", os.fspath(shared_folder(tmp_path_factory) / "cache"))
        yield


def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the processes among which pytest-xdist shares the tests: each has one of its own, inside of this one."""
    root = tmp_path_factory.getbasetemp()
    return root.parent if "PYTEST_XDIST_WORKER" in os.environ else root


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """All kernels, built for the host."""
    from lfdm_export.ops.cuda.host import HostKernels, build
    from tests.kernel_arrays import KERNELS

    return HostKernels(build(KERNELS, tmp_path_factory.mktemp("kernels") / "kernels.so"), KERNELS)


@pytest.fixture(scope="session")
def triton_server(small_bundle: Bundle) -> Iterator[RunningServer]:
    """A real Triton server on the small bundle, for requests that leave it as it is: one for all files of tests."""
    from lfdm_export.serving.server.files import install_server
    from tests.running_server import ServeCommand

    install_server()  # nothing is fetched where it is there, as after `make server`
    command = ServeCommand(small_bundle.path, "--threads=1", "--slots=4")
    try:
        yield command.server
    finally:
        errors = command.stop()
    assert command.process.returncode == 0, errors
    assert "Traceback" not in errors, errors
