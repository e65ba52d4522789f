from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping

import pytest

from lfdm_export.engines import targets
from lfdm_export.engines.cuda_driver import Gpu, find_gpus
from lfdm_export.engines.target_spec import FIRST_CAPABILITY, Machine, Purpose, Target, TargetSpec
from lfdm_export.engines.targets import Choice, find_target, find_targets
from lfdm_export.engines.tensorrt.target import TENSORRT, TENSORRT_RTX, rtx_architectures
from lfdm_export.errors import EngineError, InputError
from tests.test_imports import BLOCKER

RTX = {"tensorrt_rtx_bindings": "1.7.1.116", "onnxruntime_ep_nv_tensorrt_rtx": "0.5.0"}
OPENVINO = {"openvino": "2026.4.1", "onnx": "1.23.2"}
CPU = {"onnxruntime": "1.32.0", **OPENVINO}
TENSORRT_11 = {"tensorrt": "11.4.0.106"}
EVERYTHING = {**RTX, **CPU, **TENSORRT_11}


def gpu(architecture: tuple[int, int] = (8, 9), name: str = "NVIDIA L4") -> Gpu:
    return Gpu(name, architecture, 24 << 30, "13.0")


def machine(packages: Mapping[str, str], *gpus: Gpu) -> Machine:
    return Machine(gpus, "" if gpus else "the NVIDIA driver sees no GPU", packages)


def precisions(spec: TargetSpec, purpose: Purpose, machine: Machine) -> tuple[str, ...]:
    return tuple(one for one in FIRST_CAPABILITY if not spec.lacking(purpose, one, machine))


# ------------------------------------------------------------------------------------- making plans


@pytest.mark.parametrize(
    ("packages", "gpus", "target", "why"),
    [
        (EVERYTHING, (gpu(),), "tensorrt", r"TensorRT 11\.4\.0\.106 is installed and there is a GPU, NVIDIA L4 \(SM89"),
        (EVERYTHING, (), "tensorrt-rtx", r"builds without a GPU; not TensorRT: .* the NVIDIA driver sees no GPU"),
        (RTX | CPU, (gpu(),), "tensorrt-rtx", r"not TensorRT: tensorrt not installed: pip install .*\[tensorrt\]"),
        (CPU, (gpu(),), None, r"pip install 'lfdm-export\[tensorrt-rtx\]'"),
        ({**EVERYTHING, "tensorrt": "10.9.0.34"}, (gpu(),), "tensorrt-rtx", r"10\.9\.0\.34 is older than 10\.12"),
        ({**EVERYTHING, "tensorrt": "10.12.0.36"}, (gpu(),), "tensorrt", "is installed"),
    ],
)
def test_auto_for_plans(packages: Mapping[str, str], gpus: tuple[Gpu, ...], target: Target | None, why: str):
    choice = find_target("auto", "export", "fp16", machine=machine(packages, *gpus))
    assert choice.target == target
    assert re.search(why, choice.reason), choice.reason


@pytest.mark.parametrize(
    ("name", "packages", "gpus", "message"),
    [
        ("tensorrt", CPU, (gpu(),), r"'tensorrt' is not available here: tensorrt not installed: pip install"),
        ("tensorrt", EVERYTHING, (), "only where its GPU is, and the NVIDIA driver sees no GPU: use a machine"),
        ("tensorrt-rtx", CPU, (), r"tensorrt_rtx_bindings and onnxruntime_ep_nv_tensorrt_rtx not installed"),
        ("openvino", {}, (), r"openvino and onnx not installed: pip install 'lfdm-export\[openvino\]'"),
        ("onnxruntime", {}, (), r"onnxruntime not installed: pip install 'lfdm-export\[run\]'"),
    ],
)
def test_what_is_asked_for_and_not_there_is_an_error(
    name: str, packages: Mapping[str, str], gpus: tuple[Gpu, ...], message: str
):
    with pytest.raises(EngineError, match=message):
        find_target(name, "export", "fp16", machine=machine(packages, *gpus))


def test_an_unknown_target():
    with pytest.raises(InputError, match="unknown target 'tpu'; expected auto, onnxruntime, openvino, tensorrt, "):
        find_target("tpu", "run", "fp32")


# ----------------------------------------------------------------------------------------- running


@pytest.mark.parametrize(
    ("packages", "gpus", "plans", "target"),
    [
        (EVERYTHING, (gpu(),), ("tensorrt", "tensorrt-rtx"), "tensorrt"),
        (EVERYTHING, (gpu(),), ("tensorrt-rtx",), "tensorrt-rtx"),
        (EVERYTHING, (gpu(),), (), "onnxruntime"),
        (EVERYTHING, (), ("tensorrt", "tensorrt-rtx"), "onnxruntime"),
        (EVERYTHING, (gpu((9, 0), "NVIDIA H200"),), ("tensorrt-rtx",), "onnxruntime"),
        (OPENVINO, (), (), "openvino"),
        (RTX | CPU, (gpu(),), ("tensorrt",), "onnxruntime"),
    ],
)
def test_auto_for_running(
    packages: Mapping[str, str], gpus: tuple[Gpu, ...], plans: tuple[Target, ...], target: Target
):
    assert find_target("auto", "run", "fp16", plans=plans, machine=machine(packages, *gpus)).target == target


def test_auto_says_why_not_the_faster_one():
    choice = find_target("auto", "run", "fp16", plans=("tensorrt-rtx",), machine=machine(EVERYTHING))
    assert choice.target == "onnxruntime"
    assert "not TensorRT for RTX: TensorRT for RTX runs only on a GPU, and the NVIDIA driver sees no" in choice.reason


def test_nothing_at_all():
    with pytest.raises(EngineError, match=r"nothing here runs a bundle of precision 'fp16': ONNX Runtime: .*OpenVINO"):
        find_target("auto", "run", "fp16", machine=machine({}))
    assert find_target("auto", "export", "fp16", machine=machine({})).target is None


def test_an_explicit_target_is_taken_whatever_plans_there_are():
    choice = find_target("tensorrt", "run", "fp16", machine=machine(EVERYTHING, gpu()))
    assert choice == Choice("tensorrt", "as requested")


# -------------------------------------------------------------------------------------- precisions


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ((7, 5), ("fp32", "fp16", "int8")),
        ((8, 6), ("fp32", "fp16", "int8", "tf32", "bf16")),
        ((8, 9), ("fp32", "fp16", "int8", "tf32", "bf16", "fp8")),
        ((9, 0), ("fp32", "fp16", "int8", "tf32", "bf16", "fp8")),
    ],
)
def test_precisions_of_a_gpu(architecture: tuple[int, int], expected: tuple[str, ...]):
    assert precisions(TENSORRT, "run", machine(EVERYTHING, gpu(architecture))) == expected
    reason = TENSORRT.lacking("export", "fp8", machine(EVERYTHING, gpu((8, 6), "NVIDIA A10")))
    assert reason == "NVIDIA A10 (SM86) has no fp8: export another precision"


def test_rtx_builds_every_precision_without_a_gpu_and_runs_none():
    assert set(precisions(TENSORRT_RTX, "export", machine(RTX))) == {"fp32", "tf32", "fp16", "bf16", "int8", "fp8"}
    assert precisions(TENSORRT_RTX, "run", machine(RTX)) == ()


def test_rtx_does_not_know_every_gpu():
    reason = TENSORRT_RTX.lacking("run", "fp16", machine(RTX, gpu((9, 0), "NVIDIA H200")))
    assert reason == "it knows SM75, SM80, SM86, SM89, SM120, SM121, not NVIDIA H200 (SM90): use --target tensorrt"


def test_what_rtx_builds_for():
    assert rtx_architectures("fp16") == ("SM80", "SM86", "SM89", "SM120", "SM121")
    assert rtx_architectures("fp8") == ("SM89", "SM120", "SM121")
    assert rtx_architectures("fp16", ["SM120", "SM75"]) == ("SM75", "SM120")
    with pytest.raises(InputError, match="unknown GPU architecture 'SM90'; expected some of SM75"):
        rtx_architectures("fp16", ["SM90"])
    with pytest.raises(InputError, match="SM75 has no bf16; leave it out"):
        rtx_architectures("bf16", ["SM75", "SM89"])
    with pytest.raises(EngineError, match="SM75 has no bf16: leave it out of --gpus"):
        find_target("tensorrt-rtx", "export", "bf16", machine=machine(RTX), gpus=["SM75", "SM89"])


# ------------------------------------------------------------------------------------ this machine


def test_this_machine_is_looked_at_without_loading_anything():
    code = (
        "import sys\nfrom lfdm_export.engines.targets import this_machine\n"
        "found = this_machine()\n"
        "heavy = {'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx_bindings'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(dict(found.packages)['onnxruntime'])\n"
        "assert bool(found.gpus) != bool(found.no_gpu)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()[0].isdigit()


def test_a_bare_machine():
    code = BLOCKER.format(optional={"onnxruntime", "openvino", "tensorrt", *RTX}) + (
        "from lfdm_export.engines.targets import find_target\n"
        "print(find_target('auto', 'export', 'fp16').target)\n"
        "find_target('auto', 'run', 'fp16')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "None"
    assert "pip install 'lfdm-export[run]'" in done.stderr


def test_no_driver_is_no_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lfdm_export.engines.cuda_driver._LIBRARY", "libno-such-driver.so.1")
    find_gpus.cache_clear()
    try:
        gpus, reason = find_gpus()
    finally:
        find_gpus.cache_clear()
    assert gpus == ()
    assert "no NVIDIA driver" in reason
    assert "libno-such-driver.so.1" in reason


@pytest.mark.parametrize("flags", [("avx512_vnni",), ("avx2", "avx_vnni"), ("amx_int8",)])
def test_openvino_runs_int8_where_8_bit_sums_are_whole(flags: tuple[str, ...]):
    here = Machine((), "none", CPU, flags)
    assert [choice.target for choice in find_targets("auto", "run", "int8", machine=here)] == [
        "openvino", "onnxruntime",
    ]  # fmt: skip


def test_openvino_is_refused_where_they_saturate():
    here = Machine((), "none", CPU, ("avx2", "avx512f", "avx512bw"))
    (choice,) = find_targets("auto", "run", "int8", machine=here)
    assert choice.target == "onnxruntime"
    assert "not OpenVINO: this processor has no VNNI" in choice.reason
    with pytest.raises(EngineError, match=r"no VNNI, without which .* saturate .*: use --target onnxruntime"):
        find_target("openvino", "run", "int8", machine=here)
    assert find_target("openvino", "run", "fp32", machine=here).target == "openvino"


def test_openvino_is_refused_on_a_processor_without_avx():
    here = Machine((), "none", CPU, ("sse4_1",))
    (choice,) = find_targets("auto", "run", "fp32", machine=here)
    assert choice.target == "onnxruntime"
    with pytest.raises(EngineError, match=r"no AVX, or ONEDNN_MAX_CPU_ISA takes it away.*: use --target onnxruntime"):
        find_target("openvino", "run", "fp32", machine=here)


def test_packages_are_looked_for_by_their_import_names():
    found = targets.this_machine().packages
    assert set(found) <= {*EVERYTHING, "torch", "einops", "safetensors"}
    assert found["tensorrt_rtx_bindings"].startswith("1.7.1")
