"""The kernels of GroupNormSilu, in their host build, against float64, and as an operator of torch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lfdm_export.ops.cuda.dispatch import standing_in
from lfdm_export.ops.cuda.host import THREAD_ORDERS, HostKernels
from lfdm_export.ops.cuda.source import Storage
from lfdm_export.ops.group_norm_silu.kernels import STORAGES, NormPlan, apply_kernel, statistics_kernel
from lfdm_export.ops.group_norm_silu.reference import group_norm_silu
from tests.kernel_arrays import TORCH, addresses, empty, stored, values_of

#: Half of the distance between neighboring values at 1, and what float32 arithmetic costs beside it.
LIMITS: dict[Storage, float] = {"float32": 4e-6, "float16": 2.0**-11 + 4e-6, "bfloat16": 2.0**-8 + 4e-6}
#: Clips, frames, channels, height, width, groups.
SHAPES = [
    (1, 40, 64, 8, 8, 8),  # a slice is all groups
    (2, 5, 128, 4, 6, 8),
    (2, 3, 512, 4, 4, 8),  # a slice is one group
    (1, 2, 16, 5, 7, 8),  # channels of a group: two
    (3, 2, 12, 3, 3, 4),  # three, read one by one
    (1, 3, 21, 5, 3, 7),
    (1, 1, 2080, 2, 1, 1),  # more packs than threads
    (1, 1, 650, 3, 2, 13),  # no divisor of the groups makes a line within the threads
    (1, 1, 8, 1, 2, 8),  # a group of two values
]


@pytest.fixture
def gpu(host_kernels: HostKernels) -> Iterator[None]:
    """Operators take the GPU's way."""
    with standing_in(host_kernels):
        yield


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def run(
    host: HostKernels,
    storages: tuple[Storage, Storage],
    x: Tensor,
    parameters: list[Tensor],
    residual: Tensor | None = None,
    *,
    frames: int,
    groups: int,
    order: int = 0,
) -> Tensor:
    """Both kernels' result as float64; parameters are gamma, beta and, or not, scale and shift."""
    storage, narrow = storages
    count, channels, height, width = x.shape
    plan = NormPlan.of(storage, count // frames, frames * height * width, channels, groups)
    activation = stored(x, storage, "channels_last")
    partials = empty((plan.clips, plan.slabs, groups, 2), "float32")
    host.run(statistics_kernel(storage).name, plan.statistics(), addresses([activation]), addresses([partials]), order)
    gamma, beta, *modulation = (stored(parameter, narrow) for parameter in parameters)
    launch = plan.apply(row_stride=channels, modulated=bool(modulation), added=residual is not None)
    inputs = [activation, partials, gamma, beta, *(modulation or [gamma, gamma])]
    inputs.append(activation if residual is None else stored(residual, storage, "channels_last"))
    result = empty(tuple(x.shape), storage, "channels_last")
    host.run(apply_kernel(*storages).name, launch, addresses(inputs), addresses([result]), order)
    return values_of(result, storage, "channels_last")


def arguments(shape: tuple[int, ...], *, modulated: bool, offset: float = 1.0) -> tuple[Tensor, list[Tensor], Tensor]:
    clips, frames, channels, height, width, _ = shape
    x = offset + 2 * random(1, clips * frames, channels, height, width)
    rows = [random(4, clips, channels), random(5, clips, channels)] if modulated else []
    return x, [random(2, channels), random(3, channels), *rows], random(6, *x.shape)


def close(found: Tensor, expected: Tensor, storage: Storage, rounded: Tensor) -> None:
    """Within the rounding of the result, and of float32 sums of values as large as `rounded`."""
    limit = expected.abs() * LIMITS[storage] + rounded.abs().max() * 4e-6
    assert ((found - expected).abs() <= limit).all()


@pytest.mark.parametrize("storages", STORAGES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("modulated", [False, True])
@pytest.mark.parametrize("added", [False, True])
def test_kernels_give_what_float64_gives(
    host_kernels: HostKernels, storages: tuple[Storage, Storage], shape: tuple[int, ...], modulated: bool, added: bool
) -> None:
    storage, narrow = storages
    frames, groups = shape[1], shape[-1]
    x, parameters, residual = arguments(shape, modulated=modulated)
    x, residual = (t.to(TORCH[storage]).double() for t in (x, residual))
    gamma, beta, *rows = (p.to(TORCH[narrow]).double() for p in parameters)
    modulation = (rows[0], rows[1]) if rows else None
    expected = group_norm_silu(x, gamma, beta, modulation, residual if added else None, frames=frames, groups=groups)
    found = run(
        host_kernels, storages, x, [gamma, beta, *rows], residual if added else None, frames=frames, groups=groups
    )
    close(found, expected, storage, expected)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_large_mean_does_not_drown_the_variance(host_kernels: HostKernels, offset: float) -> None:
    # A mean of squares less a squared mean would have no digit left: (150 σ)² · 2^-24 of 1.
    shape = (1, 8, 64, 8, 8, 8)
    x, parameters, _ = arguments(shape, modulated=False, offset=offset)
    x = x.float().double()
    gamma, beta = parameters
    expected = group_norm_silu(x, gamma, beta, frames=8, groups=8)
    found = run(host_kernels, ("float32", "float32"), x, parameters, frames=8, groups=8)
    assert (found - expected).abs().max() <= (1e-5 if offset else 2e-6) * expected.abs().max()


@pytest.mark.parametrize("shape", SHAPES)
def test_order_of_threads_does_not_matter(host_kernels: HostKernels, shape: tuple[int, ...]) -> None:
    x, parameters, residual = arguments(shape, modulated=True)
    first, *others = (
        run(
            host_kernels,
            ("float32", "float32"),
            x,
            parameters,
            residual,
            frames=shape[1],
            groups=shape[-1],
            order=order,
        )
        for order in THREAD_ORDERS
    )
    for other in others:
        assert torch.equal(first, other)


def test_a_clip_is_the_same_alone_and_among_others(host_kernels: HostKernels) -> None:
    shape = (3, 4, 64, 6, 6, 8)
    x, (gamma, beta, scale, shift), residual = arguments(shape, modulated=True)
    together = run(host_kernels, ("float32", "float32"), x, [gamma, beta, scale, shift], residual, frames=4, groups=8)
    for clip in range(3):
        part = slice(4 * clip, 4 * clip + 4)
        rows = [gamma, beta, scale[clip : clip + 1], shift[clip : clip + 1]]
        alone = run(host_kernels, ("float32", "float32"), x[part], rows, residual[part], frames=4, groups=8)
        assert torch.equal(alone, together[part])


def test_equal_values_have_no_deviation(host_kernels: HostKernels) -> None:
    x = torch.full((4, 64, 4, 4), 1000.1, dtype=torch.float64)
    beta = random(1, 64)
    found = run(host_kernels, ("float32", "float32"), x, [random(2, 64), beta], frames=4, groups=8)
    expected = torch.nn.functional.silu(beta)[None, :, None, None].expand_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("wild", [torch.nan, torch.inf])
def test_what_is_no_number_stays_in_its_clip_and_group(host_kernels: HostKernels, wild: float) -> None:
    x, parameters, _ = arguments((2, 3, 64, 4, 4, 8), modulated=False)
    x[4, 9, 1, 2] = wild  # second clip, second group
    found = run(host_kernels, ("float32", "float32"), x, parameters, frames=3, groups=8)
    assert found[3:, 8:16].isnan().all()
    found[3:, 8:16] = 0
    assert found.isfinite().all()


def test_large_gates_do_not_overflow(host_kernels: HostKernels) -> None:
    x, (gamma, beta), _ = arguments((1, 2, 64, 4, 4, 8), modulated=False)
    found = run(host_kernels, ("float32", "float32"), x, [gamma * 1e4, beta], frames=2, groups=8)
    expected = group_norm_silu(x, gamma * 1e4, beta, frames=2, groups=8)
    assert found.isfinite().all()
    close(found, expected, "float32", expected)


@pytest.mark.parametrize("channels", [64, 128, 256, 512])
def test_published_maps_fill_a_gpu(channels: int) -> None:
    rows = 40 * (32 * 64 // channels) ** 2
    plan = NormPlan.of("float16", 1, rows, channels, 8)
    assert plan.slice_groups * channels // 8 * 2 == 128  # a line
    for launch in (plan.statistics(), plan.apply(row_stride=0, modulated=False, added=False)):
        blocks = launch.grid[0] * launch.grid[1]
        assert 80 <= blocks <= 272


# -- the operator


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", TORCH.values())
@pytest.mark.parametrize("batch", [1, 2])
def test_parts_of_one_product_are_taken_where_they_lie(dtype: torch.dtype, batch: int) -> None:
    x = (1 + random(1, 3 * batch, 16, 4, 4)).to(dtype).to(memory_format=torch.channels_last)
    gamma, beta = random(2, 16).to(dtype), random(3, 16).to(dtype)
    residual = random(5, *x.shape).to(dtype)  # lies otherwise
    product = random(4, batch, 200).to(dtype)
    wide = [t.double() for t in (x, gamma, beta, residual)]
    for first in (0, 16, 3):  # also where no part lies at a multiple of 16 bytes
        rows = product[:, first : first + 16], product[:, first + 80 : first + 96]
        found = group_norm_silu(x, gamma, beta, rows, residual, frames=3, groups=4)
        expected = group_norm_silu(
            wide[0], wide[1], wide[2], (rows[0].double(), rows[1].double()), wide[3], frames=3, groups=4
        )
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=torch.channels_last)
        error = (found.double() - expected).abs().max() / expected.abs().max()
        assert error <= torch.finfo(dtype).eps + 2e-6


@pytest.mark.usefixtures("gpu")
def test_parameters_may_be_wider_than_the_activation() -> None:
    x = random(1, 4, 16, 4, 4).half().to(memory_format=torch.channels_last)
    gamma, beta = random(2, 16).float(), random(3, 16).float()
    rows = random(4, 2, 16).half(), random(5, 2, 16).half()
    found = group_norm_silu(x, gamma, beta, rows, frames=2, groups=4)
    wide = rows[0].double(), rows[1].double()
    expected = group_norm_silu(x.double(), gamma.double(), beta.double(), wide, frames=2, groups=4)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("gpu")
def test_the_operator_is_what_torch_expects_of_one() -> None:
    x = random(1, 4, 16, 4, 4).float().to(memory_format=torch.channels_last)
    gamma, beta, rows = random(2, 16).float(), random(3, 16).float(), random(4, 2, 16).float()
    for rest in ((None, None, None), (rows, rows, None), (rows, rows, x), (None, None, x.contiguous())):
        torch.library.opcheck(
            torch.ops.lfdm.group_norm_silu.default,
            (x, gamma, beta, *rest, 2, 4),
            test_utils=("test_schema", "test_faketensor"),
        )
