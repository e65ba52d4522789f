"""The kernels of `kernel.cuh` by storage type, head width and frames, and their launches."""

from __future__ import annotations

from typing import TypeVar

from lfdm_export.ops.cuda.source import SHORT_NAMES, Kernel, Launch, Storage

#: Supported channels per head, frames and storage types; no supported kernel spills registers to memory.
WIDTHS = (16, 32, 64)
MOST_FRAMES = 64
STORAGES: tuple[Storage, ...] = ("float16", "bfloat16")
#: Rows per tile.
TILE = 8

_WARPS, _LANES = 4, 32  # as in kernel.cuh

Size = TypeVar("Size")


def covers(head_width: int, frames: int) -> bool:
    """Whether a kernel for 16-bit floats supports heads of that many channels and that many frames."""
    return head_width in WIDTHS and 0 < frames <= MOST_FRAMES


def core_kernel(storage: Storage, head_width: int, frames: int) -> Kernel:
    """Core(qkv, turns, bias) into the attended values; turns and bias are float32, as `tables` makes them.

    Args:
        storage: of qkv and result, one of `STORAGES`.
        head_width: D, one of `WIDTHS`.
        frames: T, at most `MOST_FRAMES`; 8 n - 7 to 8 n frames share one kernel.
    """
    assert storage in STORAGES
    assert covers(head_width, frames)
    tiles = -(-frames // TILE)
    name = f"lfdm_temporal_core_{head_width}x{tiles}_{SHORT_NAMES[storage]}"
    definition = f"LFDM_TEMPORAL_CORE_KERNEL({name}, {storage}, {head_width}, {tiles})"
    return Kernel(
        name, "temporal_attention/kernel.cuh", definition, _WARPS * _LANES, (3, 1), 3, architecture="compute_80"
    )


def core_launch(frames: int, pixels: int, heads: int, batch: Size) -> Launch[Size]:
    """The launch of a kernel."""
    return Launch((-(-pixels * heads // _WARPS), batch, 1), (frames, pixels, heads))
