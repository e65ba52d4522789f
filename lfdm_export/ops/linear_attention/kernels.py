"""The kernels of `kernel.cuh` by storage type and sizes, and their launches."""

from __future__ import annotations

from typing import TypeVar

from lfdm_export.ops.cuda.source import SHORT_NAMES, Kernel, Launch, Storage

#: Supported channels of the map, channels per head and storage types; no supported kernel spills registers to memory.
CHANNELS = (32, 64, 128, 256)
WIDTHS = (16, 32)
STORAGES: tuple[Storage, ...] = ("float16", "bfloat16")

_WARPS, _LANES, _ROWS, _PART = 4, 32, 16, 64  # as in kernel.cuh

Size = TypeVar("Size", bound=int)


def covers(channels: int, head_width: int) -> bool:
    """Whether a kernel for 16-bit floats supports maps of that many channels and heads of that width."""
    return channels in CHANNELS and head_width in WIDTHS


def linear_kernel(storage: Storage, channels: int, head_width: int) -> Kernel:
    """LinearAttention(x, normed, query, projection, bias) into the result.

    Args:
        storage: of all tensors, one of `STORAGES`.
        channels: C, one of `CHANNELS`.
        head_width: D, one of `WIDTHS`.
    """
    assert storage in STORAGES
    assert covers(channels, head_width)
    name = f"lfdm_linear_attention_{channels}x{head_width}_{SHORT_NAMES[storage]}"
    definition = f"LFDM_LINEAR_ATTENTION_KERNEL({name}, {storage}, {channels}, {head_width})"
    header = "linear_attention/kernel.cuh"
    return Kernel(name, header, definition, _WARPS * _LANES, (5, 1), 2, architecture="compute_80")


def linear_launch(frames: int, pixels: int, channels: int, heads: int) -> Launch[int]:
    """The launch for `frames` maps of `pixels` pixels."""
    return Launch((-(-pixels // (_WARPS * _ROWS)), -(-channels // _PART), frames), (pixels, heads))
