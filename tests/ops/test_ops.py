"""Custom operators: the ONNX functions under ONNX Runtime against the torch references."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from lfdm_export.ops.domain import DOMAIN, OPSET, VERSION
from lfdm_export.ops.group_norm_silu.onnx_function import group_norm_silu_function
from lfdm_export.ops.group_norm_silu.reference import group_norm_silu
from lfdm_export.ops.small_conv.onnx_function import small_conv_function
from lfdm_export.ops.small_conv.reference import small_conv, suits_small_conv, transforms
from lfdm_export.ops.spatial_attention.onnx_function import spatial_attention_function
from lfdm_export.ops.spatial_attention.reference import SpatialWeights, spatial_attention
from lfdm_export.ops.temporal_attention import operator_name
from lfdm_export.ops.temporal_attention.onnx_function import temporal_attention_function
from lfdm_export.ops.temporal_attention.reference import TemporalWeights, temporal_attention
from lfdm_export.ops.thresholded_step.onnx_function import thresholded_step_function
from lfdm_export.ops.thresholded_step.reference import thresholded_step
from lfdm_export.ops.warp.onnx_function import warp_function
from lfdm_export.ops.warp.reference import warp, warp_blend
from lfdm_export.sampling import rows
from lfdm_export.sampling.loop import apply_step, quantile_rank
from tests.closeness import assert_same_floats

Array = NDArray[np.generic]


def run_node(
    op_type: str,
    functions: Sequence[onnx.FunctionProto],
    feeds: Mapping[str, Array],
    outputs: dict[str, int],
    **attributes: int | float | str | list[int],
) -> list[NDArray[np.float32]]:
    """One node of the domain, as it stands in an exported graph, under ONNX Runtime; `outputs` are ranks by name."""
    node = helper.make_node(op_type, list(feeds), list(outputs), domain=DOMAIN)
    attributes |= {"plugin_namespace": DOMAIN, "plugin_version": "1"}
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    kinds = {
        np.dtype(np.float32): TensorProto.FLOAT,
        np.dtype(np.float64): TensorProto.DOUBLE,
        np.dtype(np.int64): TensorProto.INT64,
    }
    first = kinds[next(iter(feeds.values())).dtype]
    inputs = [helper.make_tensor_value_info(k, kinds[v.dtype], [None] * v.ndim) for k, v in feeds.items()]
    graph = helper.make_graph(
        [node],
        op_type,
        inputs,
        [helper.make_tensor_value_info(k, first, [None] * rank) for k, rank in outputs.items()],
    )
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)]
    model = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(list(outputs), feeds))


def normal(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def torch_of(array: Array) -> torch.Tensor:
    return torch.from_numpy(np.array(array))


# -- warp

#: Grids reach a pixel through a resize and a scaling in float32: 1e-7 of a picture's width, times its contrast.
WARP_TOLERANCE = 1e-5


def motion(frames: int, height: int, width: int) -> NDArray[np.float32]:
    """Grids that also run out of the picture, and hit its border and corners exactly."""
    rng = np.random.default_rng(5)
    grid = rng.uniform(-1.4, 1.4, (frames, 2, height, width)).astype(np.float32)
    grid[0, :, 0, :2] = [[-1, 1], [-1, 1]]
    return np.concatenate([grid, rng.random((frames, 1, height, width), dtype=np.float32)], axis=1)


@pytest.mark.parametrize(("batch", "frames", "scale"), [(1, 1, 1), (1, 3, 4), (2, 3, 2)])
def test_warp(batch: int, frames: int, scale: int) -> None:
    field = motion(batch * frames, 6, 8)
    source = normal(1, batch, 5, 6 * scale, 8 * scale)
    (found,) = run_node("Warp", [warp_function("Warp")], {"source": source, "motion": field}, {"y": 4})
    np.testing.assert_allclose(found, warp(torch_of(source), torch_of(field)).numpy(), atol=WARP_TOLERANCE)


@pytest.mark.parametrize("phase", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_warp_blend(stride: int, phase: tuple[int, int]) -> None:
    if stride == 1:
        phase = (0, 0)
    field, source = motion(6, 6, 8), normal(1, 2, 5, 12, 16)
    previous = normal(2, 6, 5, 12 // stride, 16 // stride)
    feeds = {"source": source, "motion": field, "previous": previous}
    attributes = {"stride": stride, "phase_y": phase[0], "phase_x": phase[1]}
    (found,) = run_node("WarpBlend", [warp_function("WarpBlend")], feeds, {"y": 4}, **attributes)
    expected = warp_blend(*map(torch_of, feeds.values()), stride=stride, phase=phase)
    np.testing.assert_allclose(found, expected.numpy(), atol=WARP_TOLERANCE)


def test_phases_are_every_second_pixel_of_the_whole() -> None:
    field, source, previous = (torch_of(t) for t in (motion(2, 4, 4), normal(1, 1, 3, 8, 8), normal(2, 2, 3, 8, 8)))
    whole = warp_blend(source, field, previous)
    for row in range(2):
        for column in range(2):
            part = warp_blend(source, field, previous[:, :, row::2, column::2], stride=2, phase=(row, column))
            torch.testing.assert_close(part, whole[:, :, row::2, column::2], rtol=0, atol=WARP_TOLERANCE)


def test_identity_motion_of_a_visible_source_changes_it_little() -> None:
    # Corner-aligned grid, sampled as if it were not: the model's own mismatch moves at most half a pixel.
    y, x = np.meshgrid(np.linspace(-1, 1, 16), np.linspace(-1, 1, 16), indexing="ij")
    field = torch.tensor(np.stack([x, y, np.ones_like(x)])[None], dtype=torch.float32)
    ramp = torch.linspace(0, 15, 16).expand(1, 1, 16, 16)
    assert (warp(ramp, field)[..., 2:-2, 2:-2] - ramp[..., 2:-2, 2:-2]).abs().max() <= 0.5


# -- thresholded step


def run_step(
    latent: Array, predicted: Array, history: Array, noise: Array, coefficients: Array
) -> list[NDArray[np.float32]]:
    lower, weight = quantile_rank(math.prod(latent.shape[1:]))
    feeds = {
        "latent": latent,
        "predicted_noise": predicted,
        "history": history,
        "noise": noise,
        "coefficients": coefficients,
    }
    functions = [thresholded_step_function(float(weight))]
    return run_node("ThresholdedStep", functions, feeds, {"x": 5, "h": 6}, lower_rank=lower, weight=float(weight))


def bound_of(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """The bound that the ONNX function finds for x0 estimates (B, n): coefficients make x' = x0, P' = 0."""
    batch, count = values.shape
    latent = values.reshape(batch, 1, 1, count, 1)
    zeros = np.zeros_like(latent)
    coefficients = np.zeros((batch, 11), np.float32)
    coefficients[:, rows.X0_FROM_LATENT] = 1
    coefficients[:, rows.NEXT_FROM_X0] = 1
    x0, _ = run_step(latent, zeros, np.zeros((batch, 2, *latent.shape[1:]), np.float32), zeros, coefficients)
    return x0.reshape(batch, count)


def thresholded(values: NDArray[np.float32]) -> NDArray[np.float32]:
    bound = torch.quantile(torch_of(values).abs(), 0.9, dim=1, keepdim=True).clamp(min=1).numpy()
    return np.clip(values, -bound, bound) / bound


def hostile_values(count: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    sparse = np.zeros(count)
    sparse[: count // 5] = 7.5
    return {
        "normal": rng.standard_normal(count) * 3,
        "below one": rng.uniform(-0.5, 0.5, count),
        "zeros": np.zeros(count),
        "constant": np.full(count, -4.25),
        "ties": rng.integers(-5, 6, count) * 1.5,
        "mostly zeros": sparse,
        "Cauchy": rng.standard_cauchy(count),
        "e^8N": np.exp(8 * rng.standard_normal(count)),
        "neighboring floats": np.nextafter(np.float32(2), np.float32(3)) + rng.integers(0, 3, count) * 2.0**-22,
        "huge": rng.uniform(1e37, 3e38, count),
    }


# 122,880 elements are a latent of the published models.
@pytest.mark.parametrize("count", [122_880, 6_144, 1_007])
def test_quantile_is_exact(count: int) -> None:
    cases = hostile_values(count)
    values = np.stack(list(cases.values())).astype(np.float32)
    found, expected = bound_of(values), thresholded(values)
    # torch's own interpolation may differ in its last bit where it uses a fused multiply-add.
    for i, name in enumerate(cases):
        np.testing.assert_allclose(found[i], expected[i], rtol=2.5e-7, atol=0, err_msg=name)
    if count == 122_880:
        np.testing.assert_array_equal(found, expected)


def test_step_combines_as_its_coefficients_say() -> None:
    shape = (3, 3, 4, 8, 8)
    latent, predicted, noise = (normal(seed, *shape) for seed in range(3))
    history, coefficients = normal(3, 3, 2, *shape[1:]), normal(4, 3, 11)
    coefficients[:, 0] *= 3  # so that the threshold bites in some samples
    arguments = (latent, predicted, history, noise, coefficients)
    found = run_step(*arguments)
    for other in (
        [t.numpy() for t in thresholded_step(*map(torch_of, arguments))],
        apply_step(*arguments),
    ):
        for array, expected in zip(found, other, strict=True):
            np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-5)


def test_step_of_a_sample_does_not_depend_on_its_neighbors() -> None:
    shape = (2, 3, 2, 4, 4)
    arguments = [normal(0, *shape), normal(1, *shape), normal(2, 2, 2, *shape[1:]), normal(3, *shape), normal(4, 2, 11)]
    together = run_step(*arguments)
    alone = run_step(*(a[1:] for a in arguments))
    for both, one in zip(together, alone, strict=True):
        assert_same_floats(both[1:], one)


def test_function_needs_no_topk() -> None:
    # TensorRT's stops at 3840, far below what the quantile of a latent would need.
    assert not {node.op_type for node in thresholded_step_function(0.1).node} & {"TopK", "Loop", "NonZero"}


# -- group norm


@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm_silu(modulated: bool) -> None:
    batch, frames, channels, side, groups = 2, 3, 16, 4, 8
    x = 2 + normal(1, batch * frames, channels, side, side)
    feeds = {"x": x, "gamma": normal(2, channels), "beta": normal(3, channels)}
    modulation = {"scale": normal(4, batch, channels), "shift": normal(5, batch, channels)} if modulated else {}
    name = "ModulatedGroupNormSilu" if modulated else "GroupNormSilu"
    (found,) = run_node(
        name,
        [group_norm_silu_function(name)],
        feeds | modulation,
        {"y": 4},
        grouped=[-1, frames, groups, channels // groups * side * side],
        per_group=[1, groups, channels // groups],
        per_channel=[-1, 1, channels, 1, 1],
        clip=[-1, frames, channels, side, side],
        flat=[-1, channels, side, side],
    )
    scale_shift = (torch_of(modulation["scale"]), torch_of(modulation["shift"])) if modulated else None
    gamma, beta = torch_of(feeds["gamma"]), torch_of(feeds["beta"])
    expected = group_norm_silu(torch_of(x), gamma, beta, scale_shift, frames=frames, groups=groups)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-5)


# -- small convolutions


@pytest.mark.parametrize("size", [(2, 2), (4, 4), (2, 4)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_small_conv(size: tuple[int, int], dtype: type[np.floating[Any]]) -> None:
    arrays = {"x": normal(1, 3, 5, *size), "weight": normal(2, 6, 5, 3, 3), "bias": normal(3, 6)}
    matrices = zip(("kernel", "spread", "gather"), transforms(*size), strict=True)
    feeds = {name: np.asarray(value, dtype) for name, value in (*arrays.items(), *matrices)}
    (found,) = run_node("SmallConv", [small_conv_function()], feeds, {"y": 4}, height=size[0], width=size[1])
    expected = small_conv(*(torch_of(feeds[name]) for name in arrays)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 if dtype is np.float64 else 1e-5)


def test_where_small_convs_are_used() -> None:
    kernel = torch.zeros(6, 5, 3, 3)
    assert suits_small_conv(torch.zeros(1, 5, 4, 4), kernel)
    assert not suits_small_conv(torch.zeros(1, 5, 8, 8), kernel)
    assert not suits_small_conv(torch.zeros(1, 5, 3, 4), kernel), "half a tile"
    assert not suits_small_conv(torch.zeros(1, 5, 4, 4), torch.zeros(6, 5, 1, 1))


# -- attention


def test_spatial_attention() -> None:
    frames, pixels, channels, heads, hidden = 3, 6, 16, 2, 24
    weights = {
        "gamma": normal(1, channels),
        "query": normal(2, channels, hidden),
        "key": normal(3, channels, hidden),
        "value": normal(4, channels, hidden),
        "out": normal(5, hidden, channels),
    }
    x = normal(7, frames, pixels, channels)
    functions = [spatial_attention_function()]
    (found,) = run_node("SpatialAttention", functions, {"x": x, **weights}, {"y": 3}, heads=heads)
    constants = SpatialWeights(**{name: torch_of(value) for name, value in weights.items()})
    np.testing.assert_allclose(found, spatial_attention(torch_of(x), constants, heads=heads), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rotary_width", [8, 4], ids=["all rotated", "half rotated"])
@pytest.mark.parametrize(("batch", "pixels", "chunks"), [(1, 6, 1), (2, 6, 3), (1, 7, 4)])
def test_temporal_attention(batch: int, pixels: int, chunks: int, rotary_width: int) -> None:
    frames, channels, heads, head_width = 5, 16, 2, 8
    hidden = heads * head_width
    angle = normal(9, frames, rotary_width // 2)
    weights = {
        "gamma": normal(1, channels),
        "query": normal(2, channels, hidden),
        "key": normal(3, channels, hidden),
        "value": normal(4, channels, hidden),
        "out": normal(5, hidden, channels),
        "cos": np.cos(angle),
        "sin": np.sin(angle),
        "bias": normal(6, 1, heads, frames, frames),
        "position": np.arange(frames)[None],
    }
    x = normal(7, batch * pixels, frames, channels)
    functions = [temporal_attention_function(chunks)]
    attributes = {"heads": heads, "rotary_width": rotary_width}
    (found,) = run_node(operator_name(chunks), functions, {"x": x, **weights}, {"y": 3}, **attributes)
    constants = TemporalWeights(**{name: torch_of(value) for name, value in weights.items()})
    expected = temporal_attention(torch_of(x), constants, heads=heads, pixels=pixels).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
