"""OpenVINO as a target."""

from __future__ import annotations

from collections.abc import Collection

from lfdm_export.engines.target_spec import Machine, Purpose, TargetSpec

# Without one of these it has no bf16, or only an emulation that is slower than float32.
_BF16_PROCESSORS = ("avx512_bf16", "amx_bf16")
# Without one of these it adds pairs of 8-bit products in 16 bits, which saturate: see docs/precision.md.
_INT8_PROCESSORS = ("avx512_vnni", "avx_vnni", "amx_int8")


def _lacks(_purpose: Purpose, precision: str, machine: Machine, _gpus: Collection[str] | None) -> str:
    processor = set(machine.processor)
    if "sse4_1" in processor and "avx" not in processor:
        return (
            "this processor has no AVX, or ONEDNN_MAX_CPU_ISA takes it away, and OpenVINO's kernels fail or crash: use "
            "--target onnxruntime"
        )
    if precision == "bf16" and not processor & set(_BF16_PROCESSORS):
        return "this processor has no bf16 (AVX-512 BF16 or AMX): export another precision"
    if precision == "int8" and not processor & set(_INT8_PROCESSORS):
        return (
            "this processor has no VNNI, without which its 8-bit sums saturate (clips of the shipped model come to "
            "23 dB): use --target onnxruntime"
        )
    return ""


OPENVINO = TargetSpec(
    name="openvino",
    title="OpenVINO",
    extra="openvino",
    packages={"openvino": ("openvino",), "onnx": ("onnx",)},
    takes="graphs",
    load="lfdm_export.engines.openvino.engine:open_engine",
    # Tested with 2026.4.
    cpu_precisions=("fp32", "tf32", "fp16", "bf16", "int8"),
    bodies="openvino",
    lacks=_lacks,
    # ONNX Runtime convolves in float32 what an int8 graph has quantized; see docs/precision.md.
    first_in=("int8",),
    loads_together=True,
    note="needs AVX; bf16 with AVX-512 BF16 or AMX, int8 with VNNI or AMX",
)
