"""What the lanes of a warp do together (`lanes.cuh`), in the host build, against the layouts of the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from lfdm_export.ops.cuda.host import HostKernels, build
from lfdm_export.ops.cuda.source import Kernel, Launch, Storage
from tests.kernel_arrays import TORCH, addresses

_PROBE = """
LFDM_LANES_KERNEL({name}, 32, 1)
(const lfdm::uint32* a, const lfdm::uint32* b, const float* c, float* products, lfdm::uint32* turned, float* rows) {{
    using namespace lfdm;
    each_warp(Block<32>(), [&](int) {{
        PerLane<uint32> left[4], right[2], half[2];
        PerLane<Quad> sums[2];
        PerLane<float> largest, sum;
        each_lane([&](int lane) {{
            for (int i = 0; i < 4; ++i) left[i][lane] = a[lane * 4 + i];
            for (int i = 0; i < 2; ++i) right[i][lane] = b[lane * 2 + i];
            for (int i = 0; i < 2; ++i) half[i][lane] = left[i][lane];
            for (int i = 0; i < 8; ++i) sums[i / 4][lane].values[i % 4] = c[lane * 4 + i % 4];
            largest[lane] = sum[lane] = c[lane * 4];
        }});
        multiply_add_16<{storage}>(sums[0], left, right[0], right[1]);
        multiply_add_8<{storage}>(sums[1], half, right[0]);
        transpose(right[0]);
        largest_of_four(largest);
        sum_of_four(sum);
        each_lane([&](int lane) {{
            for (int i = 0; i < 8; ++i) products[lane * 8 + i] = sums[i / 4][lane].values[i % 4];
            turned[lane] = right[0][lane];
            rows[lane * 2] = largest[lane];
            rows[lane * 2 + 1] = sum[lane];
        }});
    }});
}}
"""
STORAGES: tuple[Storage, ...] = ("float16", "bfloat16")
LANE = np.arange(32)


def probe(storage: Storage) -> Kernel:
    name = f"probe_{storage}"
    return Kernel(name, "cuda/lanes.cuh", _PROBE.format(name=name, storage=storage), 32, (3, 3), 0)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    kernels = [probe(storage) for storage in STORAGES]
    return HostKernels(build(kernels, tmp_path_factory.mktemp("lanes") / "lanes.so"), kernels)


def bits(values: NDArray[np.float32], storage: Storage) -> NDArray[np.uint16]:
    return torch.from_numpy(values).to(TORCH[storage]).view(torch.uint16).numpy()


def small_integers(seed: int, *shape: int) -> NDArray[np.float32]:
    """Values whose products and sums are exact in every type."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


# Where element i of a lane's fragment lies. Source: PTX ISA, Matrix Fragments for mma.m16n8k16 and mma.m16n8k8, .f16.
def a_fragment(matrix: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """(16, 16) -> (32 lanes, 4 registers)."""
    i = np.arange(8)
    row = LANE[:, None] // 4 + np.where((i < 2) | ((i >= 4) & (i < 6)), 0, 8)
    column = LANE[:, None] % 4 * 2 + i % 2 + np.where(i >= 4, 8, 0)
    return np.ascontiguousarray(matrix[row, column]).view(np.uint32)


def b_fragment(matrix: NDArray[np.uint16]) -> NDArray[np.uint32]:
    """(16, 8) -> (32 lanes, 2 registers)."""
    i = np.arange(4)
    row = LANE[:, None] % 4 * 2 + i % 2 + np.where(i >= 2, 8, 0)
    return np.ascontiguousarray(matrix[row, LANE[:, None] // 4]).view(np.uint32)


def c_fragment(matrix: NDArray[np.float32]) -> NDArray[np.float32]:
    """(16, 8) -> (32 lanes, 4)."""
    i = np.arange(4)
    return np.ascontiguousarray(matrix[LANE[:, None] // 4 + i // 2 * 8, LANE[:, None] % 4 * 2 + i % 2])


@pytest.mark.parametrize("storage", STORAGES)
def test_what_lanes_do_together(host: HostKernels, storage: Storage) -> None:
    a, b, c = small_integers(1, 16, 16), small_integers(2, 16, 8), small_integers(3, 16, 8)
    inputs = [a_fragment(bits(a, storage)), b_fragment(bits(b, storage)), c_fragment(c)]
    products, turned = np.full((32, 8), np.nan, np.float32), np.zeros(32, np.uint32)
    rows = np.full((32, 2), np.nan, np.float32)
    host.run(probe(storage).name, Launch((1, 1, 1), ()), addresses(inputs), addresses([products, turned, rows]))
    np.testing.assert_array_equal(products[:, :4], c_fragment(a @ b + c))
    np.testing.assert_array_equal(products[:, 4:], c_fragment(a[:, :8] @ b[:8] + c))
    # Lane 4 i + j has of an 8x8 matrix elements (i, 2 j) and (i, 2 j + 1).
    matrix = inputs[1][:, 0].copy().view(np.uint16).reshape(8, 8)
    np.testing.assert_array_equal(turned.view(np.uint16).reshape(8, 8), matrix.T)
    fours = inputs[2][:, 0].reshape(8, 4)
    np.testing.assert_array_equal(rows[:, 0], fours.max(axis=1).repeat(4))
    np.testing.assert_array_equal(rows[:, 1], fours.sum(axis=1).repeat(4))
