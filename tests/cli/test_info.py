"""`lfdm-info` and the facts it prints."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from lfdm_export.cli import info_main
from lfdm_export.engines import targets
from lfdm_export.engines.bundle_facts import bundle_facts
from lfdm_export.engines.target_spec import Machine
from tests.fake_bundle import FRAMES, SIZE, fake_manifest, write_fake_bundle
from tests.test_imports import BLOCKER, OPTIONAL, ROOT


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_fake_bundle(tmp_path / "mine").path


def test_the_command_is_installed_by_the_project():
    scripts = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.scripts]")[2].partition("[")[0]
    assert 'lfdm-info = "lfdm_export.cli:info_main"' in scripts.splitlines()


def test_it_says_what_a_bundle_is(bundle: Path, capsys: pytest.CaptureFixture[str]):
    assert info_main([str(bundle)]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    facts = dict(line.split("  ", 1) for line in printed.out.splitlines() if not line.startswith(" "))
    said = {name.strip(): value.strip() for name, value in facts.items()}
    assert said["labels"] == "Anger, happiness, turn left"
    assert said["clips"] == f"{FRAMES} frames of {SIZE}x{SIZE}"
    assert said["precision"] == "fp32"
    assert said["motion transfer"] == "yes"
    assert said["target onnxruntime"].startswith("runs here, and is what auto takes (ONNX Runtime ")
    assert said["provenance trained"] == "false"
    assert "onnx/decode.onnx" in printed.out


def test_json_without_torch_and_onnx(bundle: Path):
    code = BLOCKER.format(optional=set(OPTIONAL)) + (
        f"from lfdm_export.cli import info_main\nraise SystemExit(info_main([{str(bundle)!r}, '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["labels"] == ["Anger", "happiness", "turn left"]
    assert (found["frames"], found["image_size"], found["precision"], found["drive"]) == (FRAMES, SIZE, "fp32", True)
    assert set(found["targets"]) == {"onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch"}
    assert set(found["targets"]["openvino"]) == {"runs", "reason"}
    sizes = {name: (bundle / name).stat().st_size for name in found["files"]}
    assert found["files"] == sizes


def test_what_runs_nowhere_says_why(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.engines import bundle_facts as module

    machine = Machine((), "there is no GPU", {})
    monkeypatch.setattr(module, "this_machine", lambda: machine)
    facts = bundle_facts(Bundle.open(bundle))
    assert facts.auto is None
    assert not any(fact.runs for fact in facts.targets.values())
    assert "pip install 'lfdm-export[run]'" in facts.targets["onnxruntime"].reason
    monkeypatch.setattr(module, "this_machine", lambda: Machine((), "there is no GPU", {"onnxruntime": "1.32.0"}))
    assert bundle_facts(Bundle.open(bundle)).auto == "onnxruntime"
    assert set(facts.targets) == set(targets.target_names())


def test_a_bundle_without_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from lfdm_export.bundle.writer import BundleWriter
    from tests.fake_bundle import EMBEDDINGS, NULL, write_graphs

    manifest = dataclasses.replace(fake_manifest(), labels=())
    with BundleWriter(tmp_path / "bare") as writer:
        write_graphs(writer.folder, manifest)
        writer.write_embeddings(EMBEDDINGS[:0], NULL)
        writer.finish(manifest)
    assert info_main([str(tmp_path / "bare")]) == 0
    assert "none: it takes text embeddings" in capsys.readouterr().out


def test_no_bundle_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert info_main([str(tmp_path / "none")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert "there is no bundle at" in printed.err
