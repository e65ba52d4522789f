"""The kernels of `kernel.cuh` by storage type and layout, and their launches."""

from __future__ import annotations

from typing import Literal, TypeVar

from lfdm_export.ops.cuda.source import ITEM_SIZES, SHORT_NAMES, Kernel, Launch, Storage

#: Layout of source, activation and result: (N, C, H, W) or (N, H, W, C) in memory. The motion is always planar.
Layout = Literal["planar", "channels_last"]

_HEADER = "warp/kernel.cuh"
# Threads per block, by layout. Of 64, 128 and 256, this is the fastest except for the largest map, channels last in
# float16 (NVIDIA H200; benchmarks/results/gpu/2026-11-27-h200-c).
_THREADS: dict[Layout, int] = {"planar": 256, "channels_last": 128}
# As in kernel.cuh.
_TILE_SIDE, _SLICE_PACKS, _PACK_BYTES = 8, 8, 16
_STRIP_PACKS, _STRIP_PACK_BYTES, _SLICE_CHANNELS = 128, 4, 32

Size = TypeVar("Size")


def warp_kernel(storage: Storage, layout: Layout, *, blend: bool) -> Kernel:
    """Warp(source, motion), or WarpBlend(source, motion, previous), into a result.

    Args:
        storage: of source, previous activation and result; the motion is float32.
        layout: of the same tensors.
        blend: take a previous activation.
    """
    name = f"lfdm_warp_{'blend_' if blend else ''}{layout}_{SHORT_NAMES[storage]}"
    threads = _THREADS[layout]
    macro = "LFDM_WARP_BLEND_KERNEL" if blend else "LFDM_WARP_KERNEL"
    definition = f"{macro}({name}, {storage}, warp_{layout}, {threads})"
    return Kernel(name, _HEADER, definition, threads, (3 if blend else 2, 1), 9)


def warp_launch(
    storage: Storage,
    layout: Layout,
    source: tuple[int, int, int],
    motion: tuple[int, int],
    frames: Size,
    frames_of_each: Size,
    *,
    stride: int = 1,
    phase: tuple[int, int] = (0, 0),
) -> Launch[Size]:
    """The launch of a kernel.

    Args:
        storage: storage type of `warp_kernel`.
        layout: layout of `warp_kernel`.
        source: (C, H, W).
        motion: (h, w).
        frames: frames of the result, all samples together.
        frames_of_each: frames per sample.
        stride: 1, or 2 for one phase of a de-interleaved activation.
        phase: first row and column.
    """
    channels, height, width = source
    rows, columns = height // stride, width // stride
    if layout == "channels_last":
        tiles = _divide_up(rows, _TILE_SIDE) * _divide_up(columns, _TILE_SIDE)
        slices = _divide_up(channels, _SLICE_PACKS * _PACK_BYTES // ITEM_SIZES[storage])
    else:
        tiles = _divide_up(rows * columns, _STRIP_PACKS * _STRIP_PACK_BYTES // ITEM_SIZES[storage])
        slices = _divide_up(channels, _SLICE_CHANNELS)
    scalars = (frames_of_each, channels, height, width, *motion, stride, *phase)
    return Launch((tiles, frames, slices), scalars)


def _divide_up(size: int, part: int) -> int:
    return -(-size // part)
