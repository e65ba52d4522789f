"""Linear attention's second half: the kernel in its host build, and the way to it, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.dispatch import standing_in
from lfdm_export.ops.cuda.host import THREAD_ORDERS, HostKernels, build
from lfdm_export.ops.linear_attention.gpu import attend_on_gpu, suits
from lfdm_export.ops.linear_attention.kernels import linear_kernel, linear_launch
from lfdm_export.ops.linear_attention.reference import head_weights
from lfdm_export.rewrite.attention import FoldedLinearAttention
from lfdm_models.attention import PreNorm, Residual, SpatialLinearAttention
from tests.kernel_arrays import addresses, empty, random, stored, values_of
from tests.torch_calls import Calls

#: Largest errors of what is added to x, relative to its largest value: rounding of weights and of the result. Measured:
#: 1.0e-3 and 7.8e-3.
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
KERNELS = (
    *(linear_kernel("float16", channels, 32) for channels in (32, 64, 128, 256)),
    linear_kernel("float16", 64, 16),
    linear_kernel("float16", 32, 16),
    linear_kernel("bfloat16", 64, 32),
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(build(KERNELS, tmp_path_factory.mktemp("linear") / "kernels.so"), KERNELS)


@pytest.fixture
def gpu(kernels: HostKernels) -> Iterator[None]:
    with standing_in(kernels):
        yield


def case(
    dtype: torch.dtype, frames: int, pixels: int, channels: int, heads: int, head_width: int, scale: float = 1.0
) -> tuple[Tensor, ...]:
    """x, normed, query, projection and bias; `scale` times the usual queries."""
    width = heads * head_width
    shapes = ((frames, pixels, channels), (frames, pixels, channels), (channels, width), (frames, width, channels))
    x, normed, query, projection = (random(seed, *shape) for seed, shape in enumerate(shapes))
    query, projection = query * scale / channels**0.5, projection / heads
    return tuple(one.to(dtype) for one in (x, normed, query, projection, random(9, channels) * 0.1))


def expected(given: tuple[Tensor, ...], heads: int) -> Tensor:
    x, normed, query, projection, bias = (one.double() for one in given)
    return x + head_weights(normed, query, heads=heads) @ projection + bias


def error(found: Tensor, wanted: Tensor, x: Tensor) -> float:
    difference = (found.double() - wanted).abs().nan_to_num(nan=math.inf)
    return float(difference.max() / (wanted - x.double()).abs().max().clamp(min=1.0))


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "frames", "pixels", "channels", "heads", "head_width"),
    [
        (torch.float16, 2, 64, 64, 8, 32),  # the published network's
        (torch.float16, 1, 16, 128, 8, 32),
        (torch.float16, 2, 20, 256, 8, 32),
        (torch.float16, 3, 1, 64, 8, 32),  # fewer pixels than rows, and not a multiple
        (torch.float16, 1, 65, 64, 2, 32),
        (torch.float16, 2, 39, 32, 1, 32),
        (torch.float16, 1, 33, 64, 3, 16),
        (torch.float16, 2, 7, 32, 4, 16),
        (torch.bfloat16, 2, 81, 64, 8, 32),
    ],
)
def test_kernel(dtype: torch.dtype, frames: int, pixels: int, channels: int, heads: int, head_width: int) -> None:
    given = case(dtype, frames, pixels, channels, heads, head_width)
    assert suits(given[0], given[2], heads)
    found = attend_on_gpu(*given, heads=heads)
    assert found.dtype == dtype
    assert error(found, expected(given, heads), given[0]) <= LIMITS[dtype]


@pytest.mark.usefixtures("gpu")
def test_large_queries() -> None:
    # Powers of them overflow unless the largest of a head is subtracted.
    given = case(torch.float16, 1, 20, 64, 2, 32, scale=300.0)
    assert error(attend_on_gpu(*given, heads=2), expected(given, 2), given[0]) <= LIMITS[torch.float16]


@pytest.mark.usefixtures("gpu")
def test_values_that_are_not_finite_stay_in_their_pixel() -> None:
    given = case(torch.float16, 2, 40, 64, 2, 32)
    before = attend_on_gpu(*given, heads=2)
    given[1][1, 17, 5] = torch.nan
    found = attend_on_gpu(*given, heads=2)
    assert found[1, 17].isnan().all()
    same = torch.ones(2, 40, dtype=torch.bool)
    same[1, 17] = False
    assert torch.equal(found[same], before[same])


def test_order_of_warps_does_not_matter(kernels: HostKernels) -> None:
    given = [stored(one, "float16") for one in case(torch.float16, 2, 70, 64, 2, 32)]
    results = []
    for order in THREAD_ORDERS:
        result = empty((2, 70, 64), "float16")
        kernel = linear_kernel("float16", 64, 32)
        kernels.run(kernel.name, linear_launch(2, 70, 64, 2), addresses(given), addresses([result]), order)
        results.append(values_of(result, "float16"))
    assert all(torch.equal(other, results[0]) for other in results)
    assert results[0].isfinite().all()


@pytest.mark.usefixtures("gpu")
def test_a_part_of_a_tensor_is_taken_too() -> None:
    _, normed, query, projection, bias = case(torch.float16, 2, 20, 64, 2, 32)
    wide = random(7, 2, 20, 72).half()
    part = wide[:, :, 4:68]  # not dense, not at a multiple of 16 bytes
    found = attend_on_gpu(part, normed, query, projection, bias, heads=2)
    assert torch.equal(found, attend_on_gpu(part.clone(), normed, query, projection, bias, heads=2))


@pytest.mark.usefixtures("gpu")
def test_operator_is_what_torch_expects_of_operators() -> None:
    torch.library.opcheck(
        torch.ops.lfdm.linear_attention.default,
        (*case(torch.float16, 1, 5, 32, 2, 16), 2),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_kernel_refuses_tensors_of_the_host() -> None:
    with pytest.raises(EngineError, match="expected a GPU's"):
        attend_on_gpu(*case(torch.float16, 1, 5, 32, 2, 16), heads=2)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "of_query", "channels", "head_width", "fits"),
    [
        (torch.float16, torch.float16, 64, 32, True),
        (torch.bfloat16, torch.bfloat16, 256, 16, True),
        (torch.float16, torch.float32, 64, 32, False),
        (torch.float32, torch.float32, 64, 32, False),
        (torch.float16, torch.float16, 512, 32, False),
        (torch.float16, torch.float16, 48, 32, False),
        (torch.float16, torch.float16, 64, 64, False),
    ],
)
def test_what_there_is_a_kernel_for(
    dtype: torch.dtype, of_query: torch.dtype, channels: int, head_width: int, fits: bool
) -> None:
    query = torch.empty(channels, 2 * head_width, dtype=of_query)
    assert suits(torch.empty(1, 4, channels, dtype=dtype), query, 2) is fits


def test_the_block_takes_the_kernel(kernels: HostKernels) -> None:
    block = Residual(PreNorm(64, SpatialLinearAttention(64, 2, 32)))
    folded, x = FoldedLinearAttention(block), random(1, 3, 20, 64)
    narrow = FoldedLinearAttention(block).half()
    with torch.inference_mode():
        wanted = folded(x)
        with standing_in(kernels), Calls() as calls:
            found = narrow(x.half())
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 3e-3
    assert calls.names.count("lfdm::linear_attention") == 1
    assert not [name for name in calls.names if "softmax" in name or name == "aten::add.Tensor"]


def test_on_the_host_nothing_changes() -> None:
    block = Residual(PreNorm(64, SpatialLinearAttention(64, 2, 32)))
    with torch.inference_mode(), Calls() as calls:
        FoldedLinearAttention(block).half()(random(1, 3, 20, 64).half())
    assert "lfdm::linear_attention" not in calls.names
