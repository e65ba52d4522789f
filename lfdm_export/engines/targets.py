"""What can run a bundle, what of it this machine has, and which is taken where nobody says.

A target is a program that runs stages. "onnxruntime" and "openvino" take a bundle's graphs as they are; "tensorrt"
and "tensorrt-rtx" take plans, which are built for a GPU and lie beside the graphs; "torch" takes weights that lie
there, and compiles its own programs of them.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal, cast, get_args

from lfdm_export.engines.cuda_driver import Gpu, find_gpus
from lfdm_export.errors import EngineError, InputError
from lfdm_export.machine import processor_info

Target = Literal["onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch"]
Purpose = Literal["export", "run"]

TARGETS: tuple[Target, ...] = get_args(Target)
#: Targets that take plans in place of graphs; where both can be had, the first is taken.
PLAN_TARGETS: tuple[Target, ...] = ("tensorrt", "tensorrt-rtx")
#: Targets that run what a bundle holds for them alone, in the order in which "auto" takes them on a GPU.
HELD_TARGETS: tuple[Target, ...] = (*PLAN_TARGETS, "torch")
#: Targets that run graphs on a CPU; the first that can is taken, but for `_CPU_ORDER`.
CPU_TARGETS: tuple[Target, ...] = ("onnxruntime", "openvino")
#: Chooses among the targets; see `find_target`.
AUTO = "auto"
#: Stands for every target that can be had.
EVERY_TARGET = "all"
#: Stands, when a bundle is verified, for a CPU that rounds as a GPU does.
SIMULATION = "simulation"

#: What messages call a target.
TITLES: Mapping[Target, str] = {
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "torch": "PyTorch",
}

#: Bindings and libraries of TensorRT for RTX come in two packages, and must be of the same version.
RTX_BINDINGS, RTX_LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
# Import names that a target needs, and for each the distributions that can bring it; its own comes first.
_NEEDED: Mapping[Target, Mapping[str, tuple[str, ...]]] = {
    "onnxruntime": {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")},
    "openvino": {"openvino": ("openvino",), "onnx": ("onnx",)},
    "tensorrt": {"tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")},
    "tensorrt-rtx": {
        RTX_BINDINGS: ("tensorrt-rtx-cu13-bindings",),
        RTX_LIBRARIES: ("onnxruntime-ep-nv-tensorrt-rtx-cu13",),
    },
    "torch": {"torch": ("torch",), "einops": ("einops",), "safetensors": ("safetensors",)},
}
_EXTRAS: Mapping[Target, str] = {
    "onnxruntime": "run",
    "openvino": "openvino",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
    "torch": "torch",
}
#: The oldest TensorRT that takes every strongly typed graph of a bundle.
OLDEST_TENSORRT = (10, 12)

#: GPU architectures that TensorRT for RTX 1.7 can build for.
RTX_ARCHITECTURES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
#: Those that a plan is built for unless told otherwise: all but Turing, which has no bf16 and no TF32.
RTX_DEFAULT = ("SM80", "SM86", "SM89", "SM120", "SM121")
# The first compute capability that multiplies matrices in a precision. Source: CUDA programming guide, tensor cores.
_FIRST_CAPABILITY: Mapping[str, tuple[int, int]] = {
    "fp32": (7, 5),
    "fp16": (7, 5),
    "int8": (7, 5),
    "tf32": (8, 0),
    "bf16": (8, 0),
    "fp8": (8, 9),
}
# What runs on a CPU. Tried with ONNX Runtime 1.32, which has no bf16 convolution there, and OpenVINO 2026.4.
_CPU_PRECISIONS: Mapping[Target, tuple[str, ...]] = {
    "onnxruntime": ("fp32", "tf32", "fp16", "int8", "fp8"),
    "openvino": ("fp32", "tf32", "fp16", "bf16", "int8"),
}
#: What PyTorch runs, and the same without a GPU: its 16-bit floats of a CPU are bfloat16.
_TORCH_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
_TORCH_CPU_PRECISIONS = ("fp32", "tf32", "bf16")
# ONNX Runtime convolves in float32 what an int8 graph has quantised; see docs/precision.md.
_CPU_ORDER: Mapping[str, tuple[Target, ...]] = {"int8": ("openvino", "onnxruntime")}
# Without one of these OpenVINO has no bf16, or only an imitation that is slower than float32.
_BF16_PROCESSORS = ("avx512_bf16", "amx_bf16")
# Without one of these OpenVINO adds pairs of 8-bit products in 16 bits, which saturate: see docs/precision.md.
_INT8_PROCESSORS = ("avx512_vnni", "avx_vnni", "amx_int8")


@dataclass(frozen=True)
class Machine:
    """What the targets are chosen by.

    Attributes:
        gpus: NVIDIA GPUs; the first is used.
        no_gpu: why there is none; "" if there is one.
        packages: versions of those packages that targets need and that are there, by import name.
        processor: what its processor can do, in Linux's words.
    """

    gpus: tuple[Gpu, ...]
    no_gpu: str
    packages: Mapping[str, str]
    processor: Collection[str] = ()


@dataclass(frozen=True)
class Choice:
    """The target that is taken, and why, in a clause; None where no target makes plans here."""

    target: Target | None
    reason: str


def this_machine() -> Machine:
    """What this machine has; nothing heavy is imported."""
    gpus, no_gpu = find_gpus()
    needed = {name: distributions for packages in _NEEDED.values() for name, distributions in packages.items()}
    found = {name: _version(distributions) for name, distributions in needed.items() if _is_there(name)}
    return Machine(gpus, no_gpu, found, frozenset(processor_info().get("flags", "").split()))


def check_target_name(name: str, *others: str) -> None:
    """Refuse a name that is neither a target nor one of `others`.

    Raises:
        InputError: it is not.
    """
    if name not in (*TARGETS, *others):
        raise InputError(f"unknown target {name!r}; expected {', '.join((*others, *TARGETS))}")


def lacking(
    target: Target, purpose: Purpose, precision: str, machine: Machine, *, gpus: Collection[str] | None = None
) -> str:
    """Why a target cannot be had here, with the remedy, in a clause; "" if it can.

    Args:
        target: the target.
        purpose: "export": make plans (the CPU targets need none); "run": run stages.
        precision: of the bundle.
        machine: this one.
        gpus: architectures that TensorRT for RTX shall build for; None for `RTX_DEFAULT`.
    """
    missing = [name for name in _NEEDED[target] if name not in machine.packages]
    if missing:
        return f"{' and '.join(missing)} not installed: pip install 'lfdm-export[{_EXTRAS[target]}]'"
    if target == "tensorrt" and (0, 0) < _numbers(machine.packages["tensorrt"]) < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        return f"TensorRT {machine.packages['tensorrt']} is older than {oldest}: pip install --upgrade tensorrt"
    if target in PLAN_TARGETS:
        return _gpu_lacking(target, purpose, precision, machine, gpus)
    if target == "torch":
        return _torch_lacking(purpose, precision, machine)
    if precision not in _CPU_PRECISIONS[target]:
        return f"{TITLES[target]} has no {precision} on a CPU: take another target, or export another precision"
    if target == "openvino" and precision == "bf16" and not set(_BF16_PROCESSORS) & set(machine.processor):
        return "this processor has no bf16 (AVX-512 BF16 or AMX): export another precision"
    if target == "openvino" and precision == "int8" and not set(_INT8_PROCESSORS) & set(machine.processor):
        return (
            "this processor has no VNNI, without which its 8-bit sums saturate (clips of the shipped model come to "
            "23 dB): use --target onnxruntime"
        )
    return ""


def _torch_lacking(purpose: Purpose, precision: str, machine: Machine) -> str:
    """`lacking` of PyTorch, which is there."""
    if precision not in _TORCH_PRECISIONS:
        return f"PyTorch has no {precision} here: take another target, or export another precision"
    if purpose == "export":
        return ""
    if machine.gpus:
        gpu = machine.gpus[0]
        lacks = gpu.compute_capability < _FIRST_CAPABILITY[precision]
        return f"{gpu.name} ({gpu.architecture}) has no {precision}: export another precision" if lacks else ""
    if precision not in _TORCH_CPU_PRECISIONS:
        return f"PyTorch runs {precision} on a GPU, and {machine.no_gpu}: take another target, or export bf16 or fp32"
    return ""


def _gpu_lacking(
    target: Target, purpose: Purpose, precision: str, machine: Machine, gpus: Collection[str] | None
) -> str:
    """`lacking` of a target that runs on GPUs, whose packages are there."""
    first = _FIRST_CAPABILITY[precision]
    if target == "tensorrt-rtx" and purpose == "export":
        wanted = RTX_DEFAULT if gpus is None else gpus
        able = [gpu for gpu in wanted if _capability(gpu) >= first]
        if not able or (gpus is not None and len(able) < len(gpus)):
            unable = ", ".join(gpu for gpu in wanted if gpu not in able)
            return f"{unable} has no {precision}: leave it out of --gpus, or export another precision"
        return ""
    if not machine.gpus:
        need = "builds and runs only where its GPU is" if target == "tensorrt" else "runs only on a GPU"
        return f"{TITLES[target]} {need}, and {machine.no_gpu}: use a machine with one, or --target onnxruntime"
    gpu = machine.gpus[0]
    if gpu.compute_capability < first:
        return f"{gpu.name} ({gpu.architecture}) has no {precision}: export another precision"
    if target == "tensorrt-rtx" and gpu.architecture not in RTX_ARCHITECTURES:
        known = ", ".join(RTX_ARCHITECTURES)
        return f"it knows {known}, not {gpu.name} ({gpu.architecture}): use --target tensorrt"
    return ""


def rtx_architectures(precision: str, gpus: Collection[str] | None = None) -> tuple[str, ...]:
    """What a plan of TensorRT for RTX is built for: those asked for, or all of `RTX_DEFAULT` that have the precision.

    Raises:
        InputError: one that is asked for is unknown or has no such precision.
    """
    for gpu in gpus or ():
        if gpu not in RTX_ARCHITECTURES:
            raise InputError(f"unknown GPU architecture {gpu!r}; expected some of {', '.join(RTX_ARCHITECTURES)}")
        if _capability(gpu) < _FIRST_CAPABILITY[precision]:
            raise InputError(f"{gpu} has no {precision}; leave it out, or choose another precision")
    wanted = gpus or RTX_DEFAULT
    return tuple(gpu for gpu in RTX_ARCHITECTURES if gpu in wanted and _capability(gpu) >= _FIRST_CAPABILITY[precision])


def precisions(target: Target, purpose: Purpose, machine: Machine) -> tuple[str, ...]:
    """The precisions that a target can make plans of, or run, on this machine."""
    return tuple(one for one in _FIRST_CAPABILITY if not lacking(target, purpose, one, machine))


def find_target(
    name: str,
    purpose: Purpose,
    precision: str,
    *,
    plans: Collection[str] = (),
    machine: Machine | None = None,
    gpus: Collection[str] | None = None,
) -> Choice:
    """The target that a name means on this machine.

    "auto" is, for making plans, TensorRT where it and a GPU are, else TensorRT for RTX where its packages are, else
    none; for running, the first of these whose plans the bundle has and that runs here, else PyTorch where there is a
    GPU and the bundle holds its weights, else ONNX Runtime, else OpenVINO; for int8 OpenVINO comes first, which is
    faster there.

    Args:
        name: a target, or "auto".
        purpose: "export" or "run".
        precision: of the bundle.
        plans: those of `HELD_TARGETS` that the bundle holds plans or weights for; counts for "run".
        machine: None for this one.
        gpus: architectures that TensorRT for RTX shall build for.

    Raises:
        InputError: the name is unknown.
        EngineError: the target cannot be had here; or "auto" finds nothing that runs the bundle.
    """
    return find_targets(name, purpose, precision, plans=plans, machine=machine, gpus=gpus)[0]


def find_targets(
    name: str,
    purpose: Purpose,
    precision: str,
    *,
    plans: Collection[str] = (),
    machine: Machine | None = None,
    gpus: Collection[str] | None = None,
) -> tuple[Choice, ...]:
    """Every target that a name may mean on this machine, the preferred one first; see `find_target`.

    Raises:
        InputError: see `find_target`.
        EngineError: see `find_target`.
    """
    check_target_name(name, AUTO)
    machine = this_machine() if machine is None else machine
    if name != AUTO:
        target = cast(Target, name)
        reason = lacking(target, purpose, precision, machine, gpus=gpus)
        if reason:
            raise EngineError(f"the target {target!r} cannot be had here: {reason}")
        return (Choice(target, "as asked"),)
    tried = PLAN_TARGETS if purpose == "export" else (*HELD_TARGETS, *_CPU_ORDER.get(precision, CPU_TARGETS))
    against: dict[Target, str] = {}
    able: list[Choice] = []
    for target in tried:
        if purpose == "run" and target in HELD_TARGETS and target not in plans:
            continue
        if target == "torch" and not machine.gpus:  # on a CPU the others are as fast, and need no compiler
            continue
        reason = lacking(target, purpose, precision, machine, gpus=gpus)
        if not reason:
            able.append(Choice(target, _why(target, purpose, machine, against)))
        else:
            against[target] = reason
    if able:
        return tuple(able)
    listed = "; ".join(f"{TITLES[target]}: {reason}" for target, reason in against.items())
    if purpose == "export":
        return (Choice(None, listed),)
    raise EngineError(f"nothing here runs a bundle of precision {precision!r}: {listed}")


def _why(target: Target, purpose: Purpose, machine: Machine, against: Mapping[Target, str]) -> str:
    version = machine.packages[next(iter(_NEEDED[target]))]
    there = f"{TITLES[target]} {version} is installed" if target != "tensorrt-rtx" else f"{TITLES[target]} is installed"
    if target in ("tensorrt", "torch") or (target == "tensorrt-rtx" and purpose == "run"):
        there += f" and there is a GPU, {machine.gpus[0].name} ({machine.gpus[0].architecture})"
    elif target == "tensorrt-rtx":
        there += " and builds without a GPU"
    not_taken = "".join(f"; not {TITLES[other]}: {reason}" for other, reason in against.items())
    return there + not_taken


def _capability(architecture: str) -> tuple[int, int]:
    """Major and minor of an architecture: of "SM120" it is (12, 0)."""
    digits = architecture.removeprefix("SM")
    return int(digits[:-1]), int(digits[-1])


def _numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) where it has none."""
    parts = version.split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and all(part.isdigit() for part in parts[:2]) else (0, 0)


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def _version(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "of unknown version"
