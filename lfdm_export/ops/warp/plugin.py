"""Warp and WarpBlend as TensorRT plugins, whose kernels are part of the engine as PTX. Importing this registers them.

The engine then runs them without Python, in C++ and in Triton too. Register them through `lfdm_export.ops.plugins`.

Source: TensorRT documentation, Quickly Deployable Plugins; contract in `tensorrt.plugin` of 10.9 and newer.
"""
# TensorRT reads the annotations as types: `from __future__ import annotations` breaks this, and none may be missing.
# All functions of an operator take the same arguments.
# ruff: noqa: ARG001

import tensorrt as trt
import tensorrt.plugin as trtp

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.nvrtc import compile_ptx
from lfdm_export.ops.cuda.plugin import STORAGES, Implementation, extra_arguments, launch_parameters
from lfdm_export.ops.cuda.source import ITEM_SIZES
from lfdm_export.ops.warp.kernels import Layout, warp_kernel, warp_launch

_PACK_BYTES = 16
_LAYOUTS: dict[trt.TensorFormat, Layout] = {
    trt.TensorFormat.LINEAR: "planar",
    trt.TensorFormat.HWC: "channels_last",
    trt.TensorFormat.HWC8: "channels_last",
}


@trtp.register("lfdm::Warp")
def warp(source: trtp.TensorDesc, motion: trtp.TensorDesc) -> trtp.TensorDesc:
    """Output of `reference.warp`."""
    result = source.like()
    result.shape_expr[0] = motion.shape_expr[0]
    return result


@trtp.autotune("lfdm::Warp")
def warp_combinations(
    source: trtp.TensorDesc, motion: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]
) -> list[trtp.AutoTuneCombination]:
    """Types and layouts of source, motion and result."""
    return [
        trtp.AutoTuneCombination(f"{types}, FP32, {types}", f"{layout}, LINEAR, {layout}", [1])
        for types, layout in _combinations(source.shape[1])
    ]


@trtp.aot_impl("lfdm::Warp")
def warp_kernel_of(
    source: trtp.TensorDesc, motion: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
) -> Implementation:
    """The kernel for the chosen type and layout."""
    return _implement(source, motion, blend=False, stride=1, phase=(0, 0))


@trtp.register("lfdm::WarpBlend")
def warp_blend(
    source: trtp.TensorDesc,
    motion: trtp.TensorDesc,
    previous: trtp.TensorDesc,
    stride: int,
    phase_y: int,
    phase_x: int,
) -> trtp.TensorDesc:
    """Output of `reference.warp_blend`."""
    return previous.like()


@trtp.autotune("lfdm::WarpBlend")
def warp_blend_combinations(
    source: trtp.TensorDesc,
    motion: trtp.TensorDesc,
    previous: trtp.TensorDesc,
    outputs: tuple[trtp.TensorDesc],
) -> list[trtp.AutoTuneCombination]:
    """Types and layouts of source, motion, previous activation and result."""
    return [
        trtp.AutoTuneCombination(f"{types}, FP32, {types}, {types}", f"{layout}, LINEAR, {layout}, {layout}", [1])
        for types, layout in _combinations(source.shape[1])
    ]


@trtp.aot_impl("lfdm::WarpBlend")
def warp_blend_kernel_of(
    source: trtp.TensorDesc,
    motion: trtp.TensorDesc,
    previous: trtp.TensorDesc,
    stride: int,
    phase_y: int,
    phase_x: int,
    outputs: tuple[trtp.TensorDesc],
    tactic: int,
) -> Implementation:
    """The kernel for the chosen type and layout."""
    return _implement(source, motion, blend=True, stride=stride, phase=(phase_y, phase_x))


def _combinations(channels: int) -> list[tuple[str, str]]:
    """Supported pairs of types and layout; channels last only where packs of 16 bytes fill it without padding."""
    found = [("FP32|FP16|BF16", "LINEAR")]
    if channels % (_PACK_BYTES // ITEM_SIZES["float16"]) == 0:
        found.append(("FP16|BF16", "HWC8"))
    if channels % (_PACK_BYTES // ITEM_SIZES["float32"]) == 0:
        found.append(("FP32", "HWC"))
    return found


def _implement(
    source: trtp.TensorDesc, motion: trtp.TensorDesc, *, blend: bool, stride: int, phase: tuple[int, int]
) -> Implementation:
    storage, layout = STORAGES[source.dtype], _LAYOUTS[source.format]
    channels, height, width = tuple(source.shape)[1:]
    rows, columns = tuple(motion.shape)[2:]
    if min(channels, height, width, rows, columns) < 1:
        raise EngineError(
            f"the plugin Warp found source {tuple(source.shape)} and motion {tuple(motion.shape)}, expected that "
            "only their first axes are dynamic; export with fixed sizes"
        )
    frames = motion.shape_expr[0]
    plan = warp_launch(
        storage, layout, (channels, height, width), (rows, columns), frames, frames // source.shape_expr[0],
        stride=stride, phase=phase,
    )  # fmt: skip
    kernel = warp_kernel(storage, layout, blend=blend)
    return kernel.name, compile_ptx(kernel), launch_parameters(kernel, plan), extra_arguments(plan)
