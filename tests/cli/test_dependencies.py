"""A missing package: every command prints one sentence with the extra that installs it."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

from lfdm_export.dependencies import missing_dependency
from tests.test_imports import BLOCKER, OPTIONAL

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("module", "wanted", "extra"),
    [
        ("torch", "export", "export"),
        ("torch", "train", "train"),  # imported by the export
        ("onnx_ir", "export", "export"),
        ("onnx.inliner", "run", "export"),  # not installed by `run`
        ("av", "run", "video"),
        ("onnxruntime.capi", "run", "run"),
        ("tokenizers", "serve", "serve"),
        ("accelerate", "train", "multi-gpu"),
        ("cma", "train", "train"),
        ("matplotlib.figure", "train", "bench"),
    ],
)
def test_the_extra_is_the_one_that_is_meant_or_the_first_that_brings_it(module: str, wanted: str, extra: str):
    found = missing_dependency(ModuleNotFoundError("no", name=module), "this", wanted)
    assert found is not None
    assert str(found) == (
        f"this needs the package {module.partition('.')[0]!r}, which is not installed; "
        f"install it with: pip install 'lfdm-export[{extra}]'"
    )


@pytest.mark.parametrize("module", ["lfdm_export.nothing", "json", "no_such_package", None])
def test_what_no_extra_brings_is_another_fault(module: str | None):
    assert missing_dependency(ModuleNotFoundError("no", name=module), "this", "run") is None


def test_sources_without_metadata_know_no_extras(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert missing_dependency(ModuleNotFoundError("no", name="torch"), "this", "run") is None


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("export_main([])", "export"),
        ("export_main(['--plans', '{bundle}', '--target', 'tensorrt-rtx'])", "tensorrt-rtx"),
        ("verify_main(['{bundle}', '--lfae', '{bundle}/a.pth', '--dm', '{bundle}/b.pth'])", "export"),
        ("generate_main(['{bundle}', '--image', 'x.png', '--label', 'anger', '--out', 'x.gif'])", "run"),
        ("train_main(['lfae', '--steps', '1', '--out', 'run'])", "train"),
        ("train_main(['dm', '--lfae', 'a.pth', '--steps', '1', '--out', 'run'])", "train"),
        ("train_main(['classifier', '--out', 'c.safetensors'])", "train"),
        ("train_main(['evaluate', '{bundle}'])", "train"),
    ],
)
def test_every_command_says_it_in_one_sentence(command: str, extra: str, tmp_path: Path):
    from tests.fake_bundle import write_fake_bundle

    bundle = write_fake_bundle(tmp_path / "bundle")
    photo = tmp_path / "x.png"
    photo.write_bytes((ROOT / "docs" / "character.png").read_bytes())
    code = (
        BLOCKER.format(optional={*OPTIONAL, "onnx_ir", "matplotlib"})
        + f"import lfdm_export.cli as cli\nsys.exit(cli.{command.format(bundle=bundle.path)})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert f"pip install 'lfdm-export[{extra}]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("name", ["load_model", "export_bundle"])
def test_the_python_interface_says_it_too(name: str):
    code = (
        BLOCKER.format(optional=set(OPTIONAL))
        + f"import lfdm_export\ntry:\n    lfdm_export.{name}\n"
        + "except lfdm_export.MissingDependencyError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert f"lfdm_export.{name} needs the package " in done.stdout, done.stderr
    assert "pip install 'lfdm-export[export]'" in done.stdout


@pytest.mark.parametrize("script", sorted(path.stem for path in (ROOT / "benchmarks").glob("*plots.py")))
def test_plotting_scripts_explain_themselves_without_matplotlib(script: str):
    code = (
        BLOCKER.format(optional={"matplotlib"})
        + f"import runpy; sys.argv = ['x', '--help']\nrunpy.run_path({str(ROOT / 'benchmarks' / (script + '.py'))!r}, "
        "run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


def test_the_extras_that_the_code_names_bring_the_packages_that_it_names():
    """Messages name extras at each failing import; pyproject.toml defines what the extras install."""
    wrong, seen = [], 0
    for path in [*ROOT.glob("lfdm_export/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or getattr(node.func, "id", "") != "MissingDependencyError":
                continue
            package, extra = node.args[0], node.args[2]
            if isinstance(package, ast.Constant) and isinstance(extra, ast.Constant):
                seen += 1
                name = str(package.value).partition("[")[0]
                found = missing_dependency(ModuleNotFoundError("no", name=name), "this", str(extra.value))
                if found is None or found.extra != extra.value:
                    wrong.append(f"{path.name}: {package.value!r} is not in {extra.value!r}")
    assert seen > 5
    assert wrong == []
