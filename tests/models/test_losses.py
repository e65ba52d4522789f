from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from lfdm_models.regions import Regions, covariance_root
from lfdm_models.training.equivariance import PlaneMap, affine_loss, shift_loss
from lfdm_models.training.errors import TrainingError
from lfdm_models.training.losses import PerceptualLoss, Pyramid, PyramidLoss
from lfdm_models.training.vgg import Vgg19


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image(seed: int = 0, size: int = 16) -> Tensor:
    return torch.rand(2, 3, size, size, generator=generator(seed))


def regions(seed: int = 0, count: int = 4) -> Regions:
    shift = torch.rand(2, count, 2, generator=generator(seed)) - 0.5
    root = torch.randn(2, count, 2, 2, generator=generator(seed + 1))
    covar = root @ root.transpose(-1, -2) + 0.1 * torch.eye(2)
    return Regions(shift, covar, covariance_root(covar), torch.zeros(2, count, 4, 4))


# --- Pyramids --------------------------------------------------------------------------------------


def test_a_pyramid_keeps_plain_colors_and_halves_sides():
    levels = Pyramid()(torch.full((1, 3, 32, 32), 0.5))
    assert [level.shape[-1] for level in levels] == [32, 16, 8, 4]
    for level in levels[:3]:  # the coarsest is all border, which is padded with black
        middle = level.shape[-1] // 2
        torch.testing.assert_close(level[..., middle, middle], torch.full((1, 3), 0.5))


def test_pyramid_loss_by_hand():
    black, gray = torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.25)
    loss = PyramidLoss(weight=2.0, edge=1.0, scales=(1,))
    assert loss(gray, black).item() == pytest.approx(0.5)  # no neighbors differ
    stripes = black.clone()
    stripes[..., ::2] = 1.0
    # Half of the pixels differ by 1; along x all neighbors do, along y none.
    assert loss(stripes, black).item() == pytest.approx(2.0 * (0.5 + (1.0 + 0.0) / 2))
    assert PyramidLoss(weight=2.0, edge=0.0, scales=(1,))(stripes, black).item() == pytest.approx(1.0)


def test_pyramid_loss_prefers_what_is_nearer():
    square = torch.zeros(1, 3, 32, 32)
    square[..., 10:18, 10:18] = 1.0
    loss = PyramidLoss()
    near, far = torch.roll(square, 2, 3), torch.roll(square, 8, 3)
    assert loss(square, square).item() == 0
    assert 0 < loss(near, square) < loss(far, square)


# --- VGG-19 ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vgg() -> Vgg19:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Vgg19().eval().requires_grad_(False)


def test_vgg_has_torchvisions_names(vgg: Vgg19):
    keys = list(vgg.state_dict())
    convolutions = (0, 2, 5, 7, 10, 12, 14, 16, 19, 21, 23, 25, 28)
    assert keys == [f"features.{index}.{leaf}" for index in convolutions for leaf in ("weight", "bias")]
    assert vgg.features[28].weight.shape == (512, 512, 3, 3)
    assert vgg.taps == [1, 6, 11, 20, 29]


def test_vgg_gives_one_activation_a_block_as_far_as_the_image_goes(vgg: Vgg19):
    assert [tuple(a.shape[1:]) for a in vgg(image(size=16))] == [
        (64, 16, 16),
        (128, 8, 8),
        (256, 4, 4),
        (512, 2, 2),
        (512, 1, 1),
    ]
    assert len(vgg(image(size=4))) == 3


def test_vgg_loads_torchvisions_file(vgg: Vgg19, tmp_path: Path):
    state = {**vgg.state_dict(), "features.34.weight": torch.zeros(512, 512, 3, 3), "classifier.0.bias": torch.zeros(9)}
    torch.save(state, tmp_path / "vgg19.pth")
    loaded = Vgg19.load(tmp_path / "vgg19.pth")
    assert all(torch.equal(value, vgg.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_what_is_no_vgg_is_refused(vgg: Vgg19, tmp_path: Path):
    state = dict(vgg.state_dict())
    del state["features.28.bias"]
    torch.save(state, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(TrainingError, match=r"features\.28\.bias is missing"):
        Vgg19.load(tmp_path / "other.pth")
    with pytest.raises(TrainingError, match=r"text\.pth is not a state dict of VGG-19"):
        Vgg19.load(tmp_path / "text.pth")
    with pytest.raises(TrainingError, match="cannot be read"):
        Vgg19.load(tmp_path / "none.pth")


def test_perceptual_loss_is_the_weighted_sum_over_activations(vgg: Vgg19):
    loss = PerceptualLoss(vgg, weight=10.0, scales=(1,))
    found, wanted = image(0).requires_grad_(), image(1)
    expected = sum((a - b).abs().mean() for a, b in zip(vgg(found), vgg(wanted), strict=True))
    value = loss(found, wanted)
    torch.testing.assert_close(value, 10 * torch.as_tensor(expected))
    value.backward()
    assert found.grad is not None
    assert found.grad.abs().sum() > 0
    assert loss(wanted, wanted).item() == pytest.approx(0, abs=1e-5)


# --- Equivariance ----------------------------------------------------------------------------------


def test_a_map_without_noise_is_the_identity():
    plane_map = PlaneMap.random(2, generator(), affine_sigma=0, spline_sigma=0)
    z = torch.rand(2, 7, 2) * 2 - 1
    torch.testing.assert_close(plane_map(z), z)
    torch.testing.assert_close(plane_map.bend(image()), image())


def test_the_jacobian_is_the_derivative():
    plane_map = PlaneMap.random(1, generator(3), affine_sigma=0.2, spline_sigma=0.05)
    z = torch.tensor([[[0.13, -0.41], [0.77, 0.2]]])
    found = plane_map.jacobian(z)
    for index in range(2):
        expected = torch.autograd.functional.jacobian(lambda point: plane_map(point[None, None])[0, 0], z[0, index])
        torch.testing.assert_close(found[0, index], expected, rtol=1e-4, atol=1e-5)


def test_a_spline_by_hand():
    # One control point at the origin: T(z) = z + w |z|^2 log |z|^2.
    plane_map = PlaneMap(torch.eye(2)[None], torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([[[0.5, -1.0]]]))
    z = torch.tensor([[[3.0, 4.0]]])
    bend = 25 * torch.log(torch.tensor(25.0))
    torch.testing.assert_close(plane_map(z), z + bend * torch.tensor([0.5, -1.0]))


def test_a_bent_image_shows_at_z_what_was_at_the_mapped_z():
    ramp = torch.linspace(-1, 1, 16).expand(1, 1, 16, 16)  # color = x
    plane_map = PlaneMap(
        torch.tensor([[[0.5, 0.0], [0.0, 0.5]]]), torch.tensor([[0.25, 0.0]]), torch.zeros(1, 2), torch.zeros(1, 1, 2)
    )
    torch.testing.assert_close(plane_map.bend(ramp), 0.5 * ramp + 0.25)


def test_losses_of_an_equivariant_predictor_are_zero():
    plane_map = PlaneMap.random(2, generator(5), affine_sigma=0.3, spline_sigma=0)
    bent = regions()
    jacobian = plane_map.jacobian(bent.shift)
    covar = jacobian @ bent.covar @ jacobian.transpose(-1, -2)
    # What an equivariant predictor sees before bending; its axes may have either sign.
    seen = Regions(plane_map(bent.shift), covar, -(jacobian @ bent.affine), bent.heatmap)
    assert shift_loss(seen, bent, plane_map).item() == pytest.approx(0, abs=1e-6)
    assert affine_loss(seen, bent, plane_map).item() == pytest.approx(0, abs=1e-5)


def test_losses_of_a_predictor_that_is_off_by_hand():
    identity = PlaneMap.random(2, generator(), affine_sigma=0, spline_sigma=0)
    bent = regions()
    moved = bent._replace(shift=bent.shift + torch.tensor([0.2, 0.4]))
    assert shift_loss(moved, bent, identity).item() == pytest.approx(0.3, abs=1e-6)
    # A region twice as large: affine^-1 affine' is half the identity; two of four entries are off by 1/2.
    grown = bent._replace(affine=2 * bent.affine)
    assert affine_loss(grown, bent, identity).item() == pytest.approx(0.25, abs=1e-5)
