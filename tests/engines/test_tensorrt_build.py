"""Real builds by TensorRT for RTX, which need no GPU; and the settings passed to TensorRT's own builder."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.cuda_driver import find_gpus
from lfdm_export.engines.tensorrt import api as tensorrt_api
from lfdm_export.engines.tensorrt import build as tensorrt_build
from lfdm_export.engines.tensorrt.api import Api, load_api
from lfdm_export.engines.tensorrt.build import BuildRequest, build_in_child, profile_of
from lfdm_export.engines.tensorrt.grid_samples import require_grid_sampling, set_grid_sampling
from lfdm_export.engines.tensorrt.plan_graph import builder_graph
from lfdm_export.engines.tensorrt.plans import BuildOptions, PlanFolder
from lfdm_export.errors import EngineError, MissingDependencyError
from lfdm_export.export.plans import PlanMade, make_plans
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.ops.cuda.host import find_compiler
from tests.fake_bundle import SPECS, fake_graph

#: One stage of each kind: an encoder, the sampling step with attention, warping, the LFAE's own path.
STAGES = ("encode", "step", "decode", "estimate_motion")


@pytest.fixture(scope="module")
def bundle(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy of the small bundle, for plans."""
    return Bundle.open(shutil.copytree(small_bundle.path, tmp_path_factory.mktemp("plans") / "bundle"))


@pytest.fixture(scope="module")
def made(bundle: Bundle) -> dict[str, PlanMade]:
    return {one.stage: one for one in make_plans(bundle, "tensorrt-rtx", stages=STAGES)}


# --------------------------------------------------------------------------- TensorRT for RTX itself


def test_rtx_builds_the_model_without_a_gpu(made: dict[str, PlanMade], bundle: Bundle):
    assert {stage: one.how for stage, one in made.items()} == dict.fromkeys(STAGES, "built")
    for one in made.values():
        assert one.path.stat().st_size == one.record.plan.bytes > 100_000
        assert one.record.seconds > 0
        assert 1e8 < one.record.peak_bytes < 4e9
        layers = one.record.layers
        assert isinstance(layers["of kind"], dict)
        assert sum(layers["of kind"].values()) == layers["network layers"]
    library = made["step"].record.fingerprint.library
    assert library == load_api("tensorrt-rtx").title
    assert library.startswith("TensorRT for RTX 1.7.1")
    leftovers = [path.name for path in PlanFolder(bundle.path, "tensorrt-rtx").path.iterdir() if path.name[0] == "."]
    assert leftovers == []


def test_what_was_built_is_what_the_graph_is_made_of(made: dict[str, PlanMade]):
    kinds: dict[str, Any] = {stage: one.record.layers["of kind"] for stage, one in made.items()}
    assert kinds["step"]["rotary_embedding"] > 0
    assert kinds["step"]["softmax"] > 0
    assert kinds["decode"]["grid_sample"] > 0
    assert made["decode"].record.fingerprint.grid_sampling == "linear, zeros outside, corners not aligned"
    assert made["decode"].record.layers["grid samples that the parser misread"] == 0
    assert kinds["encode"]["convolution"] == 4
    sources = made["step"].record.fingerprint.sources
    assert list(sources) == ["onnx/step.onnx", "onnx/unet.data"]


def test_the_plans_are_kept(made: dict[str, PlanMade], bundle: Bundle):
    again = make_plans(bundle, "tensorrt-rtx", stages=STAGES)
    assert [one.how for one in again] == ["kept"] * len(STAGES)
    assert [one.record for one in again] == [made[stage].record for stage in STAGES]


def test_a_plan_says_what_it_holds_but_does_not_run_here(made: dict[str, PlanMade], bundle: Bundle):
    gpus, reason = find_gpus()
    if gpus:
        return  # the plan does run here
    with pytest.raises(EngineError, match=rf"not available here: .* runs only on a GPU, and {re.escape(reason[:20])}"):
        StageRunner(bundle, target="tensorrt-rtx").engine("encode")


@pytest.mark.parametrize("gpus", [("SM89",), ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")])
def test_every_architecture_can_be_built_for(bundle: Bundle, tmp_path: Path, gpus: tuple[str, ...]):
    spec = bundle.stages["encode"]
    request = BuildRequest("tensorrt-rtx", "encode", str(bundle.stage_path("encode")), profile_of(spec), gpus=gpus)
    result = build_in_child(tmp_path, request, builder_graph(bundle, "encode", "tensorrt-rtx")[0])
    assert (tmp_path / "plan").stat().st_size > 100_000
    assert result.layers["network layers"] == 9


def test_a_graph_that_the_builder_refuses_is_told_in_its_words(tmp_path: Path):
    model = fake_graph(SPECS["denoise"], "    predicted_noise = Bernoulli (noisy_latent)\n")
    request = BuildRequest("tensorrt-rtx", "denoise", "x.onnx", profile_of(SPECS["denoise"]), gpus=("SM89",))
    with pytest.raises(
        EngineError, match=r"TensorRT for RTX could not build stage 'denoise': the graph is refused: .*"
    ):
        build_in_child(tmp_path, request, model.SerializeToString())
    assert not (tmp_path / "plan").exists()


def test_what_is_no_graph_at_all(tmp_path: Path):
    request = BuildRequest("tensorrt-rtx", "denoise", "x.onnx", profile_of(SPECS["denoise"]), gpus=("SM89",))
    with pytest.raises(EngineError, match="could not build stage 'denoise': the graph is refused"):
        build_in_child(tmp_path, request, b"no graph")


def test_a_plan_for_the_gpu_that_is_not_here_is_told(tmp_path: Path, bundle: Bundle):
    if find_gpus()[0]:
        return  # the GPU is here
    spec = bundle.stages["encode"]
    request = BuildRequest(
        "tensorrt-rtx", "encode", str(bundle.stage_path("encode")), profile_of(spec), gpus=("CURRENT",)
    )
    with pytest.raises(EngineError, match=r"could not build stage 'encode': .*[Cc][Uu][Dd][Aa]"):
        build_in_child(tmp_path, request, builder_graph(bundle, "encode", "tensorrt-rtx")[0])


def test_the_structure_is_what_is_left_without_the_weights(bundle: Bundle, tmp_path: Path):
    graph, structure, files = builder_graph(bundle, "encode", "tensorrt-rtx")
    assert files == ("encode.data",)
    folder = shutil.copytree(bundle.path, tmp_path / "copy")
    model = onnx.load(folder / "onnx" / "encode.onnx", load_external_data=False)
    small = next(tensor for tensor in model.graph.initializer if not tensor.external_data)
    small.raw_data = bytes(len(small.raw_data))
    onnx.save(model, folder / "onnx" / "encode.onnx")
    changed = dataclasses.replace(bundle, path=folder)
    other_graph, other_structure, _ = builder_graph(changed, "encode", "tensorrt-rtx")
    assert other_graph != graph
    assert other_structure == structure
    small.dims[0] += 1
    small.raw_data = bytes(4 * math.prod(small.dims))
    onnx.save(model, folder / "onnx" / "encode.onnx")
    assert builder_graph(changed, "encode", "tensorrt-rtx")[1] != structure


# ----------------------------------------------------------------------------------- package versions


def test_bindings_and_libraries_of_different_versions_are_refused(monkeypatch: pytest.MonkeyPatch):
    import tensorrt_rtx_bindings

    monkeypatch.setattr(tensorrt_rtx_bindings, "__version__", "1.6.1.120")
    with pytest.raises(
        EngineError, match=r"bindings of TensorRT for RTX are of version 1\.6\.1, its libraries of 1\.7"
    ):
        load_api.__wrapped__("tensorrt-rtx")


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(MissingDependencyError, match=r"TensorRT needs the package 'tensorrt'.*lfdm-export\[tensorrt\]"):
        load_api.__wrapped__("tensorrt")


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    with pytest.raises(EngineError, match=r"TensorRT 10\.9\.0\.34 is too old, expected 10\.12 or newer"):
        load_api.__wrapped__("tensorrt")


def test_errors_are_kept_for_the_exception_that_follows():
    api = load_api("tensorrt-rtx")
    severity = api.module.ILogger.Severity
    api.take_errors()
    api.logger.log(severity.ERROR, "one\n  thing")
    api.logger.log(severity.WARNING, "no matter")
    api.logger.log(severity.INTERNAL_ERROR, "Thread context has not been set! Using global log stream.")
    assert api.take_errors() == "one thing"
    assert api.take_errors() == "it does not say why"


# ----------------------------------------------------------------------- settings of TensorRT's builder


class Names:
    """An enumeration whose members are their own names, and convert to integer positions."""

    def __init__(self, *names: str) -> None:
        for position, name in enumerate(names):
            setattr(self, name, Member(name, position))

    def __getattr__(self, name: str) -> Member:
        raise AttributeError(name)


@dataclasses.dataclass(frozen=True)
class Member:
    name: str
    position: int

    def __int__(self) -> int:
        return self.position


class FakeProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, smallest: Any, usual: Any, largest: Any) -> None:
        self.shapes[name] = smallest, usual, largest


class FakeCache:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def serialize(self) -> bytes:
        return self.data + b" and more"


class FakeConfig:
    def __init__(self) -> None:
        self._flags = {"TF32"}
        self.profiling_verbosity: Any = None
        self.builder_optimization_level = 3
        self.hardware_compatibility_level: Any = None
        self._profiles: list[FakeProfile] = []
        self._cache: FakeCache | None = None

    def set_flag(self, flag: Member) -> None:
        self._flags.add(flag.name)

    def clear_flag(self, flag: Member) -> None:
        self._flags.discard(flag.name)

    def add_optimization_profile(self, profile: FakeProfile) -> None:
        self._profiles.append(profile)

    def create_timing_cache(self, data: bytes) -> FakeCache:
        return FakeCache(data)

    def set_timing_cache(self, cache: FakeCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.data == b"of another GPU":
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> FakeCache | None:
        return self._cache


class FakeLayer:
    """A layer as returned by a network: properties of its kind appear only after a change of class."""

    num_outputs = 1

    def __init__(self, kind: Member, state: dict[str, Any]) -> None:
        self.type, self.name, self._state = kind, "a layer", state

    def get_output(self, index: int) -> Any:
        return SimpleNamespace(dtype=Member("HALF", 1))


def kept(name: str) -> property:
    return property(lambda layer: layer._state[name], lambda layer, value: layer._state.__setitem__(name, value))


class FakeGridSample(FakeLayer):
    interpolation_mode, sample_mode, align_corners = map(kept, ("interpolation_mode", "sample_mode", "align_corners"))


class Stubborn(dict[str, Any]):
    """State of a layer that ignores all assignments."""

    def __setitem__(self, name: str, value: Any) -> None:
        pass


KINDS, MODES = Names("CONVOLUTION", "GRID_SAMPLE"), Names("NEAREST", "LINEAR")
SAMPLING = Names("STRICT_BOUNDS", "FILL", "CLAMP")
LINEAR = {"interpolation_mode": MODES.LINEAR, "sample_mode": SAMPLING.FILL, "align_corners": False}


class FakeNetwork:
    """A network with one convolution, and the grid-sample layers that a test adds."""

    samples: Sequence[dict[str, Any]] = ()

    @property
    def num_layers(self) -> int:
        return 1 + len(self.samples)

    def get_layer(self, index: int) -> Any:
        return FakeLayer(KINDS.GRID_SAMPLE, self.samples[index - 1]) if index else FakeLayer(KINDS.CONVOLUTION, {})


class FakeBuilder:
    last: FakeBuilder
    layers: dict[str, Any]

    def __init__(self, logger: Any) -> None:
        FakeBuilder.last = self
        self._config, self._profile, self._network_flags = FakeConfig(), FakeProfile(), -1

    def create_network(self, flags: int) -> FakeNetwork:
        self._network_flags = flags
        return FakeNetwork()

    def create_builder_config(self) -> FakeConfig:
        return self._config

    def create_optimization_profile(self) -> FakeProfile:
        return self._profile

    def build_serialized_network(self, network: FakeNetwork, config: FakeConfig) -> bytes:
        return b"a plan"


class FakeParser:
    num_errors = 0

    def __init__(self, network: FakeNetwork, logger: Any) -> None:
        pass

    def parse(self, model: bytes, path: str) -> bool:
        return True


FLAGS = ("REFIT", "TF32", "VERSION_COMPATIBLE", "STRIP_PLAN")
LEVELS = ("NONE", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY")
CREATION = ("STRONGLY_TYPED", "PREFER_AOT_PYTHON_PLUGINS", "PREFER_JIT_PYTHON_PLUGINS")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    """Fake of the parts of TensorRT that the builder uses; no plugins."""
    module = SimpleNamespace(
        Builder=FakeBuilder,
        OnnxParser=FakeParser,
        NetworkDefinitionCreationFlag=Names(*CREATION),
        BuilderFlag=Names(*FLAGS),
        ProfilingVerbosity=Names("DETAILED"),
        LayerType=KINDS,
        InterpolationMode=MODES,
        SampleMode=SAMPLING,
        IGridSampleLayer=FakeGridSample,
        HardwareCompatibilityLevel=Names(*LEVELS),
    )
    monkeypatch.setattr("lfdm_export.ops.plugins.register_plugins", lambda: ())
    return Api("tensorrt", module, "11.4.0", SimpleNamespace(errors=[]))


def told(api: Api, **changes: Any) -> FakeBuilder:
    """Return TensorRT's builder as configured for a request."""
    request = dataclasses.replace(
        BuildRequest("tensorrt", "step", "step.onnx", {"timestep": ((1,), (2,), (32,))}), **changes
    )
    plan, layers = tensorrt_build._built(api, request, b"")
    assert plan == b"a plan"
    found: dict[str, Any] = dict(layers)
    assert found["network layers"] == found["outputs of type"]["half"] == 1 + len(FakeNetwork.samples)
    assert found["of kind"]["convolution"] == 1
    FakeBuilder.last.layers = found
    return FakeBuilder.last


def test_networks_are_strongly_typed_and_plugins_ahead_of_time(api: Api):
    builder = told(api)
    assert builder._network_flags == 0b11
    assert builder._profile.shapes == {"timestep": ((1,), (2,), (32,))}
    assert builder._config._profiles == [builder._profile]
    assert builder._config.profiling_verbosity.name == "DETAILED"
    assert builder._config.hardware_compatibility_level.name == "NONE"


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, set()),
        ({"tf32": True}, {"TF32"}),
        ({"options": BuildOptions(version_compatible=True)}, {"VERSION_COMPATIBLE"}),
        ({"options": BuildOptions(strip=True)}, {"STRIP_PLAN", "REFIT"}),
    ],
)
def test_flags(api: Api, changes: dict[str, Any], flags: set[str]):
    assert told(api, **changes)._config._flags == flags


def test_levels(api: Api):
    for wanted, level in (("ampere+", "AMPERE_PLUS"), ("same-capability", "SAME_COMPUTE_CAPABILITY")):
        found = told(api, options=BuildOptions(hardware_compatible=wanted))  # type: ignore[arg-type]
        assert found._config.hardware_compatibility_level.name == level
    assert told(api, options=BuildOptions(optimization_level=5))._config.builder_optimization_level == 5
    assert told(api)._config.builder_optimization_level == 3


def test_what_was_measured_is_kept_for_the_next_build(api: Api, tmp_path: Path):
    path = tmp_path / "timing.cache"
    told(api, timing_cache=str(path))
    assert path.read_bytes() == b" and more"
    told(api, timing_cache=str(path))
    assert path.read_bytes() == b" and more and more"
    path.write_bytes(b"of another GPU")
    told(api, timing_cache=str(path))
    assert path.read_bytes() == b" and more"
    told(api, timing_cache=str(tmp_path / "nowhere" / "timing.cache"))
    assert (tmp_path / "nowhere" / "timing.cache").read_bytes() == b" and more"
    (tmp_path / "file").touch()
    told(api, timing_cache=str(tmp_path / "file" / "timing.cache"))  # cannot be stored, which is not an error
    assert sorted(one.name for one in tmp_path.iterdir()) == ["file", "nowhere", "timing.cache"]


@pytest.mark.parametrize(
    "misread", [{"interpolation_mode": MODES.NEAREST}, {"sample_mode": SAMPLING.CLAMP}, {"align_corners": True}]
)
def test_a_parser_that_reads_linear_as_nearest_is_corrected(
    api: Api, monkeypatch: pytest.MonkeyPatch, misread: dict[str, Any]
):
    samples = [dict(LINEAR), {**LINEAR, **misread}]
    monkeypatch.setattr(FakeNetwork, "samples", samples)
    layers = told(api).layers
    assert samples == [LINEAR, LINEAR]
    assert layers["of kind"]["grid_sample"] == 2
    assert layers["grid samples that the parser misread"] == 1
    monkeypatch.setattr(FakeNetwork, "samples", [Stubborn({**LINEAR, **misread})])
    with pytest.raises(EngineError, match=f"keeps {next(iter(misread))} .* of the grid-sample layer 'a layer'"):
        told(api)


def test_the_real_parser_gives_layers_that_can_be_set():
    """Layers of TensorRT for RTX behave like those of the fake network."""
    api = load_api("tensorrt-rtx")
    trt = api.module
    text = """<ir_version: 9, opset_import: ["" : 20]>
        g (float[1, 3, 8, 8] x, float[1, 4, 4, 2] grid) => (float[1, 3, 4, 4] y) {
            wrong = GridSample <mode = "nearest", padding_mode = "border", align_corners = 1> (x, grid)
            right = GridSample <mode = "linear"> (x, grid)
            y = Add (wrong, right)
        }"""
    builder = trt.Builder(api.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, api.logger)
    assert parser.parse(onnx.parser.parse_model(text).SerializeToString(), "")
    assert set_grid_sampling(trt, network) == 1
    assert set_grid_sampling(trt, network) == 0


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ('mode = "nearest"', "GridSample of mode 'nearest', expected 'linear'"),
        ('padding_mode = "border"', "GridSample of padding_mode 'border', expected 'zeros'"),
        ("align_corners = 1", "GridSample of align_corners 1, expected 0"),
    ],
)
def test_a_graph_that_samples_otherwise_is_refused(attributes: str, message: str):
    def model(attributes: str) -> onnx.ModelProto:
        text = f"""<ir_version: 9, opset_import: ["" : 20, "own" : 1]>
            g (float[1, 3, 8, 8] x, float[1, 4, 4, 2] grid) => (float[1, 3, 4, 4] y) {{ y = own.Sample (x, grid) }}
            <domain: "own", opset_import: ["" : 20]>
            Sample (x, grid) => (y) {{ y = GridSample <{attributes}> (x, grid) }}"""
        return onnx.parser.parse_model(text)

    require_grid_sampling(model('mode = "linear"'))
    require_grid_sampling(model('mode = "bilinear", padding_mode = "zeros", align_corners = 0'))
    with pytest.raises(EngineError, match=message):
        require_grid_sampling(model(attributes))


def test_no_builder_and_no_plan_are_errors(api: Api, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: Any) -> None:
        api.logger.errors.append("out of memory")

    monkeypatch.setattr(FakeBuilder, "build_serialized_network", refuse)
    with pytest.raises(EngineError, match=r"^out of memory$"):
        told(api)
    object.__setattr__(api, "module", SimpleNamespace(Builder=refuse))
    with pytest.raises(EngineError, match=r"^no builder: out of memory$"):
        tensorrt_build._built(api, BuildRequest("tensorrt", "step", "", {}), b"")


def test_plugins_are_registered_for_tensorrt_alone(api: Api, monkeypatch: pytest.MonkeyPatch):
    asked: list[str] = []
    monkeypatch.setattr("lfdm_export.ops.plugins.register_plugins", lambda: asked.append("plugins"))
    tensorrt_build._network_flags(api)
    assert asked == ["plugins"]
    assert tensorrt_build._network_flags(dataclasses.replace(api, target="tensorrt-rtx")) == 1
    assert asked == ["plugins"]


# ----------------------------------------------------------------------- names in the real packages

_NAMES_OF_TENSORRT = """
import json, sys
from collections.abc import Sequence
from pathlib import Path
from tests.plugin_driver import load_bindings
trt = load_bindings(Path(sys.argv[1]), sys.argv[2])
wanted = json.loads(sys.argv[3])
asked = [(kind, name) for kind, names in wanted.items() for name in names]
missing = [f"{kind}.{name}" for kind, name in asked if not hasattr(getattr(trt, kind), name)]
print(json.dumps(missing))
"""


def own_names(kind: type) -> list[str]:
    names = {name for name in vars(kind) if not name.startswith("_")} - {"last", "batch", "num_layers"}
    return sorted(names | {name for name in vars(kind()) if not name.startswith("_")} if kind is FakeConfig else names)


def test_tensorrt_has_every_name_that_is_used(tmp_path: Path):
    """Python classes of TensorRT 11.4, inspected without its libraries."""
    from tests import fake_gpu

    wanted = {
        "Builder": own_names(FakeBuilder),
        "IBuilderConfig": own_names(FakeConfig),
        "IOptimizationProfile": own_names(FakeProfile),
        "ITimingCache": ["serialize"],
        "INetworkDefinition": ["num_layers", "get_layer"],
        "ILayer": ["type", "name", "num_outputs", "get_output"],
        "IGridSampleLayer": list(LINEAR),
        "LayerType": ["GRID_SAMPLE"],
        "InterpolationMode": ["LINEAR"],
        "SampleMode": ["FILL"],
        "OnnxParser": ["parse", "num_errors", "get_error"],
        "ParserError": ["desc"],
        "NetworkDefinitionCreationFlag": CREATION,
        "BuilderFlag": FLAGS,
        "HardwareCompatibilityLevel": LEVELS,
        "ProfilingVerbosity": ["DETAILED"],
        "LayerInformationFormat": ["JSON"],
        "EngineInspector": ["get_engine_information"],
        "Runtime": [*own_names(fake_gpu.FakeRuntime), "engine_host_code_allowed"],
        "ICudaEngine": [*own_names(fake_gpu.FakeEngine), "create_engine_inspector"],
        "IExecutionContext": own_names(fake_gpu.FakeContext),
        "IRuntimeConfig": ["set_execution_context_allocation_strategy"],
        "Refitter": own_names(fake_gpu.FakeRefitter),
        "OnnxParserRefitter": own_names(fake_gpu.FakeParserRefitter),
        "ExecutionContextAllocationStrategy": ["USER_MANAGED"],
    }
    command = [sys.executable, "-c", _NAMES_OF_TENSORRT, str(tmp_path), find_compiler(), json.dumps(wanted)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=Path(tensorrt_api.__file__).parents[3]
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []
