"""Runs the graph of a stage in ONNX Runtime."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from lfdm_export.engines.checks import Array, check_feeds, check_outputs
from lfdm_export.engines.onnxruntime.gpu import gpu_graph, require_on_gpu
from lfdm_export.engines.onnxruntime.target import PROVIDERS, Device
from lfdm_export.errors import EngineError, MissingDependencyError
from lfdm_export.files.names import require_utf8
from lfdm_export.graphs.file import check_graph
from lfdm_export.machine import available_cores, engine_threads
from lfdm_export.stages import StageSpec
from lfdm_export.wording import one_line

#: Memory of the tensors of a device, as ONNX Runtime names it.
MEMORY = {device: "cpu" if device == "cpu" else "cuda" for device in PROVIDERS}
_CUDA = "CUDAExecutionProvider"
_ERRORS_ONLY = 3


class OnnxRuntimeEngine:
    """One loaded stage.

    Loading optimizes the graph and allocates memory for its weights. Call `run` from one thread at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: StageSpec,
        *,
        threads: int | None = None,
        device: Device = "cpu",
        tf32: bool = False,
    ) -> None:
        """Load a graph and compare its interface with the stage.

        Args:
            path: the .onnx file; external data is in the same folder.
            spec: the expected stage.
            threads: threads per run; None uses every core that this process may use.
            device: "cpu", "cuda", or an execution provider on it, "tensorrt" or "tensorrt-rtx". On a GPU, operators
                use the bodies for a GPU, and none may run on the CPU.
            tf32: let CUDA compute matrix products in TF32, its default.

        Raises:
            EngineError: the file cannot be loaded, is another stage, or the device is missing or cannot run all of it.
            MissingDependencyError: onnxruntime is not installed.
        """
        self.path, self.spec, self.device = Path(path), spec, device
        check_graph(self.path, spec)
        self._session = open_session(self.path, threads=threads, device=device, tf32=tf32)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stage once; see `lfdm_export.engines.interface.Engine`."""
        axes = check_feeds(self.spec, feeds)
        names = [tensor.name for tensor in self.spec.outputs]
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items()}
        try:
            values = self._session.run(names, contiguous)
        except Exception as error:  # the exceptions of onnxruntime share no other base
            raise EngineError(f"stage {self.spec.name!r} failed in ONNX Runtime: {one_line(error)}") from error
        outputs = cast(dict[str, Array], dict(zip(names, values, strict=True)))
        check_outputs(self.spec, outputs, axes)
        return outputs


def open_session(path: Path, *, threads: int | None = None, device: Device = "cpu", tf32: bool = False) -> Any:
    """Open an `onnxruntime.InferenceSession` with the options for every graph in a bundle; see `OnnxRuntimeEngine`.

    Raises:
        EngineError: the file cannot be loaded, or the device is not available or cannot run all of it.
        MissingDependencyError: onnxruntime is not installed.
    """
    options = _options(engine_threads(threads))
    return _load(path, options, _providers(device), on_gpu=device != "cpu", tf32=tf32)


def _options(threads: int) -> Any:
    ort = _onnxruntime()
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    # The pattern allocator maps and unmaps the whole arena per run: some 40,000 page faults for a UNet step.
    options.enable_mem_pattern = False
    options.inter_op_num_threads = 1
    options.log_severity_level = _ERRORS_ONLY
    # By default it counts the processors of the machine, and pins its threads to them whether this is allowed or not.
    options.intra_op_num_threads = threads
    spins = threads <= available_cores()  # with more threads than cores, those that spin block the others
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spins else "0")
    # Else its idle threads busy-wait while the engine of the next stage runs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    # It drops a Relu before a float8 QuantizeLinear, as if float8 had no negative values (1.32).
    options.add_session_config_entry("optimization.disable_specified_optimizers", "ReluQuantRewrite")
    return options


def _providers(device: Device) -> tuple[str, ...]:
    if device not in PROVIDERS:
        raise EngineError(f"unknown device {device!r}; expected {' or '.join(map(repr, PROVIDERS))}")
    first, *rest = PROVIDERS[device]
    available = _onnxruntime().get_available_providers()
    if first not in available:
        remedy = (
            f"take a build with {first}, or device 'cuda'"
            if device == "tensorrt-rtx"
            else "install it with: pip install 'lfdm-export[gpu]'"
        )
        raise EngineError(f"this onnxruntime cannot run on {device!r}; {remedy}")
    return (first, *(provider for provider in rest if provider in available))


def _load(path: Path, options: Any, providers: Sequence[str], *, on_gpu: bool, tf32: bool) -> Any:
    name = require_utf8(path, "ONNX Runtime")
    graph = gpu_graph(path, options) if on_gpu else name
    # Source: options of the CUDA provider of ONNX Runtime.
    told = [{"use_tf32": str(int(tf32))} if provider == _CUDA else {} for provider in providers]
    try:
        session = _onnxruntime().InferenceSession(graph, options, providers=list(providers), provider_options=told)
    except Exception as error:  # the exceptions of onnxruntime share no other base
        raise EngineError(f"ONNX Runtime cannot load {path}: {one_line(error)}; export again") from error
    if session.get_providers()[0] != providers[0]:  # it falls back to the CPU with only a log line
        raise EngineError(
            f"ONNX Runtime could not start {providers[0]} for {path}; check the GPU's driver and libraries"
        )
    session.disable_fallback()
    if on_gpu:
        require_on_gpu(session, path)
    return session


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError("onnxruntime", "running a bundle", "run") from error
    return onnxruntime
