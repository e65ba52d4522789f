"""Equivariance of the region predictor: a deformed image must give regions deformed in the same way.

With T a smooth map of the plane and D'(z) = D(T(z)), the content at T(z) in D is at z in D'. So for regions
(shift, affine) of D and (shift', affine') of D', with J the Jacobian of T:

    shift = T(shift')        affine = J(shift') affine'   (up to the sign of a region's axes)

Source: Siarohin et al., Motion Representations for Articulated Animation (arXiv 2104.11280), Sec. 3.4;
thin-plate splines: Bookstein, Principal Warps (IEEE TPAMI 1989).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lfdm_models.generator import inverse_2x2
from lfdm_models.layers import coordinate_grid
from lfdm_models.regions import Regions

AFFINE_SIGMA, SPLINE_SIGMA, CONTROL_POINTS = 0.05, 0.005, 5
# Keeps the logarithm finite at control points.
_TINY = 1e-12


@dataclass(frozen=True)
class PlaneMap:
    """T(z) = linear z + offset + sum of weight_i U(|z - point_i|), with U(r) = r^2 log r^2.

    Attributes:
        linear: (B, 2, 2).
        offset: (B, 2).
        points: control points (P, 2) in [-1, 1].
        weights: (B, P, 2).
    """

    linear: Tensor
    offset: Tensor
    points: Tensor
    weights: Tensor

    @classmethod
    def random(
        cls,
        batch: int,
        generator: torch.Generator,
        *,
        affine_sigma: float = AFFINE_SIGMA,
        spline_sigma: float = SPLINE_SIGMA,
        control_points: int = CONTROL_POINTS,
    ) -> PlaneMap:
        """Random maps near the identity, one per image, on the generator's device."""
        device = generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device)

        linear = torch.eye(2, device=device) + affine_sigma * normal(batch, 2, 2)
        points = coordinate_grid(control_points, control_points, linear).reshape(-1, 2)
        return cls(linear, affine_sigma * normal(batch, 2), points, spline_sigma * normal(batch, control_points**2, 2))

    def __call__(self, z: Tensor) -> Tensor:
        """Points (B, N, 2) -> (B, N, 2)."""
        squared = self._offsets(z).square().sum(dim=-1)
        bend = squared * torch.log(squared + _TINY)
        return z @ self.linear.transpose(1, 2) + self.offset[:, None] + bend @ self.weights

    def jacobian(self, z: Tensor) -> Tensor:
        """Derivatives (B, N, 2, 2) at points (B, N, 2); rows are components of T."""
        offsets = self._offsets(z)
        squared = offsets.square().sum(dim=-1)
        # d/dz of s log(s + tiny), s = |z - point|^2
        slope = 2 * (torch.log(squared + _TINY) + squared / (squared + _TINY))
        bend = torch.einsum("bnp,bpi,bnpj->bnij", slope, self.weights, offsets)
        return self.linear[:, None] + bend

    def bend(self, image: Tensor) -> Tensor:
        """D'(z) = D(T(z)) for D (B, C, H, W), with reflection beyond the border."""
        batch, _, height, width = image.shape
        grid = coordinate_grid(height, width, image).reshape(1, -1, 2).expand(batch, -1, -1)
        moved = self(grid).view(batch, height, width, 2)
        return F.grid_sample(image, moved, mode="bilinear", padding_mode="reflection", align_corners=True)

    def _offsets(self, z: Tensor) -> Tensor:
        return z[:, :, None] - self.points[None, None]


def shift_loss(regions: Regions, bent: Regions, plane_map: PlaneMap) -> Tensor:
    """Mean absolute difference between the regions' centers and the mapped centers of the deformed image's regions."""
    return (regions.shift - plane_map(bent.shift)).abs().mean()


def affine_loss(regions: Regions, bent: Regions, plane_map: PlaneMap) -> Tensor:
    """Mean absolute difference between affine^-1 J affine' and the identity; the sign of the axes is free."""
    value = inverse_2x2(regions.affine) @ plane_map.jacobian(bent.shift) @ bent.affine
    value = value * torch.sign(value[..., :1, :1])
    return (torch.eye(2, dtype=value.dtype, device=value.device) - value).abs().mean()
