"""The rewritten UNet against the untouched one, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lfdm_export.rewrite.attention import FoldedLinearAttention, FoldedSpatialAttention, FoldedTemporalAttention
from lfdm_export.rewrite.convolution import fold_time, phase_convs, phase_kernels
from lfdm_export.rewrite.unet import (
    DeployableUnet,
    DoublingConv,
    FoldedConvBlock,
    FoldedModulation,
    context_half,
    latent_half,
)
from lfdm_models.config import DmConfig
from lfdm_models.unet import ConvBlock, Unet3D

MUG_LIKE = DmConfig(
    width=16, multipliers=(1, 2, 4), heads=4, head_width=16, rotary_width=16, feature_channels=8, text_width=24
)
# Everything that the other variant does otherwise, and a head only part of which is rotated.
NATOPS_LIKE = DmConfig(
    width=16, multipliers=(1, 2), heads=2, head_width=32, rotary_width=16, feature_channels=8, text_width=24,
    learned_null=True, upsample="upconv",
)  # fmt: skip
BATCH, FRAMES, SIDE = 2, 5, 8
TOLERANCE = 1e-9


def unet(config: DmConfig) -> Unet3D:
    torch.manual_seed(3)
    network = Unet3D(config).double().eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.normal_(0, 0.15)
    return network


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(params=[MUG_LIKE, NATOPS_LIKE], ids=["deconv", "upconv"])
def network(request: pytest.FixtureRequest) -> Unet3D:
    return unet(request.param)


def tokens_last(x: Tensor) -> Tensor:
    """(B, C, T, h, w) -> (B·T, h·w, C)."""
    return x.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)


def test_whole_network(network: Unet3D) -> None:
    x, feature, text = normal(BATCH, 3, FRAMES, SIDE, SIDE), normal(BATCH, 8, SIDE, SIDE), normal(BATCH, 24)
    timestep = torch.tensor([3, 700])
    expected = network(x, feature, text, timestep)
    context = context_half(network.init_conv)(feature)
    assert relative_error(DeployableUnet(network, FRAMES)(x, context, text, timestep), expected) < TOLERANCE


def test_guidance_in_one_pass_with_a_scale_for_each_sample(network: Unet3D) -> None:
    x, feature, text = normal(BATCH, 3, FRAMES, SIDE, SIDE), normal(BATCH, 8, SIDE, SIDE), normal(BATCH, 24)
    timestep, scales = torch.tensor([999, 0]), (2.5, 0.5)
    context = context_half(network.init_conv)(feature)
    guided = DeployableUnet(network, FRAMES, guided=True)
    found = guided(x, context, text, timestep, torch.tensor(scales, dtype=torch.float64))
    for i, scale in enumerate(scales):
        own = slice(i, i + 1)
        expected = network.guided(x[own], feature[own], text[own], timestep[own], scale)
        assert relative_error(found[own], expected) < TOLERANCE


def test_init_conv_is_the_sum_of_its_halves(network: Unet3D) -> None:
    x, feature = normal(BATCH, 3, FRAMES, SIDE, SIDE), normal(BATCH, 8, SIDE, SIDE)
    repeated = feature[:, :, None].expand(-1, -1, FRAMES, -1, -1)
    expected = network.init_conv(torch.cat([x, repeated], dim=1))
    frames = latent_half(network.init_conv)(x.transpose(1, 2).flatten(0, 1)).view(BATCH, FRAMES, -1, SIDE, SIDE)
    found = (frames + context_half(network.init_conv)(feature)[:, None]).transpose(1, 2)
    assert relative_error(found, expected) < TOLERANCE


def test_linear_attention(network: Unet3D) -> None:
    block = network.down_levels[1].spatial
    x = normal(BATCH, 32, FRAMES, 4, 4)
    assert relative_error(FoldedLinearAttention(block)(tokens_last(x)), tokens_last(block(x))) < TOLERANCE


def test_temporal_attention(network: Unet3D) -> None:
    block, bias = network.down_levels[1].temporal, network.time_rel_pos_bias(FRAMES)
    x = normal(BATCH, 32, FRAMES, 4, 4)

    def by_pixel(t: Tensor) -> Tensor:
        return t.permute(0, 3, 4, 2, 1).flatten(1, 2)

    attention = FoldedTemporalAttention(block, bias)
    assert relative_error(attention(by_pixel(x)), by_pixel(block(x, bias))) < TOLERANCE
    # As a GPU computes types that there is no kernel for.
    found = attention.by_frame(tokens_last(x).unflatten(0, (BATCH, FRAMES))).flatten(0, 1)
    assert relative_error(found, tokens_last(block(x, bias))) < TOLERANCE


def test_spatial_attention(network: Unet3D) -> None:
    block, channels = network.mid_spatial_attn, network.config.level_widths[-1]
    x = normal(BATCH, channels, FRAMES, 4, 4)
    assert relative_error(FoldedSpatialAttention(block)(tokens_last(x)), tokens_last(block(x))) < TOLERANCE


@pytest.mark.parametrize("modulated", [False, True])
def test_conv_block(modulated: bool) -> None:
    torch.manual_seed(0)
    block = ConvBlock(4, 16).double().requires_grad_(False)
    block.norm.weight.normal_()
    block.norm.bias.normal_()
    # Far off zero, where a variance computed carelessly would lose digits.
    x = 3 + normal(BATCH, 4, FRAMES, 6, 6)
    scale_shift = (normal(BATCH, 16), normal(BATCH, 16)) if modulated else None
    found = FoldedConvBlock(block, FRAMES)(x.transpose(1, 2).flatten(0, 1), scale_shift)
    expected = block(x, scale_shift).transpose(1, 2).flatten(0, 1)
    assert relative_error(found, expected) < TOLERANCE


def test_modulation(network: Unet3D) -> None:
    condition = normal(BATCH, 4 * 16 + 24)
    pairs = FoldedModulation(network)(condition)
    blocks = [block for level in network.down_levels for block in level.blocks]
    blocks += [network.mid_block1, network.mid_block2]
    blocks += [block for level in network.up_levels for block in level.blocks]
    assert len(pairs) == len(blocks)
    for (scale, shift), block in zip(pairs, blocks, strict=True):
        assert relative_error(torch.cat([scale, shift], dim=1), block.mlp(condition)) < TOLERANCE


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv3d(4, 6, (1, 3, 3), padding=(0, 1, 1)),
        nn.Conv3d(4, 6, (1, 4, 4), (1, 2, 2), (0, 1, 1)),
        nn.Conv3d(4, 6, 1),
    ],
    ids=["3x3", "strided", "1x1"],
)
def test_convs_without_time(conv: nn.Conv3d) -> None:
    conv = conv.double().requires_grad_(False)
    x = normal(BATCH, 4, FRAMES, 6, 8)
    found = fold_time(conv)(x.transpose(1, 2).flatten(0, 1))
    assert relative_error(found, conv(x).transpose(1, 2).flatten(0, 1)) < TOLERANCE


@pytest.mark.parametrize("side", [2, 3, 8])
def test_upsampled_conv_with_reflected_border(side: int) -> None:
    module = unet(NATOPS_LIKE).up_levels[0].resample
    assert isinstance(module, nn.Sequential)
    conv = module[1]
    assert isinstance(conv, nn.Conv3d)
    x = normal(3, conv.in_channels, side, side)
    expected = module(x[:, :, None])[:, :, 0]
    assert relative_error(DoublingConv(conv)(x), expected) < TOLERANCE


@pytest.mark.parametrize("size", [(1, 1), (3, 4), (8, 8)])
def test_phases_of_a_transposed_conv(size: tuple[int, int]) -> None:
    conv = nn.ConvTranspose3d(4, 6, (1, 4, 4), (1, 2, 2), (0, 1, 1)).double().requires_grad_(False)
    x = normal(3, 4, *size)
    assert relative_error(DoublingConv(conv)(x), conv(x[:, :, None])[:, :, 0]) < TOLERANCE


def test_phases_of_an_upsampled_conv() -> None:
    weight, bias, x = normal(5, 4, 3, 3), normal(5), normal(2, 4, 6, 7)
    upsampled = nn.functional.interpolate(x, scale_factor=2.0)
    expected = nn.functional.conv2d(upsampled, weight, bias, padding=1)
    phases = phase_convs(x, phase_kernels(weight), bias)
    for phase, (row, column) in zip(phases, ((0, 0), (0, 1), (1, 0), (1, 1)), strict=True):
        assert relative_error(phase, expected[:, :, row::2, column::2]) < TOLERANCE
