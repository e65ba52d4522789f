"""PyTorch as a target."""

from __future__ import annotations

from collections.abc import Collection

from lfdm_export.engines.target_spec import Machine, Purpose, TargetSpec, gpu_lacks


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
    load="lfdm_export.engines.pytorch.engine:open_engine",
    cpu_precisions=("fp32", "tf32", "bf16"),  # on a CPU its 16-bit floats are bfloat16
    gpu_precisions=("fp32", "tf32", "fp16", "bf16"),
    lacks=_lacks,
    clip_maker="lfdm_export.engines.pytorch.clips:clip_maker",
    device_chain="lfdm_export.engines.pytorch.device:device_chain",
    auto_on_cpu=False,  # on a CPU the others are as fast, and need no compiler
    note="of a bundle exported with `--target torch`; compiled where it runs; whole clips without a wait on a GPU",
)
