"""The LFAE rewritten for inference: batch norm folded, one source for many frames, de-interleaved up-sampling."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lfdm_export.ops.cuda.dispatch import on_gpu
from lfdm_export.ops.final_conv import gpu as final_conv
from lfdm_export.ops.final_conv.reference import lay_out_kernel
from lfdm_export.ops.warp.reference import warp, warp_blend
from lfdm_export.rewrite.convolution import PHASES, fold_batch_norm, interleave, phase_convs, phase_kernels
from lfdm_models.layers import DownBlock, ResidualBlock, SameBlock, UpBlock, coordinate_grid
from lfdm_models.lfae import Lfae


def fold_batch_norms(lfae: Lfae) -> Lfae:
    """A copy of the LFAE with batch norms after a convolution folded into it.

    The first norm of a residual block follows an addition and stays.
    """
    folded = copy.deepcopy(lfae)
    for block in folded.modules():
        if isinstance(block, SameBlock | DownBlock | UpBlock):
            block.conv = fold_batch_norm(block.conv, block.norm)
            block.norm = nn.Identity()  # type: ignore[assignment]
        elif isinstance(block, ResidualBlock):
            block.conv1 = fold_batch_norm(block.conv1, block.norm2)
            block.norm2 = nn.Identity()  # type: ignore[assignment]
    return folded


def dephase_kernel(weight: Tensor) -> Tensor:
    """An odd, same-padded kernel (out, in, k, k) as a kernel on the four phases of its input and output.

    Input channels are (phase, channel), output channels are (channel, phase), as `pixel_shuffle` reads them.
    Full-size row 2i + q + d, d in -k // 2 .. k // 2, is row i + floor((q + d) / 2) of phase (q + d) mod 2.
    """
    out_channels, in_channels, size, _ = weight.shape
    reach = size // 2
    radius = (reach + 1) // 2
    side = 2 * radius + 1
    dephased = weight.new_zeros(out_channels, 2, 2, 2, 2, in_channels, side, side)
    for qy, qx in PHASES:
        for dy in range(-reach, reach + 1):
            for dx in range(-reach, reach + 1):
                row, ry = divmod(qy + dy, 2)
                column, rx = divmod(qx + dx, 2)
                dephased[:, qy, qx, ry, rx, :, row + radius, column + radius] += weight[:, :, dy + reach, dx + reach]
    return dephased.reshape(4 * out_channels, 4 * in_channels, side, side)


def conv_in_columns(phases: list[Tensor], dephased: Tensor, bias: Tensor, size: int) -> Tensor:
    """`dephase_kernel`'s convolution as few, wide products: each column of the kernel has its own outputs.

    A kernel with few outputs does not fill a GPU's matrix units: the published decoder's 7x7 from 64 channels to 3
    takes 135 us this way and 321 us as one convolution of all phases (40 frames in float16, compiled, NVIDIA H200;
    benchmarks/results/gpu/2026-11-27-h200-c). Here, a convolution down the columns of the phases gives 2·out·size maps,
    for both rows of phases. Column 2j + q of the result is the sum of `size` shifted maps: column d of the kernel is
    applied to the map's column 2j + q + d, which is column j + floor((q + d) / 2) of the phases (q + d) mod 2.

    Args:
        phases: four (N, in, h, w).
        dephased: from `dephase_kernel`, (4·out, 4·in, s, s).
        bias: (out,).
        size: size of the kernel before `dephase_kernel`.

    Returns:
        The whole map, (N, out, 2h, 2w) float32; float64 for float64 inputs.
    """
    channels, (outputs, side) = phases[0].shape[1], (len(bias), dephased.shape[-1])
    reach, radius = size // 2, side // 2
    # As (out, row and column of the output's phase, row and column of the input's, in, row, column). Of the output's
    # column phases, one is enough: it has every tap of the kernel, in order by column and column of the input's phase.
    taps = dephased.reshape(outputs, 2, 2, 2, 2, channels, side, side)[:, :, 0]
    taps = taps.permute(1, 0, 6, 3, 2, 4, 5).flatten(2, 3)[:, :, 2 * radius - reach :][:, :, :size]
    kernel = taps.reshape(2 * outputs * size, 2 * channels, side, 1)
    # Padded to a multiple of 16 outputs; without it, no fast kernel is used.
    kernel = F.pad(kernel, (0, 0, 0, 0, 0, 0, 0, -len(kernel) % 16)).contiguous(memory_format=torch.channels_last)
    columns = [torch.cat([phases[column], phases[2 + column]], dim=1) for column in range(2)]
    parts = F.conv2d(torch.cat(columns), kernel, padding=(radius, 0))[:, : 2 * outputs * size]
    width = parts.shape[-1]
    wide = parts.unflatten(1, (2, outputs, size)).to(torch.promote_types(parts.dtype, torch.float32))
    padded = F.pad(wide, (radius, radius)).unflatten(0, (2, -1))
    pixels = []
    for column in range(2):
        total = bias.to(padded.dtype)[:, None, None]
        for shift in range(-reach, reach + 1):
            place, phase = divmod(column + shift, 2)
            start = place + radius
            total = total + padded[phase, :, :, :, shift + reach, :, start : start + width]
        pixels.append(total)
    # (N, row of phases, out, h, w, column of phases)
    return torch.stack(pixels, dim=-1).permute(0, 2, 3, 1, 4, 5).flatten(4, 5).flatten(2, 3)


class PhasedUp(nn.Module):
    """An Up block (its norm folded) as four low-resolution convolutions; returns the four phases."""

    kernels: Tensor
    bias: Tensor

    def __init__(self, block: UpBlock) -> None:
        super().__init__()
        assert block.conv.bias is not None
        self.register_buffer("kernels", phase_kernels(block.conv.weight.detach()))
        self.register_buffer("bias", block.conv.bias.detach())

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, in, h, w) -> four (N, out, h, w)."""
        return [F.relu(phase) for phase in phase_convs(x, self.kernels, self.bias)]


class Decode(nn.Module):
    """Skips and latents of a chunk of frames -> frames and warped images.

    The last Up block's output stays de-interleaved: it is blended phase by phase, and the final convolution reads and
    writes phases. Only the picture itself is interleaved.
    """

    final: Tensor
    final_bias: Tensor
    laid_out: Tensor
    laid_out_bias: Tensor

    def __init__(self, folded: Lfae, *, residual_flow: bool) -> None:
        super().__init__()
        generator = folded.generator
        self.residual_flow = residual_flow
        self.bottleneck = generator.bottleneck
        self.ups = nn.ModuleList(PhasedUp(block) for block in generator.up_blocks)  # type: ignore[arg-type]
        assert generator.final.bias is not None
        self.final_size = generator.final.weight.shape[-1]
        self.register_buffer("final", dephase_kernel(generator.final.weight.detach()))
        self.register_buffer("final_bias", generator.final.bias.detach().repeat_interleave(4))
        # The same for the kernel on a GPU.
        self.register_buffer("laid_out", lay_out_kernel(generator.final.weight.detach()))
        self.register_buffer("laid_out_bias", generator.final.bias.detach().clone())

    def forward(self, image: Tensor, *skips_and_latent: Tensor) -> tuple[Tensor, Tensor]:
        """Decode F frames of each sample.

        Args:
            image: (B, 3, H, W) in [0, 1].
            skips_and_latent: encoder outputs, full size first, `feature` last; then the latent (B, 3, F, h, w).
                In lower precision, the encoder outputs have the weights' dtype; image and latent stay float32.

        Returns:
            frames and warped images, (B, 3, F, H, W) each, in [0, 1], with the image's dtype.
        """
        *skips, latent = skips_and_latent
        batch, _, frames, _, _ = latent.shape
        motion = self.motion(latent)
        occlusion = motion[:, 2:3].to(skips[-1].dtype)
        visible = warp(skips[-1], motion) * occlusion
        out = self.bottleneck(visible)
        out = visible + out * (1 - occlusion)
        for skip, up in zip(reversed(skips[1:-1]), self.ups, strict=False):
            out = warp_blend(skip, motion, interleave(up(out)))
        phases = self.ups[-1](out)
        blended = [
            warp_blend(skips[0], motion, x, stride=2, phase=phase) for x, phase in zip(phases, PHASES, strict=True)
        ]
        if final_conv.suits(blended[0], self.laid_out):
            picture = final_conv.final_conv_on_gpu(blended, self.laid_out, self.laid_out_bias).to(image.dtype)
        elif on_gpu(blended[0]):
            final = conv_in_columns(blended, self.final, self.laid_out_bias, self.final_size)
            # Three channels are blended fastest in planar layout, the layout of the image.
            picture = torch.sigmoid(final.to(image.dtype)).contiguous()
        else:
            final = F.conv2d(torch.cat(blended, dim=1), self.final, self.final_bias, padding=self.final.shape[-1] // 2)
            picture = F.pixel_shuffle(torch.sigmoid(final.to(image.dtype)), 2)
        decoded = warp_blend(image, motion, picture), warp(image, motion)
        first, second = (t.view(batch, frames, *t.shape[1:]).transpose(1, 2).contiguous() for t in decoded)
        return first, second

    def motion(self, latent: Tensor) -> Tensor:
        """(B, 3, F, h, w) latent -> (B·F, 3, h, w): sampling grid x, y, and occlusion in [0, 1]."""
        planes = latent.transpose(1, 2).flatten(0, 1)
        grid = planes[:, :2]
        if self.residual_flow:
            grid = grid + coordinate_grid(grid.shape[2], grid.shape[3], grid).permute(2, 0, 1)
        return torch.cat([grid, (planes[:, 2:3] + 1) / 2], dim=1)
