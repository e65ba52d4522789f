"""ONNX Runtime as a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal, cast

from lfdm_export.engines.target_spec import TargetSpec

if TYPE_CHECKING:
    from lfdm_export.bundle.reader import Bundle
    from lfdm_export.engines.interface import Engine

Device = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
#: Execution providers by device; the first is required, the next runs what it cannot. TensorRT keeps no engine
#: between loads: the cache of the provider would not notice other weights in the same graph.
PROVIDERS: Mapping[Device, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    "tensorrt-rtx": ("NvTensorRTRTXExecutionProvider", "CUDAExecutionProvider"),
}


def _load(bundle: Bundle, stage: str, threads: int | None, device: str) -> Engine:
    from lfdm_export.engines.device_batch import STATE
    from lfdm_export.engines.onnxruntime.binding import BoundOnnxRuntimeEngine
    from lfdm_export.engines.onnxruntime.engine import OnnxRuntimeEngine

    path, spec = bundle.stage_path(stage), bundle.stages[stage]
    # On a CPU it is better to stop a chain with non-finite values at once than to keep its state in place.
    on_gpu = device != "cpu" and set(STATE) <= {tensor.name for tensor in spec.outputs}
    kind = BoundOnnxRuntimeEngine if on_gpu else OnnxRuntimeEngine
    tf32 = bundle.manifest.precision == "tf32"
    return kind(path, spec, threads=threads, device=cast(Device, device), tf32=tf32)


ONNXRUNTIME = TargetSpec(
    name="onnxruntime",
    title="ONNX Runtime",
    extra="run",
    packages={"onnxruntime": ("onnxruntime", "onnxruntime-gpu")},
    takes="graphs",
    load=_load,
    # Tested with 1.32, which has no bf16 convolution on a CPU.
    cpu_precisions=("fp32", "tf32", "fp16", "int8", "fp8"),
    cpu_notes={"int8": "rounded to int8, convolved in float32", "fp8": "rounded to fp8, multiplied in float32"},
    devices=tuple(PROVIDERS),
    loads_together=True,
    note="on a GPU with `onnxruntime-gpu` and `device=`: CUDA, or the execution provider of either TensorRT",
)
