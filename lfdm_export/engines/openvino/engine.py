"""Runs the graph of a stage in OpenVINO on the CPU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.checks import Array, check_feeds, check_outputs
from lfdm_export.engines.compiled_cache import CompiledCache, user_compiled_cache
from lfdm_export.engines.openvino.cache import cache_key
from lfdm_export.engines.openvino.target import OPENVINO
from lfdm_export.engines.target_spec import Target
from lfdm_export.errors import EngineError, MissingDependencyError
from lfdm_export.graphs.file import walk
from lfdm_export.machine import engine_threads
from lfdm_export.stages import BATCH, StageSpec
from lfdm_export.telemetry import import_openvino
from lfdm_export.wording import one_line

# Precisions in which the plugin may compute float32 operators in bf16; a graph of fp16 marks what is rounded.
_HINTED = ("bf16", "int8")
_DEVICE = "CPU"
_ONE_AT_A_TIME = threading.Lock()
# Marks in a graph that its weights are in the memory of this process, where this module has mapped their file.
_MAPPED = "*/_ORT_MEM_ADDR_/*"


class OpenVinoEngine:
    """One loaded stage.

    Loading reads the graph. The first run with a batch compiles it: for the typical batch of the stage with
    fixed shapes, which is faster (the published UNet step by a sixth), and once for all others. Call `run`
    from one thread at a time.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        spec: StageSpec,
        *,
        threads: int | None = None,
        precision: str = "fp32",
        cache: CompiledCache | None = None,
    ) -> None:
        """Load a graph and compare its interface with the stage.

        Args:
            path: the .onnx file; external data is in the same folder.
            spec: the expected stage.
            threads: threads per run; None uses every core that this process may use.
            precision: "fp32", "tf32" and "fp16" compute in float32 where the graph leaves it open; "bf16" lets the
                plugin compute in bf16 wherever that is faster, except for the update of the sampler, the sampling
                coordinates and everything after the last convolution; "int8" does the same with everything that an
                int8 graph does not quantize, if the processor has bf16.
            cache: cache of compiled graphs, read only if graph, weights, versions, processor and options are the
                same. None compiles each time.

        Raises:
            EngineError: the file cannot be loaded, is another stage, or the processor lacks the precision.
            MissingDependencyError: OpenVINO, or a package that prepares graphs for it, is not installed.
        """
        self.path, self.spec = Path(path), spec
        self._core = shared_core()
        self._options = _options(self._core, engine_threads(threads), precision)
        if not self.path.is_file():
            raise EngineError(f"there is no graph at {self.path}; export again")
        self._graph, self._weights, self._identity = _graph_and_weights(self.path, spec)
        self._used = {name for port in self._model(batch=None).inputs for name in port.get_names()}
        self._cache = cache
        self._requests: dict[int | None, Any] = {}

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run the stage once; see `lfdm_export.engines.interface.Engine`."""
        axes = check_feeds(self.spec, feeds)
        contiguous = {name: np.ascontiguousarray(array) for name, array in feeds.items() if name in self._used}
        try:
            values = self._request(axes).infer(contiguous, share_inputs=True, share_outputs=True)
            # Copied, because the next run of the request writes into the same arrays.
            outputs: dict[str, Array] = {t.name: np.array(values[t.name]) for t in self.spec.outputs}
        except RuntimeError as error:
            raise EngineError(f"stage {self.spec.name!r} failed in OpenVINO: {one_line(error)}") from error
        check_outputs(self.spec, outputs, axes)
        return outputs

    def _request(self, axes: Mapping[str, int]) -> Any:
        usual = set(axes) == {BATCH} and axes[BATCH] == self.spec.batch[1]
        batch = axes[BATCH] if usual else None
        if batch not in self._requests:
            self._requests[batch] = self._compiled(batch).create_infer_request()
        return self._requests[batch]

    def _compiled(self, batch: int | None) -> Any:
        """The graph compiled for a batch, or for any batch."""
        if self._cache is None:
            return self._core.compile_model(self._model(batch), _DEVICE, self._options)
        key = cache_key(self._identity, self._weights, {**self._options, "batch": batch})
        entry = f"{self.spec.name}-{'any' if batch is None else batch}"
        blob = self._cache.read(entry, key)
        if blob is not None:
            with contextlib.suppress(RuntimeError):  # the plugin claims to be the same, but is not: compile again
                return self._core.import_model(blob, _DEVICE, self._options)
        compiled = self._core.compile_model(self._model(batch), _DEVICE, self._options)
        self._cache.write(entry, key, compiled.export_model().getbuffer())
        return compiled

    def _model(self, batch: int | None) -> Any:
        """The graph that the plugin compiles."""
        try:
            model = self._core.read_model(model=self._graph)
        except RuntimeError as error:
            raise EngineError(f"OpenVINO cannot load {self.path}: {one_line(error)}; export again") from error
        if batch is not None:
            shapes = {tensor.name: list(tensor.concrete(**{BATCH: batch})) for tensor in self.spec.inputs}
            model.reshape({name: shape for name, shape in shapes.items() if name in self._used})
        keep_coordinates(model)
        return model


def open_engine(bundle: Bundle, stage: str, target: Target, threads: int | None, _device: str) -> OpenVinoEngine:
    """The engine of a stage, with the user's cache of compiled graphs.

    Raises:
        EngineError: the graph cannot be loaded, or the processor lacks its precision.
        InputError: LFDM_CACHE_SIZE is not a size.
        MissingDependencyError: a package is not installed.
    """
    return OpenVinoEngine(
        bundle.stage_path(stage),
        bundle.stages[stage],
        threads=threads,
        precision=bundle.manifest.precision,
        cache=user_compiled_cache(target),
    )


def keep_coordinates(model: Any) -> None:
    """Make every sampling grid an output, so that the bf16 hint leaves its computation in float32.

    The plugin rounds nothing on the path to an output after the last product, convolution or Resize: its rule to
    keep the tail of a network exact. Measured on the published decoder: 61 dB instead of 46 dB.

    Args:
        model: an `openvino.Model`, changed in place.
    """
    grids = {}
    for node in model.get_ops():
        if node.get_type_name() == "GridSample":
            grid = node.input_value(1)
            if grid.get_node().get_type_name() != "Constant":
                grids[grid.get_node().get_friendly_name(), grid.get_index()] = grid
    if grids:
        model.add_outputs(list(grids.values()))


def _options(core: Any, threads: int, precision: str) -> dict[str, Any]:
    known = OPENVINO.cpu_precisions
    if precision not in known:
        raise EngineError(f"unknown precision {precision!r} for OpenVINO; expected one of {', '.join(known)}")
    hint = "bf16" if precision in _HINTED else "f32"
    if hint == "bf16" and "BF16" not in core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES"):
        if precision == "bf16":
            raise EngineError("this processor has no bf16 for OpenVINO (AVX-512 BF16 or AMX); export fp32 and use that")
        hint = "f32"
    # Pinned threads would compete for cores with those of the engines of other stages.
    return {
        "INFERENCE_PRECISION_HINT": hint,
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }


def _graph_and_weights(path: Path, spec: StageSpec) -> tuple[bytes, dict[str, NDArray[np.uint8]], bytes]:
    """The graph of a stage with bodies for OpenVINO, its mapped weights by file, and what identifies the graph.

    The graph refers to the mapped memory. Stages of one network map the same file, so its pages are in memory once.
    """
    try:
        import onnx

        from lfdm_export.graphs.bodies import with_bodies
        from lfdm_export.graphs.stored import load_stage
    except ImportError as error:
        raise MissingDependencyError(error.name or "onnx", "preparing a graph for OpenVINO", OPENVINO.extra) from error
    stored = load_stage(path, spec)
    model = with_bodies(stored, OPENVINO.bodies)
    identity = hashlib.sha256(model.SerializeToString(deterministic=True)).digest()
    weights: dict[str, NDArray[np.uint8]] = {}
    mapped = 0
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        mapped += 1
        entries = {entry.key: entry.value for entry in tensor.external_data}
        name, start, length = entries["location"], int(entries.get("offset", 0)), int(entries.get("length", -1))
        if name not in weights:
            weights[name] = _mapped(path, name)
        if start < 0 or length < 0 or start + length > len(weights[name]):
            raise EngineError(f"{path.parent / name} is too short for {tensor.name}; export again")
        del tensor.external_data[:]
        address = weights[name].ctypes.data + start
        for key, value in (("location", _MAPPED), ("offset", address), ("length", length)):
            tensor.external_data.add(key=key, value=str(value))
    serialized = model.SerializeToString()
    # OpenVINO would accept any address in this process that a graph from a stranger contains.
    if sum(data.location == _MAPPED for data in walk(serialized).external) != mapped:
        raise EngineError(f"{path} keeps weights outside of its initializers, which OpenVINO cannot map; export again")
    return serialized, weights, identity


def _mapped(path: Path, name: str) -> NDArray[np.uint8]:
    """Map a file of weights in the folder of a graph."""
    try:
        return np.memmap(path.parent / name, np.uint8, mode="r")
    except (OSError, ValueError) as error:
        raise EngineError(f"OpenVINO cannot load {path}: {one_line(error)}; export again") from error


def shared_core() -> Any:
    """The `openvino.Core` of this process, the same for all threads; it is never released.

    Its CPU plugin gives the loading thread a stack for signals, and frees the memory with the last core that
    uses it, but does not remove it from the thread: the next signal would write to whatever is there by then.
    Observed with OpenVINO 2026.4 on a processor with AMX: a crash at SIGTERM, or freed memory overwritten.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
    """
    with _ONE_AT_A_TIME:
        return _core()


@functools.cache
def _core() -> Any:
    try:
        return import_openvino().Core()
    except ImportError as error:
        raise MissingDependencyError("openvino", "running a bundle with OpenVINO", OPENVINO.extra) from error
