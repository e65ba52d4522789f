"""The GPU's way through operators and deployable modules, the host build of the kernels standing in for a GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_export.errors import EngineError
from lfdm_export.ops.cuda.dispatch import on_gpu, standing_in
from lfdm_export.ops.cuda.host import HostKernels
from lfdm_export.ops.group_norm_silu.reference import group_norm_silu
from lfdm_export.ops.thresholded_step.gpu import noise_on_gpu, thresholded_step_on_gpu
from lfdm_export.ops.thresholded_step.reference import thresholded_step, thresholded_step_in_torch
from lfdm_export.ops.warp.gpu import warp_blend_on_gpu, warp_on_gpu
from lfdm_export.ops.warp.reference import warp, warp_blend, warp_blend_in_torch, warp_in_torch
from lfdm_export.rewrite.attention import FoldedLinearAttention, FoldedTemporalAttention
from lfdm_export.rewrite.convolution import PHASES, interleave, phase_convs
from lfdm_export.rewrite.lfae import conv_in_columns, dephase_kernel
from lfdm_export.rewrite.precision import channels_last, in_precision
from lfdm_export.rewrite.stage_modules import stage_modules
from lfdm_export.sampling.noise import START, noise_for
from lfdm_models.attention import PreNorm, Residual, SpatialLinearAttention
from lfdm_models.model import LfdmModel

FRAMES, SIZE, LATENT = 4, 64, 16
#: Largest errors against float32, relative to the largest value; measured 1e-3 and 1e-2 on the small model.
TOLERANCES = {torch.float32: 3e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


@pytest.fixture
def host(host_kernels: HostKernels) -> HostKernels:
    return host_kernels


@pytest.fixture
def gpu(host: HostKernels) -> Iterator[None]:
    """Operators take the GPU's way."""
    with standing_in(host):
        yield


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)).to(dtype)


def motion_of(frames: int, size: int) -> Tensor:
    motion = random(9, frames, 3, size, size) * 0.5
    motion[:, 2:] = motion[:, 2:].sigmoid()
    return motion


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_warps(dtype: torch.dtype, form: torch.memory_format) -> None:
    source = random(1, 2, 8, 16, 16, dtype=dtype).to(memory_format=form)
    previous = random(2, 4, 8, 8, 8, dtype=dtype).to(memory_format=form)
    motion = motion_of(4, 4)
    for found, expected in (
        (warp(source, motion), warp_in_torch(source, motion)),
        (
            warp_blend(source, motion, previous, stride=2, phase=(1, 0)),
            warp_blend_in_torch(source, motion, previous, stride=2, phase=(1, 0)),
        ),
    ):
        torch.testing.assert_close(found, expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
        assert found.is_contiguous(memory_format=form)


@pytest.mark.usefixtures("gpu")
def test_tensors_that_lie_otherwise_are_taken_too() -> None:
    source, motion, previous = random(1, 1, 8, 8, 8), motion_of(2, 4).double(), random(2, 2, 8, 8, 8)
    expected = warp_blend_in_torch(source, motion.float(), previous)
    shifted = torch.cat([torch.zeros(1), previous.flatten()])[1:].view_as(previous)  # not at a multiple of 16 bytes
    mixed = previous.to(memory_format=torch.channels_last)  # unlike the source
    spread = random(3, 2, 16, 8, 8)
    spread[:, ::2] = previous
    for other in (shifted, mixed, spread[:, ::2], previous.double()):
        torch.testing.assert_close(warp_blend(source, motion, other).float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("gpu")
def test_step_takes_a_narrower_prediction() -> None:
    shape = (2, 3, 2, 4, 4)
    latent, noise, history = random(1, *shape), random(2, *shape), random(3, 2, 2, *shape[1:])
    predicted, coefficients = random(4, *shape, dtype=torch.float16), random(5, 2, 11)
    found = thresholded_step(latent, predicted, history, noise, coefficients)
    expected = thresholded_step_in_torch(latent, predicted.float(), history, noise, coefficients)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("batch", "alone"), [(31, False), (32, True)])
def test_many_samples_take_one_kernel(
    host: HostKernels, batch: int, alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    latent, noise = random(1, batch, 3, 2, 4, 4) * 2, random(2, batch, 3, 2, 4, 4)
    coefficients = random(3, batch, 11)
    coefficients[:, :2] = 1.0  # the threshold bites
    arguments = (latent, noise, torch.stack([latent, noise], dim=1), noise, coefficients)
    names: list[str] = []
    run_kernel = HostKernels.run

    def noting(self: HostKernels, name: str, *rest: Any) -> None:
        names.append(name)
        run_kernel(self, name, *rest)

    monkeypatch.setattr(HostKernels, "run", noting)
    with standing_in(host):
        found = thresholded_step_on_gpu(*arguments)
    assert (names == ["lfdm_thresholded_step_f32"]) == alone
    assert len(names) == (1 if alone else 4)
    torch.testing.assert_close(found, thresholded_step_in_torch(*arguments), rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("step", [START, 5])
def test_noise(step: int) -> None:
    shape, seeds = (3, 2, 3, 3), [7, 2**64 - 1]
    found = noise_on_gpu(torch.tensor(np.array(seeds, np.uint64).view(np.int64)), torch.tensor([step]), shape)
    np.testing.assert_array_max_ulp(found.numpy(), noise_for(seeds, step, shape), maxulp=1)


@pytest.mark.usefixtures("gpu")
def test_operators_are_what_torch_expects_of_operators() -> None:
    # Their shape functions, which compilation believes, give what the kernels give: sizes, types and strides.
    source, motion, previous = random(1, 1, 8, 8, 8), motion_of(2, 4), random(2, 2, 8, 8, 8)
    latent = random(3, 2, 3, 2, 4, 4)
    history = torch.stack([latent, latent], dim=1)
    checks = ("test_schema", "test_faketensor")
    for form in (torch.contiguous_format, torch.channels_last):
        near, far = source.to(memory_format=form), previous.to(memory_format=form)
        torch.library.opcheck(torch.ops.lfdm.warp.default, (near, motion), test_utils=checks)
        torch.library.opcheck(torch.ops.lfdm.warp_blend.default, (near, motion, far, 1, 0, 0), test_utils=checks)
    arguments = (latent, latent.half(), history, latent, random(4, 2, 11))
    torch.library.opcheck(torch.ops.lfdm.thresholded_step.default, arguments, test_utils=checks)
    draws = (torch.tensor([1]), torch.tensor([2]), [3, 2])
    torch.library.opcheck(torch.ops.lfdm.noise.default, draws, test_utils=checks)


def test_kernels_refuse_tensors_of_the_host() -> None:
    source, motion = torch.zeros(1, 4, 4, 4), torch.zeros(1, 3, 4, 4)
    assert not on_gpu(source)
    with pytest.raises(EngineError, match="expected a GPU's"):
        warp_on_gpu(source, motion)
    with pytest.raises(EngineError, match="expected a GPU's"):
        warp_blend_on_gpu(source, motion, source, stride=1, phase=(0, 0))
    latent = torch.zeros(1, 8)
    with pytest.raises(EngineError, match="expected a GPU's"):
        thresholded_step_on_gpu(latent, latent, torch.zeros(1, 2, 8), latent, torch.zeros(1, 11))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("modulated", [False, True])
def test_group_norm(host: HostKernels, modulated: bool, form: torch.memory_format) -> None:
    x = 1 + 2 * random(1, 6, 16, 4, 4).to(memory_format=form)
    gamma, beta, scale, shift = random(2, 16), random(3, 16), random(4, 2, 16), random(5, 2, 16)
    arguments = (x, gamma, beta, (scale, shift) if modulated else None)
    expected = group_norm_silu(*arguments, frames=3, groups=4)
    with standing_in(host):
        found = group_norm_silu(*arguments, frames=3, groups=4)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=form)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("padding_mode", ["constant", "replicate"])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (8, 8)])
def test_phases_of_one_convolution(
    host: HostKernels, size: tuple[int, int], padding_mode: str, form: torch.memory_format
) -> None:
    x = random(1, 2, 4, *size).double().to(memory_format=form)
    kernels, bias = random(2, 4, 6, 4, 2, 2).double(), random(3, 6).double()
    expected = phase_convs(x, kernels, bias, padding_mode=padding_mode)
    whole = interleave(expected)
    with standing_in(host):
        found = phase_convs(x, kernels, bias, padding_mode=padding_mode)
        together = interleave(found)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together, whole, rtol=1e-12, atol=1e-12)
    if size != (1, 1):  # whose layout is either
        assert together.is_contiguous(memory_format=form)
        assert all(torch.relu(phase).is_contiguous(memory_format=form) for phase in found)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_a_convolution_in_columns(size: int, form: torch.memory_format) -> None:
    weight, bias = random(1, 3, 4, size, size).double(), random(2, 3).double()
    whole = random(3, 2, 4, 8, 6).double()
    phases = [whole[:, :, row::2, column::2].contiguous(memory_format=form) for row, column in PHASES]
    expected = F.conv2d(whole, weight, bias, padding=size // 2)
    found = conv_in_columns(phases, dephase_kernel(weight), bias, size)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    narrow = conv_in_columns([one.half() for one in phases], dephase_kernel(weight).half(), bias.half(), size)
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), expected, rtol=4e-3, atol=4e-3 * float(expected.abs().max()))


# -- modules


@pytest.mark.parametrize("channels", [32, 264])  # with fused attention, and too wide for it
def test_linear_attention(host: HostKernels, channels: int) -> None:
    block = Residual(PreNorm(channels, SpatialLinearAttention(channels, 2, 16))).double()
    folded = FoldedLinearAttention(block)
    x = random(1, 3, 20, channels).double()
    with torch.inference_mode():
        expected = folded(x)
        with standing_in(host):
            found = folded(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.fixture(scope="module")
def modules(small_model: LfdmModel) -> dict[str, nn.Module]:
    made = stage_modules(small_model, FRAMES)
    return {name: made[name] for name in ("encode", "step", "step_guided", "decode")}


def run(modules: Mapping[str, nn.Module], model: LfdmModel) -> dict[str, Tensor]:
    """A clip's stages in turn, with inputs that do not depend on the precision."""
    shape = (2, 3, FRAMES, LATENT, LATENT)
    image, latent, noise = random(1, 2, 3, SIZE, SIZE).sigmoid(), random(2, *shape), random(3, *shape)
    embedding, timestep = random(4, 2, model.config.dm.text_width), torch.tensor([999, 20])
    history, coefficients = torch.zeros(2, 2, *shape[1:]), random(5, 2, 11)
    coefficients[:, :2] = torch.tensor([[3.0, -2.0], [1.0, -0.5]])  # the threshold bites in the first
    with torch.inference_mode():
        *skips, context = modules["encode"](image)
        rest = (history, noise, coefficients)
        _, *plain = modules["step"](latent, context, embedding, timestep, *rest)
        _, *guided = modules["step_guided"](latent, context, embedding, timestep, torch.tensor([2.0, 1.5]), *rest)
        frames, warped = modules["decode"](image, *skips, plain[1][:, 1] * 0.1)
    return {"latent": plain[0], "history": plain[1], "guided": guided[0], "frames": frames, "warped": warped}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("last", [False, True], ids=["planar", "channels last"])
def test_modules_on_the_gpus_way(
    host: HostKernels, modules: dict[str, nn.Module], small_model: LfdmModel, dtype: torch.dtype, last: bool
) -> None:
    expected = run(modules, small_model)
    lowered = in_precision(modules, dtype)
    if last:
        channels_last(lowered)
    with standing_in(host):
        found = run(lowered, small_model)
    for name, value in found.items():
        assert value.dtype == torch.float32, name
        error = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= TOLERANCES[dtype], name


def test_networks_use_the_kernels(
    host: HostKernels, modules: dict[str, nn.Module], small_model: LfdmModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    names: list[str] = []
    run_kernel = HostKernels.run

    def noting(self: HostKernels, name: str, *rest: Any) -> None:
        names.append(name)
        run_kernel(self, name, *rest)

    monkeypatch.setattr(HostKernels, "run", noting)
    with standing_in(host):
        run(in_precision(modules, torch.float16), small_model)
    blocks = sum(isinstance(module, FoldedTemporalAttention) for module in modules["step"].modules())
    guided = sum(isinstance(module, FoldedTemporalAttention) for module in modules["step_guided"].modules())
    assert names.count("lfdm_temporal_core_16x1_f16") == blocks + guided > 0
    assert [name for name in names if "linear_attention" in name]
    names.clear()
    with standing_in(host):  # for float32 there is none
        run(modules, small_model)
    assert not [name for name in names if "temporal_core" in name or "linear_attention" in name]


def test_tables_of_kernels_stay_float32(modules: dict[str, nn.Module]) -> None:
    buffers = dict(in_precision(modules, torch.bfloat16)["step"].named_buffers())
    kinds = {name.rpartition(".")[2]: buffer.dtype for name, buffer in buffers.items() if "temporal" in name}
    assert (kinds["frame_turns"], kinds["frame_bias"]) == (torch.float32, torch.float32)
    assert (kinds["frame_qkv"], kinds["query"], kinds["bias"]) == (torch.bfloat16,) * 3


def test_lower_precision_leaves_the_originals_alone(modules: dict[str, nn.Module]) -> None:
    lowered = in_precision(modules, torch.bfloat16)
    assert all(p.dtype == torch.float32 for module in modules.values() for p in module.parameters())
    # Weights that were shared still are, and the ones for timesteps are as they were.
    guided, plain = (dict(lowered[name].named_parameters()) for name in ("step_guided", "step"))
    shared = {id(parameter) for parameter in plain.values()} & {id(parameter) for parameter in guided.values()}
    assert shared
    assert {p.dtype for name, p in plain.items() if ".time_mlp." in name} == {torch.float32}
    assert {p.dtype for name, p in plain.items() if ".time_mlp." not in name} == {torch.bfloat16}
    assert {p.dtype for p in lowered["decode"].parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("dtype", "last"),
    [
        pytest.param(torch.float32, False, id="float32, planar"),
        pytest.param(torch.float16, True, id="float16, channels last"),
        pytest.param(torch.float32, True, id="float32, channels last", marks=pytest.mark.full),
        pytest.param(torch.float16, False, id="float16, planar", marks=pytest.mark.full),
    ],
)
def test_a_step_compiles_into_one_graph(
    host: HostKernels, modules: dict[str, nn.Module], small_model: LfdmModel, dtype: torch.dtype, last: bool
) -> None:
    # A break would put the host back between the kernels of a step.
    expected = run(modules, small_model)
    lowered = in_precision(modules, dtype)
    if last:
        channels_last(lowered)
    compiled: dict[str, Any] = {
        name: torch.compile(module, backend="eager", fullgraph=True)
        for name, module in lowered.items()
        if name in ("step", "decode")
    }
    with standing_in(host):
        found = run({**lowered, **compiled}, small_model)
    torch._dynamo.reset()
    for name, value in found.items():
        error = (value - expected[name]).abs().max() / expected[name].abs().max()
        assert error <= TOLERANCES[dtype], name


@pytest.mark.parametrize(("dtype", "kernel"), [(torch.float16, True), (torch.float32, False)])
def test_attention_is_captured_ahead_of_time(
    host: HostKernels, modules: dict[str, nn.Module], dtype: torch.dtype, kernel: bool
) -> None:
    # What AOTInductor builds from.
    attention = next(m for m in modules["step"].modules() if isinstance(m, FoldedTemporalAttention))
    lowered = in_precision({"attention": attention}, dtype)["attention"]

    class ByFrame(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return lowered.by_frame(x)

    x = random(1, 1, FRAMES, 6, len(attention.frame_qkv), dtype=dtype)
    with standing_in(host), torch.no_grad():
        program = torch.export.export(ByFrame(), (x,))
        torch.testing.assert_close(program.module()(x), lowered.by_frame(x), rtol=1e-4, atol=1e-5)
    placed = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert ("lfdm.temporal_core.default" in placed) is kernel
