from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.errors import BundleError, EngineError
from lfdm_export.graphs.file import check_graph, read_graph
from lfdm_export.graphs.stored import load_stage
from lfdm_export.stages import StageSpec, TensorSpec
from tests.fake_bundle import write_fake_bundle

SPEC = StageSpec(
    "probe", (TensorSpec("x", "float32", ("batch", 4)),), (TensorSpec("y", "float32", ("batch", 4)),), (1, 1, 4), {}
)
ADDRESS = "*/_ORT_MEM_ADDR_/*"


def external(location: str, offset: str = "0", length: str = "16", name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)
    return tensor


def model(nodes: list[Any], initializers: list[TensorProto] | None = None, **options: Any) -> onnx.ModelProto:
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "probe", [value("x", 1, ["batch", 4])], [value("y", 1, ["batch", 4])], initializers or []
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], **options)
    made.ir_version = 10
    return made


def in_initializer(tensor: TensorProto) -> onnx.ModelProto:
    return model([helper.make_node("Add", ["x", "w"], ["y"])], [tensor])


def in_constant(tensor: TensorProto) -> onnx.ModelProto:
    return model([helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["x", "w"], ["y"])])


def in_subgraph(tensor: TensorProto) -> onnx.ModelProto:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["z"])], "b", [], [helper.make_tensor_value_info("z", 1, [4])], [tensor]
    )
    truth = helper.make_tensor("c", TensorProto.BOOL, [], [True])
    nodes = [
        helper.make_node("If", ["c"], ["z"], then_branch=branch, else_branch=branch),
        helper.make_node("Add", ["x", "z"], ["y"]),
    ]
    return model(nodes, [truth])


def in_function(tensor: TensorProto) -> onnx.ModelProto:
    opset = helper.make_opsetid("", 20)
    nodes = [helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["a", "w"], ["b"])]
    function = helper.make_function("lfdm", "Probe", ["a"], ["b"], nodes, [opset])
    made = model([helper.make_node("Probe", ["x"], ["y"], domain="lfdm")], functions=[function])
    made.opset_import.append(helper.make_opsetid("lfdm", 1))
    return made


def in_sparse_initializer(tensor: TensorProto) -> onnx.ModelProto:
    made = model([helper.make_node("Add", ["x", "w"], ["y"])])
    indices = helper.make_tensor("", TensorProto.INT64, [4], [0, 1, 2, 3])
    made.graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, indices, [4]))
    return made


PLACES = [in_initializer, in_constant, in_subgraph, in_function, in_sparse_initializer]


def written(made: onnx.ModelProto, folder: Path) -> Path:
    (folder / "w.data").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    path = folder / "probe.onnx"
    path.write_bytes(made.SerializeToString())
    return path


@pytest.mark.parametrize("place", PLACES)
def test_external_data_is_found_wherever_it_is(place: Callable[[TensorProto], onnx.ModelProto], tmp_path: Path):
    graph = read_graph(written(place(external("w.data")), tmp_path))
    assert {(data.location, data.offset, data.length) for data in graph.external} == {("w.data", "0", "16")}
    assert [(value.name, value.type, value.shape) for value in graph.inputs] == [("x", "tensor(float)", ("batch", 4))]
    assert [value.name for value in graph.outputs] == ["y"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (external(ADDRESS, "4096"), "not a file beside it"),
        (external("../secret"), "not a file beside it"),
        (external("/etc/hostname"), "not a file beside it"),
        (external(""), "not a file beside it"),
        (external("w.data", "8"), "is too short"),
        (external("w.data", "-8"), "is too short"),
        (external("w.data", "0", "9" * 40), "is too short"),
    ],
)
def test_no_engine_loads_a_graph_that_reads_other_files(
    place: Callable[[TensorProto], onnx.ModelProto], tensor: TensorProto, words: str, tmp_path: Path
):
    (tmp_path.parent / "secret").write_bytes(b"\0" * 16)
    path = written(place(tensor), tmp_path)
    for load in (check_graph, load_stage, OnnxRuntimeEngine):
        with pytest.raises(EngineError, match=words):
            load(path, SPEC)


@pytest.mark.parametrize("place", [in_initializer, in_constant])
def test_openvino_maps_only_initializers(place: Callable[[TensorProto], onnx.ModelProto], tmp_path: Path):
    pytest.importorskip("openvino")
    from lfdm_export.engines.openvino.engine import OpenVinoEngine

    path = written(place(external("w.data")), tmp_path)
    if place is in_initializer:
        found = OpenVinoEngine(path, SPEC, threads=1).run({"x": np.zeros((1, 4), np.float32)})
        np.testing.assert_array_equal(found["y"], [[0, 1, 2, 3]])
    else:
        with pytest.raises(EngineError, match="export again"):
            OpenVinoEngine(path, SPEC, threads=1)


def test_an_engine_inside_a_graph_is_refused(tmp_path: Path):
    node = helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, ep_cache_context="/x")
    with pytest.raises(EngineError, match="EPContext"):
        check_graph(written(model([node]), tmp_path), SPEC)


@pytest.mark.parametrize(
    "data", [b"\x3a\xff\xff\xff\xff\x0f", b"\x3b", b"\x3a", b"\xff" * 20, b"\x38\x01", b"PK\x03\x04 no graph"]
)
def test_data_that_is_not_a_graph(data: bytes, tmp_path: Path):
    (tmp_path / "x.onnx").write_bytes(data)
    with pytest.raises(EngineError, match="export again"):
        check_graph(tmp_path / "x.onnx", SPEC)


def test_graphs_that_are_nested_too_deep(tmp_path: Path):
    inner = b""
    for _ in range(200):  # graph > node > attribute > graph
        for number in (6, 5, 1):
            inner = bytes([number << 3 | 2]) + _length(len(inner)) + inner
    (tmp_path / "x.onnx").write_bytes(b"\x3a" + _length(len(inner)) + inner)
    with pytest.raises(EngineError, match="nested deeper"):
        check_graph(tmp_path / "x.onnx", SPEC)


def _length(size: int) -> bytes:
    encoded = b""
    while size > 0x7F:
        encoded += bytes([size & 0x7F | 0x80])
        size >>= 7
    return encoded + bytes([size])


# A complete bundle


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose encoder has external weights."""
    folder = write_fake_bundle(tmp_path_factory.mktemp("bundles") / "fake").path
    graph = onnx.load(folder / "onnx" / "encode.onnx")
    graph.graph.initializer.append(external("encode.data"))
    (folder / "onnx" / "encode.onnx").write_bytes(graph.SerializeToString())
    (folder / "onnx" / "encode.data").write_bytes(b"\0" * 16)

    def vouch(manifest: Any) -> None:
        for name in ("onnx/encode.onnx", "onnx/encode.data"):
            data = (folder / name).read_bytes()
            manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}

    edited(folder, vouch)
    return folder


@pytest.fixture
def bundle(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "bundle"))


def edited(folder: Path, edit: Callable[[Any], None]) -> None:
    plain = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    edit(plain)
    (folder / "manifest.json").write_text(json.dumps(plain), encoding="utf-8")


def test_weights_that_no_hash_covers(bundle: Path):
    edited(bundle, lambda manifest: manifest["files"].pop("onnx/encode.data"))
    with pytest.raises(BundleError, match=r"encode\.onnx: its weights are in 'encode\.data', .* the manifest lists"):
        Bundle.open(bundle)
    unchecked = Bundle.open(bundle, check_hashes=False)
    with pytest.raises(BundleError, match="the manifest lists"):
        unchecked.stage_path("encode")
    assert unchecked.stage_path("decode").is_file()


def test_a_bundle_in_the_hubs_cache(bundle: Path, tmp_path: Path):
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    blobs.mkdir(parents=True)
    for path in [path for path in bundle.rglob("*") if path.is_file()]:
        blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    opened = Bundle.open(snapshot)
    size = opened.manifest.geometry.image_size
    image = np.zeros((1, 3, size, size), np.float32)
    assert OnnxRuntimeEngine(opened.stage_path("encode"), opened.stages["encode"], threads=1).run({"image": image})
    assert load_stage(opened.stage_path("encode"), opened.stages["encode"]).graph.node
    (blobs.parent / "elsewhere").write_bytes((snapshot / "embeddings.npz").read_bytes())
    (snapshot / "embeddings.npz").unlink()
    (snapshot / "embeddings.npz").symlink_to("../../elsewhere")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(snapshot)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: m["sampler"].update(eta=10**400), "eta"),
        (lambda m: m["sampler"].update(eta=2.0), "eta: found 2.0, expected 0 to 1"),
        (lambda m: m["sampler"].update(steps=10**9), "steps: found 1000000000, expected 1 to"),
        (lambda m: m["sampler"].update(guidance_scale=float("nan")), "guidance_scale"),
        (lambda m: m["sampler"].update(guidance_scale=1e9), "guidance_scale is 1e\\+09, expected -1000 to 1000"),
        (lambda m: m["sampler"].update(guidance_scale=None), "sampler names no sampler, no guidance_scale"),
        (lambda m: m["sampler"].update(sampler=None), "sampler names no sampler"),
        (lambda m: m["sampler"].update(sampler="euler"), "sampler: found 'euler'"),
        (lambda m: m["sampler"].update(guidance_interval=[0.2, 0.8]), "or a guidance_interval"),
        (lambda m: m["config"]["lfae"].update(down_blocks=10**9), "block counts out of range"),
        (lambda m: m["config"]["lfae"]["flow_predictor"].update(blocks=10**9), "at most 12 blocks"),
        (lambda m: m["config"]["lfae"].update(region_pad=10**9), "region_pad must be from 0 to 64"),
        (lambda m: m["config"]["dm"].update(multipliers=[1] * 1000), "at most 12 levels"),
        (lambda m: m["config"]["dm"].update(training_steps=10**12), "sizes out of range"),
        (lambda m: m["geometry"].update(frames=10**9), "beyond what this program runs"),
        (lambda m: m["stages"][0].update(batch=[1, 1, 10**9]), "has batches up to"),
        (lambda m: m.update(labels=[f"{index}" for index in range(20_000)]), "20000 labels"),
        (lambda m: m.update(labels=["a", "\x1b[2J"]), r"'\\x1b\[2J' is longer"),
        (lambda m: m["preprocessing"].update(resize_first=[10**9, 10**9]), "resize_first must be positive and at most"),
        (lambda m: m["files"].update({"x" * 300: m["files"]["embeddings.npz"]}), "not a plain path"),
        (lambda m: m["files"].update({"\ud800": m["files"]["embeddings.npz"]}), "not a plain path"),
        (lambda m: m["files"].update({"a\nb": m["files"]["embeddings.npz"]}), "not a plain path"),
    ],
)
def test_numbers_and_names_are_bounded(edit: Callable[[Any], None], words: str, bundle: Path):
    edited(bundle, edit)
    with pytest.raises(BundleError, match=words):
        Bundle.open(bundle)


def test_paths_that_no_file_system_supports(bundle: Path):
    for path in ("x" * 300, "a\0b"):
        with pytest.raises(BundleError):
            Bundle.open(path)
    (bundle / "onnx" / "encode.onnx").unlink()
    (bundle / "onnx" / "encode.onnx").symlink_to("encode.onnx")
    with pytest.raises(BundleError):
        Bundle.open(bundle)
