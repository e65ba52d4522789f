"""Temporal attention's core: the kernel in its host build, and the way to it, against attention in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.dispatch import standing_in
from lfdm_export.ops.cuda.host import THREAD_ORDERS, HostKernels
from lfdm_export.ops.temporal_attention.gpu import core_on_gpu, suits_core
from lfdm_export.ops.temporal_attention.kernels import core_kernel, core_launch
from lfdm_export.ops.temporal_attention.reference import (
    FrameWeights,
    TemporalWeights,
    core_in_torch,
    rotate,
    temporal_attention,
    temporal_attention_by_frame,
)
from lfdm_export.ops.temporal_attention.tables import lay_out_bias, lay_out_turns
from tests.kernel_arrays import addresses, empty, random, stored, values_of
from tests.torch_calls import Calls

#: Largest errors relative to the largest value, against float64 on rotated queries and keys of the storage type:
#: rounding of weights and of the result. Measured: 5e-4 and 4e-3.
LIMITS = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture
def gpu(host_kernels: HostKernels) -> Iterator[None]:
    with standing_in(host_kernels):
        yield


def tables(frames: int, rotary_width: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    angles = random(1, frames, rotary_width // 2) * 3
    return angles.cos(), angles.sin(), random(2, heads, frames, frames)


def expected_core(qkv: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, heads: int) -> Tensor:
    """In float64, but for queries and keys, which are rounded where the kernel rounds them."""
    q, k, v = (part.double().unflatten(-1, (heads, -1)).permute(0, 2, 3, 1, 4) for part in qkv.chunk(3, dim=-1))
    q, k = (rotate(x, cos.double(), sin.double()).to(qkv.dtype).double() for x in (q, k))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias.double()).softmax(dim=-1)
    return (weights @ v).permute(0, 3, 1, 2, 4).flatten(3)


def by_kernel(qkv: Tensor, cos: Tensor, sin: Tensor, bias: Tensor, heads: int) -> Tensor:
    assert suits_core(qkv, heads)
    width = qkv.shape[-1] // (3 * heads)
    return core_on_gpu(qkv, lay_out_turns(cos, sin, width), lay_out_bias(bias), heads=heads)


def error(found: Tensor, expected: Tensor) -> float:
    difference = (found.double() - expected).abs().nan_to_num(nan=math.inf)
    return float(difference.max() / expected.abs().max())


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "head_width", "frames", "batch", "pixels", "heads", "rotary_width"),
    [
        (torch.float16, 32, 40, 2, 3, 8, 32),  # the published network's
        (torch.float16, 32, 39, 1, 1, 8, 32),
        (torch.float16, 32, 64, 1, 2, 3, 20),  # warps that have nothing to do; some channels pass
        (torch.float16, 32, 57, 1, 1, 1, 32),
        (torch.float16, 32, 16, 2, 5, 2, 32),
        (torch.float16, 32, 9, 1, 3, 1, 2),
        (torch.float16, 16, 8, 1, 2, 2, 16),
        (torch.float16, 16, 1, 3, 2, 2, 16),
        (torch.float16, 16, 5, 1, 7, 4, 10),
        (torch.float16, 64, 37, 1, 2, 2, 64),
        (torch.bfloat16, 32, 40, 1, 3, 8, 32),
        (torch.bfloat16, 16, 4, 2, 4, 4, 16),
    ],
)
def test_core(
    dtype: torch.dtype, head_width: int, frames: int, batch: int, pixels: int, heads: int, rotary_width: int
) -> None:
    qkv = random(3, batch, frames, pixels, 3 * heads * head_width).to(dtype)
    constants = tables(frames, rotary_width, heads)
    found = by_kernel(qkv, *constants, heads)
    assert found.dtype == dtype
    assert error(found, expected_core(qkv, *constants, heads)) <= LIMITS[dtype]
    wide = core_in_torch(qkv.double(), *(c.double() for c in constants), heads=heads)
    assert error(found, wide) <= 3 * LIMITS[dtype]  # queries and keys are rounded too


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", LIMITS)
def test_large_logits(dtype: torch.dtype) -> None:
    # Up to 3000: powers of them overflow unless the largest of a row is subtracted. Quarter turns are exact.
    frames, heads = 40, 8
    qkv = (random(3, 1, frames, 2, 3 * heads * 32) * 12).to(dtype)
    turns = torch.from_numpy(np.random.default_rng(4).integers(0, 4, (frames, 16)))
    cos, sin = torch.tensor([1.0, 0, -1, 0])[turns], torch.tensor([0.0, 1, 0, -1])[turns]
    bias = random(5, heads, frames, frames) * 100
    found = by_kernel(qkv, cos, sin, bias, heads)
    assert error(found, expected_core(qkv, cos, sin, bias, heads)) <= LIMITS[dtype]


def test_order_of_warps_does_not_matter(host_kernels: HostKernels) -> None:
    frames, pixels, heads = 40, 3, 3
    kernel = core_kernel("float16", 32, frames)
    cos, sin, bias = tables(frames, 32, heads)
    inputs = [
        stored(random(3, 1, frames, pixels, 3 * heads * 32), "float16"),
        stored(lay_out_turns(cos, sin, 32), "float32"),
        stored(lay_out_bias(bias), "float32"),
    ]
    results = []
    for order in THREAD_ORDERS:
        result = empty((1, frames, pixels, heads * 32), "float16")
        launch = core_launch(frames, pixels, heads, 1)
        host_kernels.run(kernel.name, launch, addresses(inputs), addresses([result]), order)
        results.append(values_of(result, "float16"))
    assert all(torch.equal(other, results[0]) for other in results)
    assert results[0].isfinite().all()


@pytest.mark.usefixtures("gpu")
def test_operator_is_what_torch_expects_of_operators() -> None:
    cos, sin, bias = tables(5, 16, 4)
    arguments = (random(3, 2, 5, 3, 192).half(), lay_out_turns(cos, sin, 16), lay_out_bias(bias), 4)
    torch.library.opcheck(
        torch.ops.lfdm.temporal_core.default, arguments, test_utils=("test_schema", "test_faketensor")
    )


@pytest.mark.usefixtures("gpu")
def test_a_part_of_a_tensor_is_taken_too() -> None:
    constants = tables(5, 16, 4)
    whole = random(3, 1, 5, 4, 200).half()
    part = whole[:, :, 1:, 4:196]  # not dense, not at a multiple of 16 bytes
    found = by_kernel(part, *constants, 4)
    torch.testing.assert_close(found, by_kernel(part.clone(), *constants, 4), rtol=0, atol=0)


def test_kernel_refuses_tensors_of_the_host() -> None:
    with pytest.raises(EngineError, match="expected a GPU's"):
        core_on_gpu(torch.zeros(1, 5, 2, 96).half(), torch.zeros(1), torch.zeros(1), heads=2)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "frames", "head_width", "suits"),
    [
        (torch.float16, 64, 32, True),
        (torch.bfloat16, 1, 64, True),
        (torch.float16, 65, 32, False),
        (torch.float16, 40, 24, False),
        (torch.float32, 40, 32, False),
        (torch.float64, 40, 32, False),
    ],
)
def test_what_there_is_a_kernel_for(dtype: torch.dtype, frames: int, head_width: int, suits: bool) -> None:
    assert suits_core(torch.empty(1, frames, 2, 3 * 2 * head_width, dtype=dtype), 2) is suits


# -- the whole operator


def weights_for(channels: int, head_width: int, frames: int, heads: int) -> TemporalWeights:
    cos, sin, bias = tables(frames, head_width, heads)
    query, key, value, out = (random(10 + i, channels, heads * head_width) / channels**0.5 for i in range(4))
    return TemporalWeights(
        random(5, channels), query, key, value, out.t().contiguous(), cos, sin, bias[None], torch.arange(frames)[None]
    )


def by_frame_of(weights: TemporalWeights, head_width: int) -> FrameWeights:
    turns = lay_out_turns(weights.cos, weights.sin, head_width) if head_width % 16 == 0 else torch.empty(0)
    return FrameWeights(
        torch.cat([weights.query, weights.key, weights.value], dim=1), turns, lay_out_bias(weights.bias[0])
    )


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "head_width", "frames", "limit"),
    [(torch.float32, 16, 5, 1e-5), (torch.float16, 16, 5, 4e-3), (torch.float16, 24, 5, 4e-3)],
    ids=["float32", "float16", "width without a kernel"],
)
def test_by_frame(dtype: torch.dtype, head_width: int, frames: int, limit: float) -> None:
    heads, pixels, channels = 4, 6, 24
    weights = weights_for(channels, head_width, frames, heads)
    x = random(6, 2, frames, pixels, channels)
    expected = temporal_attention(x.transpose(1, 2).flatten(0, 1), weights, heads=heads, pixels=pixels)
    by_frame = by_frame_of(weights, head_width)
    narrow = TemporalWeights(*(w.to(dtype) if w.is_floating_point() else w for w in weights))
    by_frame = by_frame._replace(qkv=by_frame.qkv.to(dtype))
    found = temporal_attention_by_frame(x.to(dtype), narrow, by_frame, heads=heads)
    assert error(found, expected.view(2, pixels, frames, channels).transpose(1, 2).double()) <= limit


@pytest.mark.usefixtures("gpu")
def test_nothing_is_moved_beside_the_kernel() -> None:
    weights = weights_for(24, 16, 5, 4)
    by_frame = by_frame_of(weights, 16)
    narrow = TemporalWeights(*(w.half() if w.is_floating_point() else w for w in weights))
    by_frame, x = by_frame._replace(qkv=by_frame.qkv.half()), random(6, 1, 5, 6, 24).half()
    with Calls() as calls:
        temporal_attention_by_frame(x, narrow, by_frame, heads=4)
    assert calls.names == [
        "aten::native_layer_norm", "aten::mm", "lfdm::temporal_core", "aten::mm", "aten::add.Tensor"
    ]  # fmt: skip
