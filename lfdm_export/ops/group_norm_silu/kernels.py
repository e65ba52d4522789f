"""The kernels of `kernel.cuh` by storage type, and their launches."""

from __future__ import annotations

from dataclasses import dataclass

from lfdm_export.ops.cuda.source import ITEM_SIZES, SHORT_NAMES, Kernel, Launch, Storage
from lfdm_export.ops.domain import EPSILON

#: Supported pairs of types: activation, and parameters (gamma, beta, scale, shift).
STORAGES: tuple[tuple[Storage, Storage], ...] = (
    ("float32", "float32"),
    ("float16", "float16"),
    ("bfloat16", "bfloat16"),
    ("float16", "float32"),
    ("bfloat16", "float32"),
)

_HEADER = "group_norm_silu/kernel.cuh"
# As in kernel.cuh.
_THREADS, _PACK_BYTES = 512, 16
#: Bytes that neighboring threads read at once.
_LINE_BYTES = 128
#: Maximum blocks per clip of both kernels: about one and two per multiprocessor of a large GPU. More blocks of the
#: first kernel would give each block of the second more partial results to merge.
_STATISTICS_BLOCKS, _APPLY_BLOCKS = 132, 264


def statistics_kernel(storage: Storage) -> Kernel:
    """Activation (clips, rows, C) into the slabs' means and squared deviations (clips, slabs, groups, 2) float32."""
    name = f"lfdm_norm_statistics_{SHORT_NAMES[storage]}"
    definition = f"LFDM_NORM_STATISTICS_KERNEL({name}, {storage})"
    return Kernel(name, _HEADER, definition, _THREADS, (1, 1), 5)


def apply_kernel(storage: Storage, parameters: Storage) -> Kernel:
    """Activation, statistics of the slabs, gamma, beta, scale, shift and residual into the result.

    Args:
        storage: of activation, residual and result.
        parameters: storage of gamma, beta, scale and shift.
    """
    short = SHORT_NAMES[storage]
    suffix = short if storage == parameters else f"{short}_{SHORT_NAMES[parameters]}"
    name = f"lfdm_norm_silu_{suffix}"
    definition = f"LFDM_NORM_APPLY_KERNEL({name}, {storage}, {parameters}, {EPSILON}f)"
    return Kernel(name, _HEADER, definition, _THREADS, (7, 1), 9)


@dataclass(frozen=True)
class NormPlan:
    """The launches of both kernels.

    Attributes:
        clips: B.
        rows: rows per clip: T·h·w.
        channels: C.
        groups: groups that share statistics.
        slice_groups: groups per block.
        slab_rows: rows per block of the statistics kernel.
        apply_rows: rows per block of the other kernel.
    """

    clips: int
    rows: int
    channels: int
    groups: int
    slice_groups: int
    slab_rows: int
    apply_rows: int

    @staticmethod
    def of(storage: Storage, clips: int, rows: int, channels: int, groups: int) -> NormPlan:
        """The plan for an activation (clips, rows, channels); only the grid depends on the clips."""
        each, size = channels // groups, ITEM_SIZES[storage]
        pack = _PACK_BYTES // size
        group_packs = each // pack if each % pack == 0 else each
        divisors = [n for n in range(1, groups + 1) if groups % n == 0 and (n == 1 or n * group_packs <= _THREADS)]
        slice_groups = next((n for n in divisors if n * each * size >= _LINE_BYTES), divisors[-1])
        slices = groups // slice_groups
        rows_at_once = max(1, _THREADS // (slice_groups * group_packs))

        def share(blocks: int) -> int:
            return max(rows_at_once, -(-rows * slices // blocks))

        return NormPlan(
            clips, rows, channels, groups, slice_groups, share(_STATISTICS_BLOCKS), share(_APPLY_BLOCKS)
        )  # fmt: skip

    @property
    def slabs(self) -> int:
        """Partial results per group."""
        return -(-self.rows // self.slab_rows)

    def statistics(self) -> Launch[int]:
        """The launch of `statistics_kernel`."""
        grid = (self.slabs, self.groups // self.slice_groups, self.clips)
        return Launch(grid, (self.rows, self.channels, self.groups, self.slice_groups, self.slab_rows))

    def apply(self, *, row_stride: int, modulated: bool, added: bool) -> Launch[int]:
        """The launch of `apply_kernel`.

        Args:
            row_stride: elements from one clip's scale and shift to the next one's.
            modulated: apply scale and shift; otherwise they are not read.
            added: add the residual; otherwise it is not read.
        """
        shares = -(-self.rows // self.apply_rows)
        sizes = (self.rows, self.channels, self.groups, self.slice_groups, self.slab_rows)
        scalars = (*sizes, row_stride, int(modulated), int(added), self.apply_rows)
        return Launch((shares, self.groups // self.slice_groups, self.clips), scalars)
