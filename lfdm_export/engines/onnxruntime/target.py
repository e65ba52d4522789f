"""ONNX Runtime as a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from lfdm_export.engines.target_spec import TargetSpec

Device = Literal["cpu", "cuda", "tensorrt", "tensorrt-rtx"]
#: Execution providers by device; the first is required, the next runs what it cannot. TensorRT keeps no engine
#: between loads: the cache of the provider would not notice other weights in the same graph.
PROVIDERS: Mapping[Device, tuple[str, ...]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider",),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider"),
    "tensorrt-rtx": ("NvTensorRTRTXExecutionProvider", "CUDAExecutionProvider"),
}


ONNXRUNTIME = TargetSpec(
    name="onnxruntime",
    title="ONNX Runtime",
    extra="run",
    packages={"onnxruntime": ("onnxruntime", "onnxruntime-gpu")},
    takes="graphs",
    load="lfdm_export.engines.onnxruntime.binding:open_engine",
    # Tested with 1.32, which has no bf16 convolution on a CPU.
    cpu_precisions=("fp32", "tf32", "fp16", "int8", "fp8"),
    cpu_notes={"int8": "rounded to int8, convolved in float32", "fp8": "rounded to fp8, multiplied in float32"},
    devices=tuple(PROVIDERS),
    loads_together=True,
    note="on a GPU with `onnxruntime-gpu` and `device=`: CUDA, or the execution provider of either TensorRT",
)
