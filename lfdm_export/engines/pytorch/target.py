"""PyTorch as a target."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from lfdm_export.engines.target_spec import Machine, Purpose, TargetSpec, gpu_lacks

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.engines.device_chain import DeviceChain
    from lfdm_export.engines.interface import ClipMaker, Engine


def _load(bundle: Bundle, stage: str, threads: int | None, _device: str) -> Engine:
    from lfdm_export.engines.pytorch.engine import open_engine

    return open_engine(bundle, stage, threads=threads)


def _clip_maker(bundle: Bundle, stage: str, batch: int, threads: int | None) -> ClipMaker | None:
    from lfdm_export.engines.pytorch.clips import clip_maker

    return clip_maker(bundle, stage, batch, threads=threads)


def _device_chain(bundle: Bundle, threads: int | None) -> DeviceChain[Any]:
    from lfdm_export.engines.pytorch.device import device_chain

    return device_chain(bundle, threads=threads)


def _lacks(purpose: Purpose, precision: str, machine: Machine, _gpus: Collection[str] | None) -> str:
    if purpose == "export":
        return ""
    if machine.gpus:
        return gpu_lacks(machine.gpus[0], precision)
    if precision not in PYTORCH.cpu_precisions:
        return f"PyTorch runs {precision} on a GPU, and {machine.no_gpu}: take another target, or export bf16 or fp32"
    return ""


PYTORCH = TargetSpec(
    name="torch",
    title="PyTorch",
    extra="torch",
    packages={"torch": ("torch",), "einops": ("einops",), "safetensors": ("safetensors",)},
    takes="weights",
    load=_load,
    cpu_precisions=("fp32", "tf32", "bf16"),  # on a CPU its 16-bit floats are bfloat16
    gpu_precisions=("fp32", "tf32", "fp16", "bf16"),
    lacks=_lacks,
    clip_maker=_clip_maker,
    device_chain=_device_chain,
    auto_on_cpu=False,  # on a CPU the others are as fast, and need no compiler
    note="of a bundle exported with `--target torch`; compiled where it runs; whole clips without a wait on a GPU",
)
