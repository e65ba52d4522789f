"""The rewritten LFAE against the untouched one, in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lfdm_export.rewrite.convolution import fold_batch_norm
from lfdm_export.rewrite.lfae import Decode, dephase_kernel, fold_batch_norms
from lfdm_export.rewrite.stage_modules import EstimateMotion
from lfdm_models.config import HourglassConfig, LfaeConfig
from lfdm_models.generator import Flow
from lfdm_models.layers import SameBlock, coordinate_grid
from lfdm_models.lfae import Lfae, flow_to_latent, latent_to_flow
from lfdm_models.regions import covariance_root

TOLERANCE = 1e-9
SIDE = 32


def lfae(**changes: int) -> Lfae:
    small = HourglassConfig(8, 32, 2)
    sizes = {"regions": 3, "width": 8, "max_width": 32, "bottleneck_blocks": 2, **changes}
    config = LfaeConfig(**sizes, flow_predictor=small, region_predictor=small, bg_predictor=small)
    torch.manual_seed(1)
    network = Lfae(config).double().eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point() and not name.endswith("down.weight"):
            tensor.normal_(0, 0.2)
    # Regions of some width: points have no inverse covariance.
    network.region_predictor.regions.weight.mul_(0.1)
    return network


def images(batch: int) -> Tensor:
    return torch.rand(batch, 3, SIDE, SIDE, dtype=torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return ((found - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("residual_flow", [False, True])
@pytest.mark.parametrize("down_blocks", [1, 2, 3])
def test_decode(down_blocks: int, residual_flow: bool) -> None:
    network = lfae(down_blocks=down_blocks)
    image, frames = images(2), 3
    side = SIDE >> down_blocks
    # Some of the grid runs out of the picture.
    latent = torch.randn(2, 3, frames, side, side, dtype=torch.float64)
    skips = network.generator.encode(image)
    found, warped = Decode(fold_batch_norms(network), residual_flow=residual_flow)(image, *skips, latent)
    for t in range(frames):
        flow = latent_to_flow(latent[:, :, t], residual_flow=residual_flow)
        expected = network.generator.decode(image, skips, flow)
        assert error(found[:, :, t], expected.frame) < TOLERANCE
        assert error(warped[:, :, t], expected.warped) < TOLERANCE


def test_encoder_with_folded_norms() -> None:
    network, image = lfae(), images(2)
    folded = fold_batch_norms(network).generator.encode(image)
    for found, expected in zip(folded, network.generator.encode(image), strict=True):
        assert error(found, expected) < TOLERANCE


def test_folding_leaves_the_network_alone() -> None:
    network = lfae()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fold_batch_norms(network)
    after = network.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("residual_flow", [False, True])
def test_estimate_motion(residual_flow: bool) -> None:
    network = lfae()
    source, driving = images(2), images(2)
    expected = flow_to_latent(network.estimate_motion(source, driving), residual_flow=residual_flow)
    found = EstimateMotion(fold_batch_norms(network), residual_flow=residual_flow)(source, driving)
    assert error(found, expected) < TOLERANCE


def test_fold_batch_norm() -> None:
    block = SameBlock(3, 5, 7).double().eval().requires_grad_(False)
    assert block.norm.running_mean is not None
    assert block.norm.running_var is not None
    block.norm.running_mean.normal_()
    block.norm.running_var.uniform_(0.1, 2)
    block.norm.weight.normal_()
    block.norm.bias.normal_()
    x = images(2)
    assert error(fold_batch_norm(block.conv, block.norm)(x), block.norm(block.conv(x))) < TOLERANCE


@pytest.mark.parametrize("size", [1, 3, 5, 7])
def test_kernel_on_phases(size: int) -> None:
    weight = torch.randn(3, 4, size, size, dtype=torch.float64)
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    expected = F.conv2d(x, weight, padding=size // 2)
    phases = torch.cat([x[:, :, row::2, column::2] for row in range(2) for column in range(2)], dim=1)
    kernel = dephase_kernel(weight)
    found = F.pixel_shuffle(F.conv2d(phases, kernel, padding=kernel.shape[-1] // 2), 2)
    assert error(found, expected) < TOLERANCE


def test_covariance_root_is_the_svd_root() -> None:
    factors = torch.randn(200, 2, 2, dtype=torch.float64)
    covar = factors @ factors.transpose(1, 2)
    root = covariance_root(covar)
    assert error(root @ root.transpose(1, 2), covar) < TOLERANCE
    u, s, _ = torch.linalg.svd(covar)
    expected = u @ torch.diag_embed(s.sqrt())
    # The sign of the whole is free, that of one column is not.
    sign = torch.sign((root * expected).sum(dim=(1, 2), keepdim=True))
    assert error(root * sign, expected) < 1e-7
    assert (torch.linalg.det(root) < 0).all()


@pytest.mark.parametrize("residual_flow", [False, True])
def test_flow_and_latent_are_inverse(residual_flow: bool) -> None:
    like = images(1)
    grid = coordinate_grid(4, 6, like)[None] + 0.1 * torch.randn(1, 4, 6, 2, dtype=torch.float64)
    flow = Flow(grid, torch.rand(1, 1, 4, 6, dtype=torch.float64))
    back = latent_to_flow(flow_to_latent(flow, residual_flow=residual_flow), residual_flow=residual_flow)
    assert error(back.grid, flow.grid) < TOLERANCE
    assert error(back.occlusion, flow.occlusion) < TOLERANCE
