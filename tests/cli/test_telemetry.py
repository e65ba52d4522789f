"""Dependencies neither send reports nor store identifiers."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lfdm_export.telemetry import VARIABLES

ROOT = Path(__file__).resolve().parents[2]
CORE = "from lfdm_export.engines.openvino.engine import shared_core; shared_core()"


def run_at_home(code: str, home: Path, **variables: str) -> list[str]:
    """Run a program, and return the files that it leaves in the user's home folder."""
    home.mkdir(exist_ok=True)
    known = {name: value for name, value in os.environ.items() if name not in (*VARIABLES, "XDG_CACHE_HOME")}
    environment = {**known, "HOME": str(home), "PYTHONDONTWRITEBYTECODE": "1", **variables}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file())


@pytest.mark.parametrize("code", ["import lfdm_export, onnxruntime", CORE])
def test_nothing_is_left_in_the_home(tmp_path: Path, code: str):
    assert run_at_home(code, tmp_path / "home") == []


def test_a_home_that_cannot_be_written_is_no_matter(tmp_path: Path):
    for code in ("import lfdm_export, onnxruntime", CORE):
        assert run_at_home(code, tmp_path, HOME="/proc/none") == []


def test_what_the_user_says_counts():
    code = f"import lfdm_export, os; print([os.environ[name] for name in {list(VARIABLES)}])"
    for said in ("0", "1"):
        environment = {**os.environ, **dict.fromkeys(VARIABLES, said)}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
        assert ast.literal_eval(done.stdout) == [said] * len(VARIABLES)


@pytest.mark.skipif(importlib.util.find_spec("openvino_telemetry") is None, reason="OpenVINO came without its reporter")
def test_others_may_still_import_the_reporter():
    done = subprocess.run([sys.executable, "-c", CORE + "\nimport openvino_telemetry"], check=False)
    assert done.returncode == 0


def test_openvino_is_imported_in_one_place():
    wrong = []
    for path in [*ROOT.glob("lfdm_export/**/*.py"), *ROOT.glob("models/**/*.py"), *ROOT.glob("benchmarks/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                base = node.module or "" if isinstance(node, ast.ImportFrom) else ""
                names = [base] if base else [alias.name for alias in node.names]
                wrong += [f"{path.name}:{node.lineno}" for name in names if name.partition(".")[0] == "openvino"]
    assert wrong == []


def test_the_networks_alone_are_silent_too():
    code = (
        "import os, sys; os.environ.pop('HF_HUB_DISABLE_TELEMETRY', None); sys.modules['transformers'] = None\n"
        "from lfdm_models.text import BertTextEncoder, TextEncoderError\n"
        "try:\n    BertTextEncoder.load('/nowhere')\nexcept TextEncoderError:\n"
        "    print(os.environ['HF_HUB_DISABLE_TELEMETRY'], 'lfdm_export' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "1 False\n", done.stderr
