"""The shipped model's bundle, which needs neither torch nor onnx."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import lfdm_export
from lfdm_export import Bundle, BundleError, Pipeline
from lfdm_export.bundle import ready as ready_bundle
from lfdm_export.cli import generate_main, info_main
from lfdm_export.cli.export import _parser as export_parser
from lfdm_export.cli.export import _tuned as tuned_of
from lfdm_export.pictures.clip_files import load_clip
from lfdm_export.sampling.tuned import TunedSampler
from lfdm_models.training.procedural import HELD_OUT_SEEDS, LABELS, sample_clip
from tests.fake_bundle import write_fake_bundle
from tests.test_imports import BLOCKER, OPTIONAL, ROOT


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder and a working folder for this test."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Image.fromarray(sample_clip(HELD_OUT_SEEDS[-1], label="nod", frames=2).frames[0]).save("face.png")
    return tmp_path / "cache"


def sources() -> dict[str, bytes]:
    return {name: (ready_bundle.MODEL / name).read_bytes() for name in ready_bundle.SOURCES}


def test_it_is_small_and_complete(cache: Path):
    assert ready_bundle.ARCHIVE.stat().st_size < 2_000_000
    bundle = Bundle.open("characters")
    assert bundle.path.is_relative_to(cache)
    assert bundle.labels == LABELS
    for name, entry in bundle.manifest.files.items():
        assert hashlib.sha256((bundle.path / name).read_bytes()).hexdigest() == entry.sha256, name
    assert not bundle.manifest.has_drive
    before = {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")}
    assert Bundle.open("characters").path == bundle.path
    assert {path: path.stat().st_mtime_ns for path in bundle.path.rglob("*")} == before, "kept, not rebuilt"


def test_a_clip_without_torch_and_onnx():
    without = set(OPTIONAL) - {"onnxruntime"}
    code = BLOCKER.format(optional=without) + (
        "from lfdm_export.cli import generate_main\n"
        "arguments = ['characters', '--image', 'face.png', '--label', 'nod', '--seed', '1', '--threads', '1']\n"
        "raise SystemExit(generate_main([*arguments, '--target', 'onnxruntime', '--out', 'nod.npz']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    clip = load_clip("nod.npz")
    assert clip.shape == (16, 64, 64, 3)
    assert np.abs(clip[8].astype(int) - clip[0]).mean() > 1, "it moves"


def test_the_example_of_the_package_runs(monkeypatch: pytest.MonkeyPatch):
    """Run its first part unchanged; of its second part, check that every call fits the interface."""
    assert lfdm_export.__doc__ is not None
    lines = re.findall(r">>> (.*)", lfdm_export.__doc__)
    second = lines.index("from lfdm_export import export_bundle, load_model")
    names: dict[str, object] = {}
    exec("\n".join(lines[:second]), names)  # noqa: S102
    assert load_clip("nod.gif").shape == (16, 64, 64, 3)

    def load_model(lfae: str, dm: str, *, dataset: str) -> str:
        return dataset

    def export_bundle(model: str, out: str, *, dataset: str) -> Bundle:
        assert model == dataset == "mug"
        return write_fake_bundle(Path(out))

    Image.new("RGB", (16, 16)).save("face.jpg")
    monkeypatch.setattr(lfdm_export, "load_model", load_model, raising=False)
    monkeypatch.setattr(lfdm_export, "export_bundle", export_bundle, raising=False)
    exec("\n".join(lines[second:]), names)  # noqa: S102
    assert Path("happiness.gif").is_file()


def test_a_folder_of_that_name_has_priority_and_is_reported(capsys: pytest.CaptureFixture[str]):
    write_fake_bundle(Path("characters"))
    assert info_main(["characters"]) == 0
    printed = capsys.readouterr()
    assert "labels" in printed.out
    assert "Anger, happiness, turn left" in printed.out
    assert printed.err == ("lfdm-info: WARNING: characters is the folder here, not the shipped bundle of that name\n")


def test_a_damaged_cache_is_rebuilt():
    bundle = Bundle.open("characters")
    (bundle.path / "onnx" / "decode.data").write_bytes(b"")
    (bundle.path / "embeddings.npz").unlink()
    again = Bundle.open("characters")
    assert again.path == bundle.path
    assert (again.path / "onnx" / "decode.data").stat().st_size == again.manifest.files["onnx/decode.data"].bytes


def test_a_cache_that_cannot_be_written_gives_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    cache.write_text("a file, no folder")
    assert generate_main(["characters", "--image", "face.png", "--label", "nod", "-o", "a.gif"]) == 1
    printed = capsys.readouterr().err
    assert "cannot be put together" in printed
    assert "let XDG_CACHE_HOME name a folder" in printed
    assert printed.count("\n") == 1


def test_another_models_weights_are_detected(tmp_path: Path):
    content = ready_bundle.ARCHIVE.read_bytes()
    other = {name: bytes(len(data)) for name, data in sources().items()}
    files = ready_bundle.files_of(content, other)
    folder = tmp_path / "other"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    with pytest.raises(BundleError, match="was altered"):
        Bundle.open(folder)
    with pytest.raises(BundleError, match="is damaged"):
        ready_bundle.files_of(content[: len(content) // 2], other)


def test_packing_keeps_every_byte(tmp_path: Path):
    rng = np.random.default_rng(0)
    source = rng.bytes(5000)
    data = rng.bytes(48) + source[100:1300] + rng.bytes(8) + source[4000:] + source[:200] + rng.bytes(3)
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "a.data").write_bytes(data)
    (tmp_path / "onnx" / "b.data").write_bytes(b"")
    (tmp_path / "manifest.json").write_text('{"files": {"onnx/a.data": {}, "onnx/b.data": {}}}')
    packed = ready_bundle.pack(tmp_path, {"s": source})
    assert packed == ready_bundle.pack(tmp_path, {"s": source})
    assert len(packed) < 1500
    assert ready_bundle.files_of(packed, {"s": source})["onnx/a.data"] == data
    assert ready_bundle.files_of(packed, {"s": source})["onnx/b.data"] == b""


def test_several_processes_assemble_it_at_once():
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(lambda _: ready_bundle.unpack(), range(4)))
    (path,) = paths
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no leftovers"
    assert Bundle.open(path).labels == LABELS
    assert ready_bundle.unpack(rebuild=True) == path
    assert [entry.name for entry in path.parent.iterdir()] == [path.name], "no leftovers"


def test_the_demo_installs_what_it_needs(tmp_path: Path):
    environment = {**os.environ, "MAKEFLAGS": ""}
    said = subprocess.run(
        ["make", "-n", "demo", f"VENV={tmp_path}/venv"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=environment,
    ).stdout  # fmt: skip
    assert "'.[export]'" in said
    assert ".[test]" not in said
    everything = subprocess.run(
        ["make", "-n", "install", f"VENV={tmp_path}/venv"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=environment,
    ).stdout  # fmt: skip
    assert "'.[test]'" in everything


def test_the_pipeline_reports_its_path():
    assert repr(Pipeline("characters")).startswith("<Pipeline '")


def test_it_has_the_tuned_sampler_of_its_weights():
    tuned = TunedSampler.load(ready_bundle.MODEL / "tuned.json")
    bundle = Bundle.open("characters")
    assert bundle.manifest.tuned == tuned
    assert {4, 5, 6} <= {table.steps for table in tuned.tables}
    made = Pipeline(bundle, threads=1, target="onnxruntime", self_check=False).generate(
        "face.png", label="nod", sampler="tuned", steps=4, seed=1
    )
    assert np.abs(made.frames[0, 8].astype(int) - made.frames[0, 0]).mean() > 1, "it moves"


def test_an_export_of_the_shipped_model_includes_its_tuned_sampler(tmp_path: Path):
    """An export of another model has none, unless it is requested."""
    tuned = TunedSampler.load(ready_bundle.MODEL / "tuned.json")
    tuned.save(tmp_path / "tuned.json")
    parser = export_parser()
    found = [
        tuned_of(parser.parse_args(words.split()))
        for words in ("", "--model characters", "--model untrained", f"--model untrained --tuned {tmp_path}/tuned.json")
    ]
    assert found == [tuned, tuned, None, tuned]
