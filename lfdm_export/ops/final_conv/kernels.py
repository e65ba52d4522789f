"""The kernels of `kernel.cuh` by storage type and channels, and their launches."""

from __future__ import annotations

from lfdm_export.ops.cuda.source import SHORT_NAMES, Kernel, Launch, Storage

#: Supported channels of the map (the shipped and the published network's) and storage types; no supported kernel
#: spills registers to memory.
CHANNELS = (16, 64)
STORAGES: tuple[Storage, ...] = ("float16", "bfloat16")
#: Shape of a supported kernel, as `reference.lay_out_kernel` gives it, without its channels.
LAID_OUT = (7, 24)

_THREADS, _TILE, _REACH = 128, 128, 3  # as in kernel.cuh
#: Blocks that a large GPU holds at once: two per multiprocessor.
_BLOCKS = 264
#: Minimum rows of pixels per block, which reads six more.
_FEWEST_ROWS = 8


def final_kernel(storage: Storage, channels: int) -> Kernel:
    """FinalConv(four phases, kernel, bias) into float32 pictures.

    Args:
        storage: of all inputs, one of `STORAGES`.
        channels: C, one of `CHANNELS`.
    """
    assert storage in STORAGES
    assert channels in CHANNELS
    name = f"lfdm_final_conv_{channels}_{SHORT_NAMES[storage]}"
    definition = f"LFDM_FINAL_CONV_KERNEL({name}, {storage}, {channels})"
    return Kernel(name, "final_conv/kernel.cuh", definition, _THREADS, (6, 1), 3, architecture="compute_80")


def final_launch(frames: int, height: int, width: int, rows: int | None = None) -> Launch[int]:
    """The launch for `frames` pictures.

    Args:
        frames: N.
        height: rows of a picture, even.
        width: columns of a picture, even.
        rows: rows of pixels per block; None chooses them. They do not change the result.
    """
    tiles = 1 + max(0, -(-(width - _TILE) // (_TILE - 2 * _REACH)))
    rows = _rows(frames * tiles, height) if rows is None else rows
    return Launch((-(-height // rows), tiles, frames), (height, width, rows))


def _rows(columns: int, height: int) -> int:
    """Rows per block for which the GPU is done first: it runs so many rounds of blocks, each of the rows it reads."""

    def cost(strips: int) -> int:
        return -(-columns * strips // _BLOCKS) * (-(-height // strips) + 2 * _REACH)

    strips = min(range(1, max(1, height // _FEWEST_ROWS) + 1), key=cost)
    return -(-height // strips)
