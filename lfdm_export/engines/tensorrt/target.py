"""TensorRT and TensorRT for RTX as targets."""

from __future__ import annotations

from collections.abc import Collection

from lfdm_export.engines.target_spec import FIRST_CAPABILITY, Machine, Purpose, TargetSpec, gpu_lacks
from lfdm_export.errors import InputError

# Both run plans with the same functions, which get the target's name.
_LOAD = "lfdm_export.engines.tensorrt.engine:open_engine"
_DEVICE_CHAIN = "lfdm_export.engines.tensorrt.device:device_chain"
#: The oldest TensorRT that supports every strongly typed graph of a bundle.
OLDEST_TENSORRT = (10, 12)
#: Bindings and libraries of TensorRT for RTX come in two packages, which must have the same version.
RTX_BINDINGS, RTX_LIBRARIES = "tensorrt_rtx_bindings", "onnxruntime_ep_nv_tensorrt_rtx"
#: GPU architectures that TensorRT for RTX 1.7 can build for.
RTX_ARCHITECTURES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
#: Default architectures of a plan: all but Turing, which has no bf16 and no TF32.
RTX_DEFAULT = ("SM80", "SM86", "SM89", "SM120", "SM121")


def rtx_architectures(precision: str, gpus: Collection[str] | None = None) -> tuple[str, ...]:
    """The architectures of a plan of TensorRT for RTX: those requested, or all of `RTX_DEFAULT` with the precision.

    Raises:
        InputError: a requested one is unknown or lacks the precision.
    """
    for gpu in gpus or ():
        if gpu not in RTX_ARCHITECTURES:
            raise InputError(f"unknown GPU architecture {gpu!r}; expected some of {', '.join(RTX_ARCHITECTURES)}")
        if not _has(gpu, precision):
            raise InputError(f"{gpu} has no {precision}; leave it out, or choose another precision")
    wanted = gpus or RTX_DEFAULT
    return tuple(gpu for gpu in RTX_ARCHITECTURES if gpu in wanted and _has(gpu, precision))


def _tensorrt_lacks(_purpose: Purpose, precision: str, machine: Machine, _gpus: Collection[str] | None) -> str:
    version = machine.packages["tensorrt"]
    if (0, 0) < _numbers(version) < OLDEST_TENSORRT:
        oldest = ".".join(map(str, OLDEST_TENSORRT))
        return f"TensorRT {version} is older than {oldest}: pip install --upgrade tensorrt"
    if not machine.gpus:
        return _no_gpu(TENSORRT, "builds and runs only where its GPU is", machine)
    return gpu_lacks(machine.gpus[0], precision)


def _rtx_lacks(purpose: Purpose, precision: str, machine: Machine, gpus: Collection[str] | None) -> str:
    if purpose == "export":
        wanted = RTX_DEFAULT if gpus is None else gpus
        unable = [gpu for gpu in wanted if not _has(gpu, precision)]
        if unable and (gpus is not None or len(unable) == len(wanted)):
            return f"{', '.join(unable)} has no {precision}: leave it out of --gpus, or export another precision"
        return ""
    if not machine.gpus:
        return _no_gpu(TENSORRT_RTX, "runs only on a GPU", machine)
    gpu = machine.gpus[0]
    if gpu_lacks(gpu, precision) or gpu.architecture in RTX_ARCHITECTURES:
        return gpu_lacks(gpu, precision)
    known = ", ".join(RTX_ARCHITECTURES)
    return f"it knows {known}, not {gpu.name} ({gpu.architecture}): use --target tensorrt"


def _no_gpu(spec: TargetSpec, need: str, machine: Machine) -> str:
    return f"{spec.title} {need}, and {machine.no_gpu}: use a machine with one, or --target onnxruntime"


def _has(architecture: str, precision: str) -> bool:
    """Whether an architecture has matrix products in a precision; "SM120" is compute capability (12, 0)."""
    digits = architecture.removeprefix("SM")
    return (int(digits[:-1]), int(digits[-1])) >= FIRST_CAPABILITY[precision]


def _numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version; (0, 0) if it has none."""
    parts = version.split(".")
    return (int(parts[0]), int(parts[1])) if len(parts) > 1 and all(part.isdigit() for part in parts[:2]) else (0, 0)


TENSORRT = TargetSpec(
    name="tensorrt",
    title="TensorRT",
    extra="tensorrt",
    packages={"tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")},
    takes="plans",
    load=_LOAD,
    device_chain=_DEVICE_CHAIN,
    gpu_precisions=tuple(FIRST_CAPABILITY),
    bodies="tensorrt",
    lacks=_tensorrt_lacks,
    note="from NVIDIA's index; plans for the GPU that is there, with our kernels inside as ahead-of-time plugins",
)
TENSORRT_RTX = TargetSpec(
    name="tensorrt-rtx",
    title="TensorRT for RTX",
    extra="tensorrt-rtx",
    packages={
        RTX_BINDINGS: ("tensorrt-rtx-cu13-bindings",),
        RTX_LIBRARIES: ("onnxruntime-ep-nv-tensorrt-rtx-cu13",),
    },
    takes="plans",
    load=_LOAD,
    device_chain=_DEVICE_CHAIN,
    gpu_precisions=tuple(FIRST_CAPABILITY),
    bodies="tensorrt",
    builds_anywhere=True,
    lacks=_rtx_lacks,
    note="from PyPI; plans for RTX cards, built without a GPU",
)
