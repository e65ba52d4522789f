"""Verification with every available engine, and against Polygraphy's runner."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lfdm_export.bundle.reader import Bundle
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.cli import verify_main
from lfdm_export.engines.cuda_driver import Gpu
from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine
from lfdm_export.engines.openvino.engine import OpenVinoEngine
from lfdm_export.engines.target_spec import Machine
from lfdm_export.errors import EngineError, InputError, MissingDependencyError
from lfdm_export.parity import verify
from lfdm_export.parity.chain import ChainResult
from lfdm_export.parity.report.checks import OtherEngine, nearest
from lfdm_export.parity.report.model import Report
from lfdm_export.parity.report.page import page
from lfdm_export.parity.verify import verify_bundle
from lfdm_export.stages import stage_specs
from tests.engines.test_plans import L4
from tests.engines.test_targets import EVERYTHING, machine
from tests.processor import needs_openvino

NO_GPU = machine(EVERYTHING)
#: Each network once. ONNX Runtime runs the other stages in test_verify, every engine all of them in a full test.
STAGES = ("encode", "step", "decode")
pytestmark = [pytest.mark.usefixtures("compiled_once", "loaded_once", "few_stages"), needs_openvino]


@pytest.fixture(scope="module")
def bundle(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A copy, so that compiled files and reports can be written into it."""
    return Bundle.open(shutil.copytree(small_bundle.path, tmp_path_factory.mktemp("engines") / "bundle"))


@pytest.fixture(scope="module")
def few_stages() -> Iterator[None]:
    """Compare the stages of `STAGES` only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            verify, "stage_specs", lambda *g, **more: {name: stage_specs(*g, **more)[name] for name in STAGES}
        )
        yield


@pytest.fixture(scope="module")
def report(bundle: Bundle, compiled_once: None, loaded_once: None, few_stages: None) -> Report:
    return verify_bundle(bundle, threads=1, targets=("all",), polygraphy=True)


def of(report: Report, name: str) -> OtherEngine:
    (found,) = [other for other in report.others if other.name.startswith(name)]
    return found


def test_every_available_engine_runs_and_the_others_report_why_not(report: Report):
    assert report.engine == "ONNX Runtime, CPU"
    assert report.passed, report.failures
    openvino = of(report, "OpenVINO, CPU")
    assert [(c.stage, c.kind, c.subject) for c in openvino.checks] == [
        (c.stage, c.kind, c.subject) for c in report.checks
    ]
    assert [c.found for c in openvino.checks] != [c.found for c in report.checks], (
        "another engine gives other last bits"
    )
    for name in ("TensorRT", "TensorRT for RTX"):
        (other,) = [one for one in report.others if one.name == name]
        assert other.lacking
        assert other.checks == ()
    assert len(report.all_checks) > 2 * len(report.checks)


@pytest.mark.full  # a minute: four more stages are compiled for two sizes of a batch
def test_every_stage_passes_with_every_engine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "stage_specs", stage_specs)
    report = verify_bundle(bundle, threads=1, targets=("all",), polygraphy=True)
    assert report.passed, report.failures
    assert {check.stage for check in of(report, "OpenVINO, CPU").checks} > bundle.stages.keys()
    for name in ("ONNX Runtime against", "OpenVINO against"):
        assert {check.stage for check in of(report, name).checks} == bundle.stages.keys()


def test_polygraphy_agrees(report: Report, bundle: Bundle):
    for name in ("ONNX Runtime against ONNX Runtime, by Polygraphy", "OpenVINO against ONNX Runtime, by Polygraphy"):
        other = of(report, name)
        assert [check.stage for check in other.checks] == [name for name in STAGES for _ in bundle.stages[name].outputs]
        assert all(check.found is not None for check in other.checks)
    own = of(report, "ONNX Runtime against")
    assert max(check.found or 0 for check in own.checks) < 1e-5, "the same engine, in other memory"
    assert max(check.found or 0 for check in of(report, "OpenVINO against").checks) > 0


def test_polygraphys_own_file_can_be_read_again(report: Report, bundle: Bundle):
    from polygraphy.comparator import RunResults

    results = RunResults.load(str(bundle.path / "parity" / "polygraphy" / "encode.json"))
    assert list(dict(results.items())) == ["ONNX Runtime, by Polygraphy", "OpenVINO"]
    assert Bundle.open(bundle.path).manifest == bundle.manifest, "Polygraphy's files are not part of the bundle"


def test_the_report_shows_them(report: Report):
    assert Report.from_json(report.to_json()) == report
    html = page(report)
    assert "Other engines" in html
    assert "OpenVINO against ONNX Runtime, by Polygraphy" in html
    assert "not run: " in html
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.table())
    text = console.export_text()
    assert "OpenVINO, CPU" in text
    assert "TensorRT for RTX" in text


def test_a_wrong_engine_fails_with_its_name(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    real = OpenVinoEngine.run

    def wrong(engine: OpenVinoEngine, feeds: Any) -> Any:
        outputs = real(engine, feeds)
        if engine.spec.name == "encode":
            outputs["context"] = np.multiply(outputs["context"], np.float32(1.01))
        return outputs

    monkeypatch.setattr(OpenVinoEngine, "run", wrong)
    report = verify_bundle(bundle, threads=1, targets=("onnxruntime", "openvino"), polygraphy=True)
    assert not report.passed
    stages = {check.stage for check in report.failures}
    assert stages >= {"OpenVINO, CPU: encode", "OpenVINO against ONNX Runtime, by Polygraphy: encode"}
    assert not any(stage.startswith(("encode", "ONNX Runtime")) for stage in stages)
    assert "OpenVINO, CPU: encode" in report.verdict
    assert "✗" in page(report)
    assert nearest(of(report, "OpenVINO, CPU").checks) is not None


def test_an_engine_error_also_fails_polygraphys_comparison(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    def broken(engine: OnnxRuntimeEngine, feeds: Any) -> Any:
        raise EngineError("out of order")

    monkeypatch.setattr(OnnxRuntimeEngine, "run", broken)
    report = verify_bundle(bundle, threads=1, polygraphy=True)
    checks = of(report, "ONNX Runtime against").checks
    assert {check.meaning for check in checks} == {"out of order"}
    assert len(checks) == len(STAGES)


def test_one_engine_by_name(bundle: Bundle):
    report = verify_bundle(bundle, threads=1, targets=("openvino",))
    assert report.engine == "OpenVINO, CPU"
    assert report.passed
    assert report.others == ()


def test_a_requested_target_that_is_not_available_is_an_error(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "this_machine", lambda: NO_GPU)
    with pytest.raises(EngineError, match=r"'tensorrt' is not available here: .* sees no GPU"):
        verify_bundle(bundle, targets=("tensorrt",))
    with pytest.raises(InputError, match="unknown target 'tpu'"):
        verify_bundle(bundle, targets=("tpu",))


def test_no_target_runs_the_bundle(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "this_machine", lambda: Machine((), "there is no GPU", {}))
    with pytest.raises(EngineError, match=r"nothing here runs .*: ONNX Runtime: onnxruntime not installed: pip"):
        verify_bundle(bundle, targets=("all",))


def test_a_gpu_without_plans_reports_how_to_build_them(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "this_machine", lambda: machine({**EVERYTHING}, L4))
    ran: list[str] = []

    def stop(_comparison: Any, target: str, *_: Any) -> Any:
        ran.append(target)
        raise KeyboardInterrupt

    monkeypatch.setattr(verify, "_run", stop)
    with pytest.raises(KeyboardInterrupt):
        verify_bundle(bundle, targets=("all",))
    runs, absent = verify._choose(bundle, ("all",))
    assert runs == ["onnxruntime", "openvino"]
    assert [other.lacking for other in absent] == [
        f"the bundle has no plans for it: lfdm-export --plans {bundle.path} --target {target}"
        for target in ("tensorrt", "tensorrt-rtx")
    ] + ["torch and einops and safetensors not installed: pip install 'lfdm-export[torch]'"]


def test_without_polygraphy(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(__import__("sys").modules, "polygraphy.backend.base", None)
    reference: Any = None
    comparison = verify._Comparison(
        bundle, {"encode": bundle.stages["encode"]}, {"image": np.zeros(1)}, reference, threads=1
    )
    with pytest.raises(MissingDependencyError, match=r"'polygraphy'.*pip install 'lfdm-export\[polygraphy\]'"):
        verify._by_polygraphy(comparison, "onnxruntime")


# ------------------------------------------------------------------------------------- the command


def test_the_command_runs_all_of_them(bundle: Bundle, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    given: dict[str, Any] = {}

    def stop(bundle: Bundle, **options: Any) -> Any:
        given.update(options)
        raise EngineError("enough")

    monkeypatch.setattr(verify, "verify_bundle", stop)
    assert verify_main([str(bundle.path)]) == 1
    assert (given["targets"], given["polygraphy"]) == (("all",), False)
    verify_main([str(bundle.path), "--target", "openvino", "--target", "onnxruntime", "--polygraphy"])
    assert (given["targets"], given["polygraphy"]) == (("openvino", "onnxruntime"), True)
    with pytest.raises(SystemExit):
        verify_main([str(bundle.path), "--target", "tpu"])


def test_a_bundle_with_polygraphys_files_can_be_replaced(report: Report, bundle: Bundle):
    with BundleWriter(bundle.path):
        pass
    written = json.loads((bundle.path / "manifest.json").read_text(encoding="utf-8"))
    assert not any(name.startswith("parity/") for name in written["files"])


def test_engines_on_the_gpu_are_named_after_it(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verify, "check_stage", lambda *_: [])
    monkeypatch.setattr(verify, "check_chain", lambda *_: ChainResult(()))
    monkeypatch.setattr(verify, "find_gpus", lambda: ((Gpu("NVIDIA L4", (8, 9), 1, "13.0"),), ""))
    reference: Any = SimpleNamespace(chain=None, seed=0)
    comparison = verify._Comparison(bundle, {}, {}, reference, threads=1)
    names = [verify._run(comparison, target, "fp32").engine.name for target in ("tensorrt", "openvino")]
    assert names == ["TensorRT, NVIDIA L4", "OpenVINO, CPU"]
