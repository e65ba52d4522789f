"""Builds a plan from the graph of a stage, with TensorRT or TensorRT for RTX, in a separate process.

A builder uses gigabytes and may crash: its process frees the memory, and its crash is an error in the parent.
``python -m lfdm_export.engines.tensorrt.build FOLDER`` reads FOLDER/request.json and FOLDER/graph.onnx, and writes
FOLDER/plan, FOLDER/layers.json and FOLDER/result.json.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfdm_export.engines.cuda_driver import find_gpus
from lfdm_export.engines.target_spec import Target
from lfdm_export.engines.targets import spec_of
from lfdm_export.engines.tensorrt.api import Api, load_api
from lfdm_export.engines.tensorrt.grid_samples import set_grid_sampling
from lfdm_export.engines.tensorrt.plans import BuildOptions
from lfdm_export.engines.tensorrt.target import TENSORRT, TENSORRT_RTX
from lfdm_export.errors import EngineError, LfdmExportError
from lfdm_export.files.atomic import write_file
from lfdm_export.files.json_codec import from_plain, to_plain
from lfdm_export.stages import BATCH, TOKENS, StageSpec

GRAPH, REQUEST, RESULT, PLAN, LAYERS = "graph.onnx", "request.json", "result.json", "plan", "layers.json"
#: Smallest, typical and largest number of tokens of a text.
TOKENS_PROFILE = (1, 16, 512)
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class BuildRequest:
    """The input of the builder.

    Attributes:
        target: "tensorrt" or "tensorrt-rtx".
        stage: name of the stage, for messages.
        weights_beside: path of the stored graph; the external weights are in its folder.
        profile: smallest, typical and largest shape of each input, by name.
        tf32: compute float32 products in TF32.
        gpus: architectures that RTX builds for.
        options: options of the builder, as `BuildOptions` describes.
        timing_cache: file to read and write; "" for none.
    """

    target: Target
    stage: str
    weights_beside: str
    profile: Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
    tf32: bool = False
    gpus: tuple[str, ...] = ()
    options: BuildOptions = field(default_factory=BuildOptions)
    timing_cache: str = ""


@dataclass(frozen=True)
class BuildResult:
    """The result of a build.

    Attributes:
        error: "" if the plan was written.
        seconds: time of parsing and building.
        peak_bytes: peak memory of the process.
        layers: numbers about the plan.
    """

    error: str = ""
    seconds: float = 0.0
    peak_bytes: int = 0
    layers: Mapping[str, object] = field(default_factory=dict)


def profile_of(spec: StageSpec) -> dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """Smallest, typical and largest shape of each input."""
    sizes = [{BATCH: batch, TOKENS: tokens} for batch, tokens in zip(spec.batch, TOKENS_PROFILE, strict=True)]
    return {
        tensor.name: (tensor.concrete(**sizes[0]), tensor.concrete(**sizes[1]), tensor.concrete(**sizes[2]))
        for tensor in spec.inputs
    }


def build_in_child(folder: Path, request: BuildRequest, graph: bytes) -> BuildResult:
    """Build in a child process.

    Args:
        folder: an empty folder; receives the plan as FOLDER/plan, and the output of the inspector as
            FOLDER/layers.json.
        request: the request.
        graph: the ONNX model for the builder; its large weights are external.

    Raises:
        EngineError: the builder rejects the graph, or its process dies.
        OSError: the folder is not writable.
    """
    (folder / GRAPH).write_bytes(graph)
    (folder / REQUEST).write_text(json.dumps(to_plain(request)), encoding="utf-8")
    what = f"{spec_of(request.target).title} could not build stage {request.stage!r}"
    process = subprocess.Popen(
        [sys.executable, "-m", "lfdm_export.engines.tensorrt.build", str(folder)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    try:
        _, words = process.communicate()
    finally:
        if process.poll() is None:  # interrupted
            process.kill()
            process.wait()
    try:
        result = from_plain(BuildResult, json.loads((folder / RESULT).read_bytes()), "result")
    except (OSError, ValueError):
        last = " ".join(words.decode(errors="replace").split())[-400:]
        raise EngineError(
            f"{what}: its process {_end(process.returncode)}{f'; it said: {last}' * bool(last)}"
        ) from None
    if result.error:
        raise EngineError(f"{what}: {result.error}")
    return result


def _end(status: int) -> str:
    if status >= 0:
        return f"ended with status {status} and no result"
    name = signal.Signals(-status).name if -status in list(signal.Signals) else f"signal {-status}"
    hint = " (perhaps out of memory)" if name == "SIGKILL" else ""
    return f"died of {name}{hint}"


def main(folder: str) -> int:
    """The child process: build the request, and report any failure in the result."""
    _die_with_parent()
    work = Path(folder)
    try:
        request = from_plain(BuildRequest, json.loads((work / REQUEST).read_bytes()), "request")
        result = _build(request, work)
    except LfdmExportError as error:
        result = BuildResult(error=str(error))
    except OSError as error:
        result = BuildResult(error=f"the plan cannot be written: {error.strerror or error}")
    (work / RESULT).write_text(json.dumps(to_plain(result)), encoding="utf-8")
    return 1 if result.error else 0


def _build(request: BuildRequest, work: Path) -> BuildResult:
    api = load_api(request.target)
    started = time.perf_counter()
    graph = (work / GRAPH).read_bytes()
    plan, layers = _built(api, request, graph)
    with (work / PLAN).open("wb") as file:
        file.write(plan)
    seconds = time.perf_counter() - started
    inspected = _inspected(api, plan)
    if inspected is not None:
        (work / LAYERS).write_text(inspected, encoding="utf-8")
    return BuildResult("", round(seconds, 2), _peak_bytes(), layers)


def _built(api: Api, request: BuildRequest, graph: bytes) -> tuple[Any, dict[str, object]]:
    """The serialized plan, and numbers about its network."""
    trt = api.module
    builder = trt.Builder(api.logger)
    if builder is None:
        raise EngineError(f"no builder: {api.take_errors()}")
    network = builder.create_network(_network_flags(api))
    parser = trt.OnnxParser(network, api.logger)
    if not parser.parse(graph, request.weights_beside):
        errors = [str(parser.get_error(index).desc()) for index in range(parser.num_errors)]
        raise EngineError(f"the graph is refused: {' '.join('; '.join(errors).split())[:600]}")
    misread = set_grid_sampling(trt, network)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in request.profile.items():
        profile.set_shape(name, smallest, usual, largest)
    config.add_optimization_profile(profile)
    _configure(api, config, request)
    cache = _timing_cache(config, request.timing_cache)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise EngineError(api.take_errors())
    if cache is not None:
        with contextlib.suppress(OSError):  # it only helps the next build
            write_file(request.timing_cache, bytes(config.get_timing_cache().serialize()))
    return plan, {**_layers(network), "grid samples that the parser misread": misread}


def _network_flags(api: Api) -> int:
    flags = api.module.NetworkDefinitionCreationFlag
    chosen = 1 << int(flags.STRONGLY_TYPED)
    if api.target == TENSORRT.name:
        from lfdm_export.ops.plugins import register_plugins

        register_plugins()
        chosen |= 1 << int(flags.PREFER_AOT_PYTHON_PLUGINS)
    return chosen


def _configure(api: Api, config: Any, request: BuildRequest) -> None:
    trt, options = api.module, request.options
    (config.set_flag if request.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    if api.target == TENSORRT_RTX.name:
        config.num_compute_capabilities = len(request.gpus)
        for index, gpu in enumerate(request.gpus):
            config.set_compute_capability(getattr(trt.ComputeCapability, gpu), index)
        # Else a stream that runs the plan cannot be captured in a CUDA graph.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        return
    levels = trt.HardwareCompatibilityLevel
    config.hardware_compatibility_level = {
        "none": levels.NONE,
        "ampere+": levels.AMPERE_PLUS,
        "same-capability": levels.SAME_COMPUTE_CAPABILITY,
    }[options.hardware_compatible]
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT)


def _timing_cache(config: Any, path: str) -> Any:
    """Kernel timings of earlier builds; TensorRT itself ignores those of another GPU or version."""
    if not path:
        return None
    try:
        known = Path(path).read_bytes()
    except OSError:
        known = b""
    cache = config.create_timing_cache(known)
    if not config.set_timing_cache(cache, False):
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, False)
    return cache


def _inspected(api: Api, plan: Any) -> str | None:
    """Inspector output for the plan, as JSON; None if the plan cannot be loaded, as for RTX without a GPU."""
    if not find_gpus()[0]:
        return None
    engine = api.module.Runtime(api.logger).deserialize_cuda_engine(plan)
    if engine is None:
        api.take_errors()
        return None
    return str(engine.create_engine_inspector().get_engine_information(api.module.LayerInformationFormat.JSON))


def _layers(network: Any) -> dict[str, object]:
    """The network as the builder read it: number of layers, by kind and by output data type."""
    kinds: Counter[str] = Counter()
    types: Counter[str] = Counter()
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        kinds[layer.type.name.lower()] += 1
        types.update(layer.get_output(i).dtype.name.lower() for i in range(layer.num_outputs))
    return {
        "network layers": network.num_layers,
        "of kind": dict(kinds.most_common()),
        "outputs of type": dict(types.most_common()),
    }


def _peak_bytes() -> int:
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _die_with_parent() -> None:
    """End the builder when its parent is killed (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
