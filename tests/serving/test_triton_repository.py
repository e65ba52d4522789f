"""The repository's files: the committed ones equal what is written now, and the files of a bundle's repository."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from lfdm_export.bundle.manifest import Manifest
from lfdm_export.bundle.reader import Bundle, fingerprint
from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.engines.tensorrt.grid_samples import GRID_SAMPLING
from lfdm_export.engines.tensorrt.plans import BuildOptions, Fingerprint, PlanFolder, PlanRecord
from lfdm_export.errors import EngineError, ExportError
from lfdm_export.files.json_codec import to_plain
from lfdm_export.protocol.contract import (
    CLIP_INPUTS,
    CLIP_MODEL,
    CLIP_OUTPUTS,
    DECODE_MODEL,
    ENCODE_MODEL,
    PREPROCESS_MODEL,
    SAMPLE_MODEL,
    STEP_MODELS,
    STREAM_MODEL,
)
from lfdm_export.protocol.model_facts import FACTS_PARAMETER, ModelFacts
from lfdm_export.serving.triton import engine_files
from lfdm_export.serving.triton.config import DECODE_MODEL_PARAMETER, model_configs
from lfdm_export.serving.triton.engine_files import check_engines
from lfdm_export.serving.triton.interfaces import DECODE_CHUNK_MODEL, interfaces
from lfdm_export.serving.triton.repository import BUNDLE_PLACE, write_open_repository, write_repository
from lfdm_export.serving.triton.settings import ServingSettings
from tests.fake_bundle import (
    CHUNK,
    FRAMES,
    GEOMETRY,
    LABELS,
    LATENT,
    SIZE,
    SPECS,
    WIDTH,
    fake_manifest,
    write_fake_bundle,
)

ROOT = Path(__file__).resolve().parents[2]


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md"
    }


def read_config(repository: Path, model: str) -> Any:
    return text_format.Parse(
        (repository / model / "config.pbtxt").read_text(encoding="utf-8"), model_config_pb2.ModelConfig()
    )


def dims(tensors: Any) -> dict[str, list[int]]:
    return {tensor.name: list(tensor.dims) for tensor in tensors}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_fake_bundle(tmp_path / "bundle")


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    return fake_manifest()


def test_the_committed_repository_equals_what_the_code_writes(tmp_path: Path):
    written = files_of(write_open_repository(tmp_path / "repository"))
    assert written == files_of(ROOT / "triton_repo"), "write it again as triton_repo/README.md says"


def test_a_bundles_repository_has_its_sizes(tmp_path: Path, bundle: Bundle):
    settings = ServingSettings(slots=3, policy="benchmarks.policies:OneClip")
    repository = write_repository(bundle, tmp_path / "repository", settings=settings)
    assert {path.name for path in repository.iterdir()} == {CLIP_MODEL, STREAM_MODEL, *STEP_MODELS}
    clip = read_config(repository, CLIP_MODEL)
    assert dims(clip.output) == {
        "frames": [FRAMES, SIZE, SIZE, 3],
        "warped": [FRAMES, SIZE, SIZE, 3],
        "latent": [3, FRAMES, LATENT, LATENT],
        "timings": [4],
        "used_seed": [1],
    }
    assert dims(clip.input)["text_embedding"] == [WIDTH]
    assert dims(clip.input)["image"] == [-1, -1, 3]
    encode = read_config(repository, ENCODE_MODEL)
    assert dims(encode.output) == {
        tensor.name: [-1, *tensor.shape[1:]] for tensor in SPECS["encode"].outputs
    }  # the stage's own names
    sample = read_config(repository, SAMPLE_MODEL)
    assert sample.parameters["slots"].string_value == "3"
    assert sample.parameters["policy"].string_value == "benchmarks.policies:OneClip"
    assert read_config(repository, STREAM_MODEL).model_transaction_policy.decoupled
    assert not sample.model_transaction_policy.decoupled  # else the ensemble would accept only streams


def test_the_bundle_is_copied_into_the_repository_or_referenced(tmp_path: Path, bundle: Bundle):
    inside = write_repository(bundle, tmp_path / "inside")
    assert Bundle.open(inside / BUNDLE_PLACE).labels == LABELS
    said = {name: read_config(inside, name).parameters["bundle"].string_value for name in STEP_MODELS}
    assert set(said.values()) == {BUNDLE_PLACE}
    assert ServingSettings(bundle=BUNDLE_PLACE).bundle_folder(inside) == inside / BUNDLE_PLACE
    beside = write_repository(bundle, tmp_path / "beside", copy_bundle=False)
    assert read_config(beside, SAMPLE_MODEL).parameters["bundle"].string_value == str(bundle.path)
    assert not (beside / BUNDLE_PLACE).exists()


def test_the_configuration_has_the_bundles_facts_for_clients(tmp_path: Path, bundle: Bundle):
    repository = write_repository(bundle, tmp_path / "repository")
    for model in (CLIP_MODEL, STREAM_MODEL):
        text = read_config(repository, model).parameters[FACTS_PARAMETER].string_value
        assert ModelFacts.from_json(text) == ModelFacts.of(bundle.manifest)


@pytest.mark.parametrize(("engines", "on_device"), [("python", False), ("python", True), ("onnxruntime", False)])
@pytest.mark.parametrize("sizes", ["open", "exact"])
def test_the_ensemble_is_a_whole_graph(engines: Any, sizes: str, on_device: bool):
    """Every step's required input is the ensemble's or an earlier step's output, of the same type and matching axes."""
    settings = ServingSettings(on_device=on_device)
    configs = model_configs(GEOMETRY if sizes == "exact" else None, settings, engines=engines)
    clip = configs[CLIP_MODEL]
    tensors = {tensor.name: tensor for tensor in clip.input}
    for step in clip.ensemble_scheduling.step:
        model = configs[step.model_name]
        inputs = {tensor.name: tensor for tensor in model.input}
        assert set(step.input_map) <= set(inputs)
        for name, tensor in inputs.items():
            assert name in step.input_map or tensor.optional, f"{step.model_name} lacks {name}"
        for name, key in step.input_map.items():
            source, taken = tensors[key], inputs[name]
            assert source.data_type == taken.data_type
            assert fits(full_dims(source), full_dims(taken, model)), (key, step.model_name)
            assert taken.optional or not getattr(source, "optional", False), f"{step.model_name} may lack {name}"
        outputs = {tensor.name: tensor for tensor in model.output}
        for name, key in step.output_map.items():
            assert key not in tensors, f"{key} is given twice"
            tensors[key] = with_batch(outputs[name], model)
    assert {tensor.name for tensor in clip.output} <= set(tensors)
    for tensor in clip.output:
        assert tensors[tensor.name].data_type == tensor.data_type
        assert fits(full_dims(tensors[tensor.name]), full_dims(tensor))


def full_dims(tensor: Any, model: Any = None) -> list[int]:
    return [*([-1] if model is not None and model.max_batch_size else []), *tensor.dims]


def with_batch(tensor: Any, model: Any) -> Any:
    copy = type(tensor)()
    copy.CopyFrom(tensor)
    copy.dims[:] = full_dims(tensor, model)
    return copy


def fits(given: list[int], taken: list[int]) -> bool:
    return len(given) == len(taken) and all(-1 in pair or pair[0] == pair[1] for pair in zip(given, taken, strict=True))


def test_clip_tensors_are_those_of_the_contract():
    clip = model_configs(None, ServingSettings())[CLIP_MODEL]
    assert [tensor.name for tensor in clip.input] == [spec.name for spec in CLIP_INPUTS]
    assert [tensor.name for tensor in clip.output] == [spec.name for spec in CLIP_OUTPUTS]
    assert all(tensor.optional for tensor in clip.input)


def test_graphs_are_the_models_of_tritons_own_backend(tmp_path: Path, small_bundle: Bundle):
    repository = write_repository(small_bundle, tmp_path / "repository", engines="onnxruntime", copy_bundle=False)
    stages = small_bundle.stages
    for model, stage in ((ENCODE_MODEL, "encode"), (DECODE_CHUNK_MODEL, "decode")):
        config = read_config(repository, model)
        assert (config.backend, config.max_batch_size) == ("onnxruntime", stages[stage].batch[2])
        assert dims(config.input) == {tensor.name: list(tensor.shape[1:]) for tensor in stages[stage].inputs}
        assert dims(config.output) == {tensor.name: list(tensor.shape[1:]) for tensor in stages[stage].outputs}
        version = repository / model / "1"
        graph, weights = small_bundle.stage_path(stage), f"{stage}.data"
        assert {path.name for path in version.iterdir()} == {"model.onnx", weights}
        assert (version / "model.onnx").read_bytes() == graph.read_bytes()
        assert (version / weights).read_bytes() == (graph.parent / weights).read_bytes()
        engine = load_with_onnxruntime(version / "model.onnx")
        assert [tensor.name for tensor in engine.get_inputs()] == [tensor.name for tensor in config.input]
        assert [tensor.name for tensor in engine.get_outputs()] == [tensor.name for tensor in config.output]
    decode = read_config(repository, DECODE_MODEL).parameters
    assert decode[DECODE_MODEL_PARAMETER].string_value == DECODE_CHUNK_MODEL
    assert decode["FORCE_CPU_ONLY_INPUT_TENSORS"].string_value == "no"


def load_with_onnxruntime(graph: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])


# ------------------------------------------------------------------- plans and graphs of Triton's backends

L4, L40 = Gpu("NVIDIA L4", (8, 9), 24 << 30, "13.0"), Gpu("NVIDIA L40", (8, 9), 48 << 30, "13.0")


def write_plans(bundle: Bundle, **changes: Any) -> PlanFolder:
    """Plans of encode and decode with their records, as for an L4."""
    folder = PlanFolder(bundle.path, "tensorrt")
    folder.path.mkdir(parents=True, exist_ok=True)
    for stage in ("encode", "decode"):
        folder.plan(stage).write_text(f"a plan of {stage}", encoding="utf-8")
        graph = f"onnx/{stage}.onnx"
        made = Fingerprint(
            target="tensorrt",
            stage=stage,
            precision=bundle.manifest.precision,
            sources={graph: bundle.manifest.files[graph].sha256},
            structure="0" * 64,
            batch=bundle.stages[stage].batch,
            library="TensorRT 11.4.0.106",
            gpus=(L4.architecture, L4.name),
            options=BuildOptions(),
            grid_sampling=GRID_SAMPLING,
        )
        record = PlanRecord(replace(made, **changes), fingerprint(folder.plan(stage)), 1.0, 1, {})
        folder.record_path(stage).write_text(json.dumps(to_plain(record)), encoding="utf-8")
    return folder


def test_plans_are_the_models_of_tensorrt(tmp_path: Path, bundle: Bundle):
    with pytest.raises(EngineError, match=r"has no whole TensorRT plan of stage 'encode'; make it with: lfdm-export"):
        write_repository(bundle, tmp_path / "repository", engines="tensorrt")
    assert not (tmp_path / "repository").exists()
    write_plans(bundle)
    repository = write_repository(bundle, tmp_path / "repository", engines="tensorrt")
    for model, stage in ((ENCODE_MODEL, "encode"), (DECODE_CHUNK_MODEL, "decode")):
        config = read_config(repository, model)
        assert (config.backend, config.default_model_filename) == ("tensorrt", "model.plan")
        assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
        assert (repository / model / "1" / "model.plan").read_text(encoding="utf-8") == f"a plan of {stage}"
        assert not (repository / model / "1" / "model.py").exists()
    check_engines(bundle, repository)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": {"onnx/encode.onnx": "0" * 64}}, r"was made from another onnx/encode\.onnx than the bundle's"),
        ({"sources": {}, "options": BuildOptions(strip=True)}, "was stripped of its weights"),
        ({"stage": "step"}, "is of stage step, expected encode"),
        ({"grid_sampling": "as the parser read it"}, "is of sampling as the parser read it, expected linear, zeros"),
        ({"precision": "fp16"}, "is of precision fp16, expected fp32"),
        ({"target": "tensorrt-rtx"}, "is of target tensorrt-rtx, expected tensorrt"),
    ],
)
def test_a_plan_that_does_not_match_is_not_copied(
    tmp_path: Path, bundle: Bundle, changes: dict[str, Any], message: str
):
    write_plans(bundle, **changes)
    with pytest.raises(EngineError, match=message + r".*; make it with: lfdm-export --plans \S+ --target tensorrt$"):
        write_repository(bundle, tmp_path / "repository", engines="tensorrt")
    assert not (tmp_path / "repository").exists()


@pytest.mark.parametrize("spoil", ["plan", "record"])
def test_an_incomplete_plan_is_not_copied(tmp_path: Path, bundle: Bundle, spoil: str):
    folder = write_plans(bundle)
    if spoil == "plan":
        folder.plan("decode").write_text("another plan of decode", encoding="utf-8")
    else:
        folder.record_path("decode").unlink()
    with pytest.raises(EngineError, match=r"is not what its record says|has no whole TensorRT plan of stage 'decode'"):
        write_repository(bundle, tmp_path / "repository", engines="tensorrt")


def test_a_served_plan_is_compared_with_the_bundle_and_the_gpus(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    write_plans(bundle)
    repository = write_repository(bundle, tmp_path / "repository", engines="tensorrt", copy_bundle=False)
    monkeypatch.setattr(engine_files, "find_gpus", lambda: ((L4,), ""))
    check_engines(bundle, repository)
    monkeypatch.setattr(engine_files, "find_gpus", lambda: ((L4, L40), ""))
    with pytest.raises(EngineError, match=r"was built for SM89, NVIDIA L4, here is NVIDIA L40 .* repository again"):
        check_engines(bundle, repository)
    # The bundle that the repository refers to was exported again.
    files = dict(bundle.manifest.files)
    files["onnx/decode.onnx"] = replace(files["onnx/decode.onnx"], sha256="0" * 64)
    other = replace(bundle, manifest=replace(bundle.manifest, files=files))
    monkeypatch.setattr(engine_files, "find_gpus", lambda: ((L4,), ""))
    with pytest.raises(EngineError, match=r"was made from another onnx/decode\.onnx than the bundle's"):
        check_engines(other, repository)
    (repository / ENCODE_MODEL / "1" / "model.plan").write_text("a plan put there by hand", encoding="utf-8")
    with pytest.raises(EngineError, match="is not what its record says"):
        check_engines(bundle, repository)


def test_a_served_graph_is_compared_with_the_bundle(tmp_path: Path, small_bundle: Bundle):
    repository = write_repository(small_bundle, tmp_path / "repository", engines="onnxruntime", copy_bundle=False)
    check_engines(small_bundle, repository)
    weights = repository / DECODE_CHUNK_MODEL / "1" / "decode.data"
    weights.write_bytes(weights.read_bytes()[:-1] + b"X")
    with pytest.raises(
        EngineError, match=r"decode\.data is not the onnx/decode\.data of the bundle .*repository again"
    ):
        check_engines(small_bundle, repository)


def test_the_server_does_not_decode_with_a_stale_plan(tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    write_plans(bundle)
    repository = write_repository(bundle, tmp_path / "repository", engines="tensorrt", copy_bundle=False)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("triton_python_backend_utils"))
    for name in ("stub", "decode"):  # imported only for this test, with that backend
        monkeypatch.delitem(sys.modules, f"lfdm_export.serving.models.{name}", raising=False)
    decode = importlib.import_module("lfdm_export.serving.models.decode")
    for name in ("stub", "decode"):
        del sys.modules[f"lfdm_export.serving.models.{name}"]
    loaded = SimpleNamespace(
        pipeline=SimpleNamespace(bundle=bundle), interface=None, parameters={DECODE_MODEL_PARAMETER: DECODE_CHUNK_MODEL}
    )
    monkeypatch.setattr(decode, "load", lambda args: loaded)
    arguments = {"model_repository": str(repository / DECODE_MODEL)}
    decode.DecodeModel().initialize(arguments)
    (repository / ENCODE_MODEL / "1" / "model.json").unlink()
    with pytest.raises(EngineError, match="has no whole TensorRT plan of stage 'encode'"):
        decode.DecodeModel().initialize(arguments)


def test_only_a_repository_is_replaced(tmp_path: Path, bundle: Bundle):
    target = write_repository(bundle, tmp_path / "repository")
    (target / "stray").touch()
    write_repository(bundle, target)
    assert not (target / "stray").exists()
    other = tmp_path / "photos"
    other.mkdir()
    (other / "holiday.jpg").touch()
    with pytest.raises(ExportError, match="exists and is not a model repository"):
        write_repository(bundle, other)
    assert [path.name for path in other.iterdir()] == ["holiday.jpg"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "photos", "repository"]


def test_interfaces_take_the_stages_own_names(manifest: Manifest):
    known = interfaces(manifest.geometry)
    encode = next(spec for spec in manifest.stages if spec.name == "encode")
    assert [tensor.name for tensor in known[ENCODE_MODEL].outputs] == [tensor.name for tensor in encode.outputs]
    assert [tensor.name for tensor in known[DECODE_MODEL].inputs][:-1] == [
        tensor.name for spec in manifest.stages if spec.name == "decode" for tensor in spec.inputs
    ]
    assert [tensor.name for tensor in known[PREPROCESS_MODEL].inputs] == ["image_bytes", "image"]
    assert CHUNK < FRAMES  # the last chunk of a clip is cut short in these tests
