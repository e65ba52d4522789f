"""Architecture of an LFDM checkpoint pair, as frozen dataclasses that check themselves.

Defaults are the published model's values (MUG). All of them can be recognized from a state dict except ``region_pad``
and ``residual_flow``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

UpsampleMode = Literal["deconv", "upconv"]


#: The longest noise schedule; the published one has 1000 steps.
MOST_TRAINING_STEPS = 100_000
#: Limits for untrusted files: more levels would halve any picture to less than a pixel; no network has wider layers.
_MOST_LEVELS, _MOST_BLOCKS, _WIDEST = 12, 256, 1 << 16


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class HourglassConfig:
    """A stack of *Down* blocks mirrored by *Up* blocks; block i has min(max, width * 2^(i+1)) channels."""

    width: int
    max_width: int = 1024
    blocks: int = 5

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a width or the number of blocks is below 1.
        """
        _require(min(self.width, self.max_width, self.blocks) >= 1, f"hourglass sizes must be positive: {self}")
        _require(
            self.blocks <= _MOST_LEVELS and max(self.width, self.max_width) <= _WIDEST,
            f"hourglass sizes must be at most {_MOST_LEVELS} blocks of {_WIDEST} channels: {self}",
        )

    def channels(self, level: int) -> int:
        """Channels after `level` Down blocks (level 0: output of an Up block at that size)."""
        channels: int = min(self.max_width, self.width * 2**level)
        return channels


@dataclass(frozen=True)
class LfaeConfig:
    """The latent flow autoencoder: generator, region predictor, background predictor.

    Attributes:
        image_channels: channels of the image (3).
        regions: number of moving regions K.
        width: channels after the generator's first conv.
        max_width: upper limit of the generator's channels.
        down_blocks: number of times the generator halves the image; the latent has H / 2^down_blocks rows.
        bottleneck_blocks: residual blocks at the deepest level.
        flow_predictor, region_predictor, bg_predictor: their hourglasses (the last has no Up blocks).
        antialias_size: side of the Gaussian kernel before flow and region predictor; it determines their scale (13 is
            1/4).
        region_pad: padding of the region predictor's last 7x7 conv: 3 for MUG, 0 for MHAD and NATOPS.
        region_temperature: softmax temperature of the region heatmaps.
    """

    image_channels: int = 3
    regions: int = 10
    width: int = 64
    max_width: int = 512
    down_blocks: int = 2
    bottleneck_blocks: int = 6
    flow_predictor: HourglassConfig = HourglassConfig(64)
    region_predictor: HourglassConfig = HourglassConfig(32)
    bg_predictor: HourglassConfig = HourglassConfig(32)
    antialias_size: int = 13
    region_pad: int = 3
    region_temperature: float = 0.1

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a size is out of range, or the anti-alias kernel has no known scale.
        """
        _require(
            min(self.image_channels, self.regions, self.width, self.max_width) >= 1, f"sizes must be positive: {self}"
        )
        _require(max(self.image_channels, self.regions, self.width, self.max_width) <= _WIDEST, f"too wide: {self}")
        _require(
            1 <= self.down_blocks <= _MOST_LEVELS and 0 <= self.bottleneck_blocks <= _MOST_BLOCKS,
            f"block counts out of range: {self}",
        )
        _require(0 <= self.region_pad <= 64, f"region_pad must be from 0 to 64, not {self.region_pad}")
        _require(self.region_temperature > 0, f"region_temperature must be above 0, not {self.region_temperature}")
        _ = self.flow_stride  # raises if the kernel belongs to no stride

    @property
    def flow_stride(self) -> int:
        """Pixels of the image per pixel of the flow (4), from the anti-alias kernel's size.

        Source: a Gaussian of sigma (s - 1) / 2 for stride s, cut at 4 sigma: size 2 round(4 sigma) + 1.
        """
        for stride in (1, 2, 4, 8, 16):
            if 2 * round(4 * (stride - 1) / 2) + 1 == self.antialias_size:
                return stride
        raise ValueError(
            f"an anti-alias kernel of side {self.antialias_size} belongs to no stride among 1, 2, 4, 8, 16"
        )

    def generator_channels(self, level: int) -> int:
        """Channels of the generator's encoder output `level` (0 at full size)."""
        channels: int = min(self.max_width, self.width * 2**level)
        return channels

    @property
    def feature_channels(self) -> int:
        """Channels of the deepest encoder output, the `feature`, which is an input of the DM."""
        return self.generator_channels(self.down_blocks)


@dataclass(frozen=True)
class DmConfig:
    """The diffusion model: a 3-D UNet over latents (B, 3, T, h, w), and its noise schedule.

    Attributes:
        width: channels of the first level.
        multipliers: width multiplier of each level.
        heads, head_width: of every attention.
        rotary_width: number of rotated channels per head (all 32).
        position_buckets: rows of the relative-position bias table.
        feature_channels: channels of the LFAE's `feature`.
        text_width: size of the text embedding.
        learned_null: whether the null embedding is a weight (NATOPS) or zeros.
        upsample: transposed conv (MUG, MHAD), or nearest x2 and a reflect-padded conv (NATOPS).
        training_steps: length of the noise schedule.
    """

    width: int = 64
    multipliers: tuple[int, ...] = (1, 2, 4, 8)
    heads: int = 8
    head_width: int = 32
    rotary_width: int = 32
    position_buckets: int = 32
    feature_channels: int = 256
    text_width: int = 768
    learned_null: bool = False
    upsample: UpsampleMode = "deconv"
    training_steps: int = 1000

    def __post_init__(self) -> None:
        """Check ranges.

        Raises:
            ValueError: a size is out of range, or not divisible as the network requires.
        """
        sizes = (self.width, self.heads, self.head_width, self.feature_channels, self.text_width, self.training_steps)
        _require(min(sizes) >= 1 and min(self.multipliers, default=0) >= 1, f"sizes must be positive: {self}")
        _require(max(*sizes, *self.multipliers) <= MOST_TRAINING_STEPS, f"sizes out of range: {self}")
        _require(len(self.multipliers) <= _MOST_LEVELS, f"at most {_MOST_LEVELS} levels, not {len(self.multipliers)}")
        _require(self.width % 8 == 0, f"width must be a multiple of 8 (group norm), not {self.width}")
        _require(
            self.position_buckets % 4 == 0 and self.position_buckets <= _WIDEST,
            f"position_buckets must be a multiple of 4, not {self.position_buckets}",
        )
        _require(
            self.rotary_width % 2 == 0 and 0 < self.rotary_width <= self.head_width,
            f"rotary_width must be even and at most head_width {self.head_width}, not {self.rotary_width}",
        )
        _require(self.upsample in ("deconv", "upconv"), f"upsample must be 'deconv' or 'upconv', not {self.upsample!r}")

    @property
    def level_widths(self) -> tuple[int, ...]:
        """Channels of each level, coarsest last."""
        return tuple(self.width * multiplier for multiplier in self.multipliers)

    @property
    def latent_divisor(self) -> int:
        """Height and width of a latent must be multiples of this number."""
        divisor: int = 2 ** (len(self.multipliers) - 1)
        return divisor


@dataclass(frozen=True)
class LfdmConfig:
    """A matching LFAE and DM.

    Attributes:
        lfae, dm: the two networks.
        residual_flow: the latent's first two channels are an offset from the identity grid.
    """

    lfae: LfaeConfig = LfaeConfig()
    dm: DmConfig = DmConfig()
    residual_flow: bool = False

    def __post_init__(self) -> None:
        """Check that LFAE and DM fit each other.

        Raises:
            ValueError: the DM expects other features than those of the LFAE.
        """
        found, expected = self.lfae.feature_channels, self.dm.feature_channels
        _require(found == expected, f"the LFAE gives features of {found} channels, the DM expects {expected}")
        stride = 2**self.lfae.down_blocks
        _require(
            self.lfae.flow_stride == stride,
            f"the LFAE's features are the image / {stride}, its flow the image / {self.lfae.flow_stride}; "
            "the DM needs them equal",
        )

    def latent_size(self, image_size: int) -> int:
        """Rows (and columns) of the latent for an image with sides of `image_size` pixels.

        Raises:
            ValueError: the networks do not support that size.
        """
        divisor = 2**self.lfae.down_blocks * self.dm.latent_divisor
        hourglasses = (self.lfae.flow_predictor, self.lfae.region_predictor)
        divisor = max(divisor, self.lfae.flow_stride * 2 ** max(h.blocks for h in hourglasses))
        _require(
            image_size >= divisor and image_size % divisor == 0,
            f"image_size must be a multiple of {divisor} for this model, not {image_size}",
        )
        latent_size: int = image_size // 2**self.lfae.down_blocks
        return latent_size
