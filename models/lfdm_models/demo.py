"""The small models in this package.

`SHIPPED` is the folder of a trained model: procedural characters that smile, nod, wave, … as a label says. Its model
card is in the same folder. `lfdm_export.checkpoints.model_folder.load_model_folder` loads it.

`untrained_model` makes a model with untrained weights, for tests and measurements, which shows only that everything
runs. To make that visible, a few weights are set by hand: a clip is the photograph itself, moved slightly by the
response of the other, random weights to label and noise.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from lfdm_models.config import DmConfig, HourglassConfig, LfaeConfig, LfdmConfig
from lfdm_models.diffusion import Diffusion
from lfdm_models.labels import MUG
from lfdm_models.layers import UpBlock
from lfdm_models.lfae import Lfae
from lfdm_models.model import LfdmModel
from lfdm_models.unet import LATENT_CHANNELS, ResBlock

#: The trained model's folder.
SHIPPED = Path(__file__).parent / "weights" / "characters64"

#: For images with sides of 64 pixels and more, in steps of 32.
CONFIG = LfdmConfig(
    LfaeConfig(
        regions=4,
        width=16,
        max_width=64,
        bottleneck_blocks=2,
        flow_predictor=HourglassConfig(16, max_width=64, blocks=3),
        region_predictor=HourglassConfig(16, max_width=64, blocks=3),
        bg_predictor=HourglassConfig(16, max_width=64, blocks=3),
    ),
    DmConfig(width=16, multipliers=(1, 2, 4), heads=4, head_width=16, rotary_width=16, feature_channels=64),
    # The latent is an offset from the identity, so that a latent near 0 moves little.
    residual_flow=True,
)

# Share of the random weights' response in the predicted noise.
_WOBBLE = 0.25


def untrained_model(seed: int = 0) -> LfdmModel:
    """Make the small untrained model; its labels are MUG's, with random embeddings instead of a text encoder's.

    Args:
        seed: seed of all weights and embeddings; the global random state does not change.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        lfae, diffusion = Lfae(CONFIG.lfae), Diffusion(CONFIG.dm)
        _calm_regions(lfae)
        _show_the_image(lfae)
        _predict_the_noise(diffusion)
    rows = np.random.default_rng(seed).standard_normal((len(MUG), CONFIG.dm.text_width), dtype=np.float32)
    return LfdmModel(
        CONFIG,
        lfae.eval().requires_grad_(False),
        diffusion.eval().requires_grad_(False),
        provenance={"trained": False, "made_by": "lfdm_models.demo", "seed": seed},
        label_embeddings=dict(zip(MUG, rows, strict=True)),
    )


def _calm_regions(lfae: Lfae) -> None:
    """Make regions broad and the background static: random regions would be points with a singular covariance."""
    lfae.region_predictor.regions.weight.mul_(0.1)
    lfae.bg_predictor.fc.weight.mul_(0.02)
    lfae.bg_predictor.fc.bias.copy_(torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0]))


def _show_the_image(lfae: Lfae) -> None:
    """Pass the image's colors around the decoder in the first channels.

    At an occlusion of 1/2, the last conv receives half of a color x; sigmoid(8 (x/2 - 1/4)) is near x.
    """
    generator = lfae.generator
    colors = lfae.config.image_channels
    for color in range(colors):
        _set_tap(generator.first.conv, color, color, 1.0)
    # Other channels: the decoder's output with a small weight, and nothing that replaces the colors.
    last_up = generator.up_blocks[-1]
    assert isinstance(last_up, UpBlock)
    last_up.norm.weight[:colors] = 0.0
    final = generator.final.weight
    final *= 0.5
    final[:, :colors] = 0.0
    for color in range(colors):
        final[(color, color, *(size // 2 for size in final.shape[2:]))] = 8.0
    generator.final.bias.fill_(-2.0)  # type: ignore[union-attr]


def _predict_the_noise(diffusion: Diffusion) -> None:
    """Let the UNet predict noise that gives an x0 near 0: the noisy latent over its own root mean square.

    Group norm computes this for a pair of channels (x, -x), and SiLU keeps it: silu(y) - silu(-y) = y.
    """
    unet = diffusion.denoise_fn
    width = unet.config.width
    for channel in range(LATENT_CHANNELS):  # through the first conv, whose output is concatenated at the end
        _set_tap(unet.init_conv, channel, channel, 1.0)
    for head, channels in ((unet.final_conv, (0, 1)), (unet.occlusion_map, (2,))):
        block, last = head
        assert isinstance(block, ResBlock)
        assert isinstance(last, nn.Conv3d)
        last.weight *= _WOBBLE
        nn.init.zeros_(cast(Tensor, last.bias))
        for index, channel in enumerate(channels):
            pair = plus, minus = 2 * index, 2 * index + 1  # one of the 8 groups, of 2 channels
            for out, sign in zip(pair, (1.0, -1.0), strict=True):
                _set_tap(block.block1.proj, out, width + channel, sign)
                _set_tap(block.block2.proj, out, plus, sign)
                block.block2.proj.weight[out, minus, 0, 1, 1] = -sign
                _set_tap(block.res_conv, out, 0, 0.0)
            # This output is the pair's difference; the other outputs do not use the pair.
            last.weight[:, [plus, minus]] = 0.0
            last.weight[index, plus], last.weight[index, minus] = 1.0, -1.0


def _set_tap(conv: nn.Module, out: int, channel: int, value: float, *, bias: float = 0.0) -> None:
    """Make output `out` equal to `value` times one input channel, at the kernel's center, plus `bias`."""
    assert isinstance(conv, nn.Conv2d | nn.Conv3d)
    assert conv.bias is not None
    conv.weight[out] = 0.0
    conv.weight[(out, channel, *(size // 2 for size in conv.weight.shape[2:]))] = value
    conv.bias[out] = bias
