"""TensorRT and TensorRT for RTX: one Python module each, with nearly the same names."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import spec_of
from lfdm_export.engines.tensorrt.target import OLDEST_TENSORRT, RTX_BINDINGS, RTX_LIBRARIES, TENSORRT, TENSORRT_RTX
from lfdm_export.errors import EngineError, MissingDependencyError

_log = logging.getLogger(__name__)

# RTX logs this once per process in any case; it is harmless.
_NOISE = "Thread context has not been set"


@dataclass(frozen=True)
class Api:
    """One of the two, loaded.

    Attributes:
        target: "tensorrt" or "tensorrt-rtx".
        module: its Python module.
        version: version of its libraries.
        logger: an `ILogger`; its ``errors`` holds the errors logged since the last `take_errors`.
    """

    target: Target
    module: Any
    version: str
    logger: Any

    @property
    def title(self) -> str:
        """Name and version, for messages and fingerprints."""
        return f"{spec_of(self.target).title} {self.version}"

    def take_errors(self) -> str:
        """The errors logged since the last call, in one line."""
        errors, self.logger.errors[:] = list(self.logger.errors), []
        return "; ".join(" ".join(error.split()) for error in errors)[:600] or "it does not say why"


@functools.cache
def load_api(target: Target) -> Api:
    """Load the libraries and the module.

    Raises:
        MissingDependencyError: a package is not installed.
        EngineError: the packages do not match, or a library cannot be loaded.
    """
    spec = spec_of(target)
    try:
        module = _load_rtx() if target == TENSORRT_RTX.name else importlib.import_module("tensorrt")
    except ImportError as error:
        missing = next((name for name in spec.packages if importlib.util.find_spec(name) is None), None)
        if missing is not None:
            raise MissingDependencyError(missing, spec.title, spec.extra) from error
        raise EngineError(f"{spec.title} is installed but cannot be loaded: {error}") from error
    version = str(module.__version__)
    if target == TENSORRT.name and tuple(map(int, re.findall(r"\d+", version)[:2])) < OLDEST_TENSORRT:
        raise EngineError(
            f"TensorRT {version} is too old, expected {'.'.join(map(str, OLDEST_TENSORRT))} or newer; "
            "run: pip install --upgrade tensorrt"
        )
    return Api(target, module, version, _logger(module))


def refit_engine(api: Api, engine: Any, graph: bytes, weights_beside: str) -> None:
    """Load the weights of a graph of the same structure into a loaded engine.

    Raises:
        EngineError: the graph does not match, or lacks weights.
    """
    refitter = api.module.Refitter(engine, api.logger)
    parser = api.module.OnnxParserRefitter(refitter, api.logger)
    if not parser.refit_from_bytes(graph, weights_beside) or not refitter.refit_cuda_engine():
        raise EngineError(f"the weights do not fit the plan: {api.take_errors()}")


def _load_rtx() -> Any:
    """Load the bindings, with the libraries from the other package: importing that one loads them."""
    libraries = importlib.import_module(RTX_LIBRARIES)
    module = importlib.import_module(RTX_BINDINGS)
    expected = ".".join(str(module.__version__).split(".")[:3])
    folder = Path(str(libraries.__file__)).parent
    # Bindings and library of different versions crash, or misread each other's structures.
    found = sorted(path.name.partition(".so.")[2] for path in folder.glob("libtensorrt_rtx.so.*.*"))
    if found and expected not in found:
        raise EngineError(
            f"the bindings of TensorRT for RTX are of version {expected}, its libraries of {', '.join(found)}; "
            "install the two that belong together: pip install 'lfdm-export[tensorrt-rtx]'"
        )
    return module


def _logger(module: Any) -> Any:
    severity = module.ILogger.Severity
    errors = (severity.INTERNAL_ERROR, severity.ERROR)

    class Logger(module.ILogger):
        """Forwards messages to the logging of Python, and keeps errors for the exception that follows."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, level: Any, message: str) -> None:
            if level not in (*errors, severity.WARNING) or _NOISE in message:
                return
            if level in errors:
                self.errors.append(message)
            _log.debug("%s: %s", level, message)

    return Logger()
