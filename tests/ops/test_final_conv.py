"""The decoder's last convolution: the kernel in its host build, and the way to it, against float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.dispatch import standing_in
from lfdm_export.ops.cuda.host import THREAD_ORDERS, HostKernels, build
from lfdm_export.ops.final_conv.gpu import final_conv_on_gpu, suits
from lfdm_export.ops.final_conv.kernels import CHANNELS, STORAGES, final_kernel, final_launch
from lfdm_export.ops.final_conv.reference import final_conv_in_torch, lay_out_kernel
from lfdm_export.rewrite.convolution import PHASES
from lfdm_export.rewrite.lfae import Decode
from lfdm_export.rewrite.precision import in_precision
from lfdm_export.rewrite.stage_modules import stage_modules
from lfdm_models.model import LfdmModel
from tests.kernel_arrays import addresses, empty, random, stored
from tests.torch_calls import Calls

#: Largest error: inputs are those of the type, sums and results are float32. Measured: 4e-7.
LIMIT = 2e-6
KERNELS = tuple(final_kernel(storage, channels) for storage in STORAGES for channels in CHANNELS)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return HostKernels(build(KERNELS, tmp_path_factory.mktemp("final") / "kernels.so"), KERNELS)


@pytest.fixture
def gpu(kernels: HostKernels) -> Iterator[None]:
    with standing_in(kernels):
        yield


def phases_of(whole: Tensor) -> list[Tensor]:
    return [
        whole[:, :, row::2, column::2].contiguous(memory_format=torch.channels_last) for row, column in PHASES
    ]  # fmt: skip


def case(
    dtype: torch.dtype, frames: int, channels: int, height: int, width: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Phases, weight and bias: sums about as large as the sigmoid's range."""
    weight = random(1, 3, channels, 7, 7) / (49 * channels) ** 0.5 * 2
    return phases_of(random(2, frames, channels, height, width).to(dtype)), weight.to(dtype), random(3, 3).to(dtype)


def expected(phases: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return final_conv_in_torch([one.double() for one in phases], weight.double(), bias.double())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).abs().nan_to_num(nan=math.inf).max())


def test_reference_is_the_convolution_of_the_whole_map() -> None:
    whole, weight, bias = random(1, 2, 5, 6, 8).double(), random(2, 3, 5, 7, 7).double(), random(3, 3).double()
    wanted = torch.sigmoid(F.conv2d(whole, weight, bias, padding=3))
    assert error(final_conv_in_torch(phases_of(whole), weight, bias), wanted) < 1e-12


def test_layout_of_the_kernel() -> None:
    weight = random(1, 3, 16, 7, 7)
    laid_out = lay_out_kernel(weight)
    assert laid_out.shape == (7, 24, 16)
    assert torch.equal(laid_out[2, 3 * 5 + 1], weight[1, :, 2, 5])
    assert not laid_out[:, 21:].any()


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "frames", "channels", "height", "width"),
    [
        (torch.float16, 2, 64, 16, 16),  # the published network's channels
        (torch.float16, 1, 64, 4, 128),  # a whole tile
        (torch.float16, 3, 16, 2, 2),  # smaller than the kernel
        (torch.float16, 1, 16, 34, 30),  # no multiple of anything, several strips
        (torch.float16, 1, 16, 6, 130),  # two tiles, of which the second writes 5 pixels
        (torch.float16, 2, 64, 2, 252),  # two tiles, whole warps and a part of one
        (torch.float16, 1, 16, 20, 66),
        (torch.bfloat16, 1, 64, 6, 38),
        (torch.bfloat16, 2, 16, 10, 2),
        (torch.bfloat16, 1, 16, 18, 134),
    ],
)
def test_kernel(dtype: torch.dtype, frames: int, channels: int, height: int, width: int) -> None:
    phases, weight, bias = case(dtype, frames, channels, height, width)
    kernel = lay_out_kernel(weight)
    assert suits(phases[0], kernel)
    found = final_conv_on_gpu(phases, kernel, bias)
    assert (found.dtype, found.is_contiguous()) == (torch.float32, True)
    assert error(found, expected(phases, weight, bias)) <= LIMIT


@pytest.mark.usefixtures("gpu")
def test_sums_far_from_zero_saturate() -> None:
    phases, weight, bias = case(torch.float16, 1, 16, 8, 8)
    found = final_conv_on_gpu(phases, lay_out_kernel(weight * 500), bias)
    assert error(found, expected(phases, weight * 500, bias)) <= 1e-4
    assert found.min() == 0
    assert found.max() == 1


@pytest.mark.usefixtures("gpu")
def test_values_that_are_not_finite_stay_around_their_pixel() -> None:
    phases, weight, bias = case(torch.float16, 2, 16, 20, 20)
    before = final_conv_on_gpu(phases, lay_out_kernel(weight), bias)
    phases[3][1, 5, 4, 6] = torch.nan  # row 9, column 13
    found = final_conv_on_gpu(phases, lay_out_kernel(weight), bias)
    reached = torch.zeros(2, 1, 20, 20, dtype=torch.bool)
    reached[1, :, 6:13, 10:17] = True
    assert torch.equal(found.isnan(), reached.expand_as(found))
    assert torch.equal(found[~found.isnan()], before[~found.isnan()])


def test_neither_strips_nor_the_order_of_warps_matter(kernels: HostKernels) -> None:
    phases, weight, bias = case(torch.float16, 2, 16, 22, 70)
    given = [*(stored(one, "float16", "channels_last") for one in phases), stored(lay_out_kernel(weight), "float16")]
    results = []
    for rows, order in ((22, 0), *((7, order) for order in THREAD_ORDERS), (1, 0), (64, 2)):
        result = empty((2, 3, 22, 70), "float32")
        plan = final_launch(2, 22, 70, rows)
        kernels.run(
            final_kernel("float16", 16).name,
            plan,
            addresses([*given, stored(bias, "float16")]),
            addresses([result]),
            order,
        )
        results.append(torch.from_numpy(result))
    assert all(torch.equal(other, results[0]) for other in results)
    assert error(results[0], expected(phases, weight, bias)) <= LIMIT


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 2, 2), (40, 128, 128), (320, 128, 128), (3, 64, 256)])
def test_strips_and_tiles_cover_the_picture(frames: int, height: int, width: int) -> None:
    plan = final_launch(frames, height, width)
    strips, tiles, deep = plan.grid
    rows = plan.scalars[2]
    assert deep == frames
    assert (strips - 1) * rows < height <= strips * rows
    assert width <= 122 * (tiles - 1) + 128
    assert tiles == 1 or width > 122 * (tiles - 2) + 128


def test_published_clip_is_one_round_of_blocks() -> None:
    plan = final_launch(40, 128, 128)
    assert (plan.grid, plan.scalars) == ((6, 1, 40), (128, 128, 22))


@pytest.mark.usefixtures("gpu")
def test_phases_may_lie_otherwise() -> None:
    phases, weight, bias = case(torch.float16, 2, 16, 6, 10)
    kernel = lay_out_kernel(weight)
    wanted = final_conv_on_gpu(phases, kernel, bias)
    spread = torch.zeros(2, 17, 3, 5, dtype=torch.float16)
    spread[:, 1:] = phases[1]  # not dense, not at a multiple of 16 bytes
    others = [phases[0].contiguous(), spread[:, 1:], *phases[2:]]
    assert torch.equal(final_conv_on_gpu(others, kernel, bias.repeat_interleave(2)[::2]), wanted)


@pytest.mark.usefixtures("gpu")
def test_operator_is_what_torch_expects_of_operators() -> None:
    phases, weight, bias = case(torch.float16, 2, 16, 4, 6)
    torch.library.opcheck(
        torch.ops.lfdm.final_conv.default,
        (phases, lay_out_kernel(weight), bias),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_kernel_refuses_tensors_of_the_host() -> None:
    phases, weight, bias = case(torch.float16, 1, 16, 4, 4)
    with pytest.raises(EngineError, match="expected a GPU's"):
        final_conv_on_gpu(phases, lay_out_kernel(weight), bias)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "of_kernel", "shape", "fits"),
    [
        (torch.float16, torch.float16, (3, 64, 7, 7), True),
        (torch.bfloat16, torch.bfloat16, (3, 16, 7, 7), True),
        (torch.float16, torch.float32, (3, 64, 7, 7), False),
        (torch.float32, torch.float32, (3, 64, 7, 7), False),
        (torch.float16, torch.float16, (3, 32, 7, 7), False),
        (torch.float16, torch.float16, (3, 64, 5, 5), False),
        (torch.float16, torch.float16, (1, 64, 7, 7), False),
        (torch.float16, torch.float16, (4, 64, 7, 7), False),
    ],
)
def test_what_there_is_a_kernel_for(
    dtype: torch.dtype, of_kernel: torch.dtype, shape: tuple[int, int, int, int], fits: bool
) -> None:
    kernel = lay_out_kernel(torch.empty(shape, dtype=of_kernel))
    assert suits(torch.empty(1, shape[1], 2, 2, dtype=dtype), kernel) is fits


@pytest.fixture(scope="module")
def decode(small_model: LfdmModel) -> Decode:
    module = stage_modules(small_model, 2)["decode"]
    assert isinstance(module, Decode)
    return module


def decoded(module: Decode) -> tuple[Tensor, list[str]]:
    """The frames of a random latent, and the operators called."""
    dtype = module.final.dtype
    shapes = ((16, 32, 32), (32, 16, 16), (64, 8, 8))
    skips = [random(seed, 1, *shape).to(dtype) for seed, shape in enumerate(shapes, start=4)]
    image = random(1, 1, 3, 32, 32).sigmoid()
    with torch.inference_mode(), Calls() as calls:
        frames, _ = module(image, *skips, random(2, 1, 3, 2, 8, 8) * 0.1)
    return frames, calls.names


def test_the_decoder_takes_the_kernel(host_kernels: HostKernels, decode: Decode) -> None:
    wanted, on_host = decoded(decode)
    narrow = in_precision({"decode": decode}, torch.float16)["decode"]
    with standing_in(host_kernels):
        found, on_gpu = decoded(narrow)
        _, wide = decoded(decode)
    assert float((found - wanted).abs().max()) < 5e-3
    assert on_gpu.count("lfdm::final_conv") == 1
    assert not [name for name in on_gpu if "sigmoid" in name]
    # There is no kernel for float32, and nothing changes on a CPU.
    assert "lfdm::final_conv" not in [*wide, *on_host, *decoded(narrow)[1]]
