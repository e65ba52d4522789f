"""Recognize the architecture of an LFDM checkpoint from the keys and shapes of its state dicts.

Each number is read from all tensors that show it, and the majority counts. A single tensor that is missing or has a
wrong shape is therefore found and named by the strict comparison that follows.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import NamedTuple

from lfdm_export.errors import CheckpointError
from lfdm_models.config import DmConfig, HourglassConfig, LfaeConfig, UpsampleMode
from lfdm_models.schedule import Schedule

Shapes = Mapping[str, tuple[int, ...]]

#: Channels of the noisy latent, which the UNet's first conv takes together with the feature.
_LATENT_CHANNELS = 3
#: Maximum per list. The published networks have at most 6; building a module takes a millisecond.
_MOST_MODULES = 256
_NORM = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")


class _Witness(NamedTuple):
    """A tensor that shows a number: the size of that axis, minus `extra`."""

    key: str
    axis: int
    extra: int = 0


def recognize_lfae(shapes: Shapes, where: str, *, region_pad: int) -> LfaeConfig:
    """The LFAE's architecture.

    Args:
        shapes: shapes of the tensors under ``generator.``, ``region_predictor.`` and ``bg_predictor.``.
        where: name of the checkpoint, for messages.
        region_pad: padding of the region predictor's last conv, which weights do not show.

    Raises:
        CheckpointError: the keys and shapes do not form an LFAE.
    """
    seen = _Seen(shapes, where)
    generator, flow = "generator", "generator.pixelwise_flow_predictor"
    width = seen.number("the generator's width", _conv(f"{generator}.first"))
    down = [f"{generator}.down_blocks.{i}" for i in range(seen.count(f"{generator}.down_blocks."))]
    levels = [width, *(seen.number(f"the width of {block}", _conv(block)) for block in down)]
    max_width = seen.cap(levels, [f"{generator}.first", *down], LfaeConfig.max_width)
    affine = seen.number("the background's motion", _axis(0, "bg_predictor.fc.weight", "bg_predictor.fc.bias"))
    if affine != 6:
        raise CheckpointError(
            f"{where}: the background predictor gives {affine} numbers (bg_predictor.fc), "
            "expected the 6 of an affine motion; other background models are not supported"
        )
    kernels = f"{flow}.down.weight", "region_predictor.down.weight"
    images = _axis(0, f"{generator}.final.weight", f"{generator}.final.bias", *kernels)
    images.append(_Witness(f"{generator}.first.conv.weight", 1))
    regions = _axis(0, "region_predictor.regions.weight", "region_predictor.regions.bias")
    regions += [_Witness(f"{flow}.mask.{leaf}", 0, extra=1) for leaf in ("weight", "bias")]  # one more: the background
    try:
        return LfaeConfig(
            image_channels=seen.number("the number of image channels", images),
            regions=seen.number("the number of regions", regions),
            width=width,
            max_width=max_width,
            down_blocks=len(down),
            bottleneck_blocks=seen.count(f"{generator}.bottleneck.r", least=0),
            flow_predictor=_hourglass(seen, f"{flow}.hourglass."),
            region_predictor=_hourglass(seen, "region_predictor.predictor."),
            bg_predictor=_hourglass(seen, "bg_predictor.", decoder=False),
            antialias_size=seen.number("the anti-alias kernel's size", _axis(2, *kernels) + _axis(3, *kernels)),
            region_pad=region_pad,
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: these shapes form no LFAE: {error}") from error


def recognize_dm(shapes: Shapes, where: str) -> DmConfig:
    """The diffusion model's architecture.

    Args:
        shapes: shapes of the tensors under ``diffusion.``.
        where: name of the checkpoint, for messages.

    Raises:
        CheckpointError: the keys and shapes do not form an LFDM diffusion model.
    """
    seen = _Seen(shapes, where)
    unet = "diffusion.denoise_fn"
    widths = _axis(0, f"{unet}.init_conv.weight", f"{unet}.init_conv.bias")
    widths += _axis(1, f"{unet}.init_temporal_attn.fn.norm.gamma", f"{unet}.time_mlp.1.weight")
    widths += _axis(1, f"{unet}.final_conv.1.weight", f"{unet}.occlusion_map.1.weight")
    width = seen.number("the UNet's width", widths)
    levels = seen.count(f"{unet}.downs.")
    multipliers = [_multiplier(seen, f"{unet}.downs.{i}", width) for i in range(levels)]
    blocks = [f"{unet}.downs.{i}.{j}" for i in range(levels) for j in (0, 1)]
    condition = seen.number("the condition's width", _axis(1, *(f"{block}.mlp.1.weight" for block in blocks)))
    temporal = [f"{unet}.init_temporal_attn", *(f"{unet}.downs.{i}.3" for i in range(levels))]
    attentions = [f"{residual}.fn.fn.fn" for residual in temporal]
    inner = seen.number("the attention's width", _axis(1, *(f"{a}.to_out.weight" for a in attentions)))
    table = f"{unet}.time_rel_pos_bias.relative_attention_bias.weight"
    heads = seen.number("the number of heads", _axis(1, table))
    frequencies = _axis(0, *(f"{attention}.rotary_emb.freqs" for attention in attentions))
    inputs = _axis(1, f"{unet}.init_conv.weight")
    buffers = _axis(0, *(f"diffusion.{field.name}" for field in fields(Schedule)))
    if heads < 1 or inner % heads:
        raise CheckpointError(
            f"{where}: {table} has {heads} heads, which do not divide the {inner} channels of attention"
        )
    try:
        return DmConfig(
            width=width,
            multipliers=tuple(multipliers),
            heads=heads,
            head_width=inner // heads,
            rotary_width=2 * seen.number("the number of rotary frequencies", frequencies),
            position_buckets=seen.number("the number of position buckets", _axis(0, table)),
            feature_channels=seen.number("the number of feature channels", inputs) - _LATENT_CHANNELS,
            text_width=condition - 4 * width,
            learned_null=f"{unet}.null_cond_emb" in shapes,
            upsample=_upsample(shapes, unet, levels),
            training_steps=seen.number("the schedule's length", buffers),
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: these shapes form no DM: {error}") from error


class _Seen:
    """The shapes of one checkpoint, with the queries of the recognition."""

    def __init__(self, shapes: Shapes, where: str) -> None:
        self.shapes, self.where = shapes, where

    def number(self, what: str, witnesses: Sequence[_Witness]) -> int:
        """The number that most witnesses show; on a tie, the first one's."""
        sizes = []
        for key, axis, extra in witnesses:
            shape = self.shapes.get(key, ())
            if len(shape) > axis:
                sizes.append(shape[axis] - extra)
        if not sizes:
            key = witnesses[0].key
            state = f"is a tensor of shape {list(self.shapes[key])}" if key in self.shapes else "is missing"
            raise CheckpointError(f"{self.where}: {key} {state}, so {what} is unknown; the file is incomplete")
        return Counter(sizes).most_common(1)[0][0]

    def count(self, prefix: str, least: int = 1) -> int:
        """Number of modules under a prefix, which are numbered from 0."""
        pattern = re.compile(re.escape(prefix) + r"(\d{1,4})\.")
        found = {int(match[1]) for key in self.shapes if (match := pattern.match(key))}
        if len(found) > _MOST_MODULES:
            raise CheckpointError(
                f"{self.where}: there are {len(found)} modules {prefix}*, expected at most {_MOST_MODULES}; "
                "the file is damaged or of another model"
            )
        absent = next((i for i in range(max(len(found), least)) if i not in found), None)
        if absent is not None:
            there = f", although {prefix}{max(found)}.* is there" if found else ""
            raise CheckpointError(
                f"{self.where}: all keys {prefix}{absent}.* are missing{there}; "
                "the file is incomplete or of another model"
            )
        return len(found)

    def cap(self, levels: Sequence[int], names: Sequence[str], default: int) -> int:
        """The cap under which widths double from level to level; `default` if it gives the same widths.

        Raises:
            CheckpointError: no cap gives these widths.
        """
        for cap in (default, levels[-1]):
            expected = [min(cap, levels[0] << i) for i in range(len(levels))]
            if expected == list(levels):
                return cap
        wrong = next(i for i, width in enumerate(expected) if width != levels[i])
        raise CheckpointError(
            f"{self.where}: {names[wrong]} gives {levels[wrong]} channels, expected {expected[wrong]}: twice as many "
            f"on each level from the {levels[0]} of {names[0]}, but at most the {levels[-1]} of {names[-1]}"
        )


def _axis(axis: int, *keys: str) -> list[_Witness]:
    return [_Witness(key, axis) for key in keys]


def _conv(block: str) -> list[_Witness]:
    """All tensors that show the output channels of a block of conv and batch norm."""
    return _axis(0, *(f"{block}.{leaf}" for leaf in ("conv.weight", "conv.bias", *_NORM)))


def _hourglass(seen: _Seen, prefix: str, *, decoder: bool = True) -> HourglassConfig:
    encoder = f"{prefix}encoder.down_blocks."
    blocks = seen.count(encoder)
    names = [f"{encoder}{i}" for i in range(blocks)]
    levels = [seen.number(f"the width of {name}", _conv(name)) for name in names]
    if decoder:
        last = f"{prefix}decoder.up_blocks.{blocks - 1}"
        width = seen.number(f"the width of {last}", _conv(last))
    else:
        # Without Up blocks, the first level's width is known only doubled; if that is odd, the cap limited it.
        last = names[0]
        width = levels[0] // 2 if levels[0] % 2 == 0 else levels[0]
    return HourglassConfig(width, seen.cap([width, *levels], [last, *names], HourglassConfig.max_width), blocks)


def _multiplier(seen: _Seen, level: str, width: int) -> int:
    leaves = ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
    blocks = [f"{level}.{i}.{block}" for i in (0, 1) for block in ("block1", "block2")]
    keys = [f"{block}.{leaf}" for block in blocks for leaf in leaves]
    channels = seen.number(f"the width of {level}", _axis(0, *keys))
    if width < 1 or channels % width:
        raise CheckpointError(
            f"{seen.where}: {level} has {channels} channels, expected a multiple of the first {width}"
        )
    return channels // width


def _upsample(shapes: Shapes, unet: str, levels: int) -> UpsampleMode:
    """From the keys: a transposed conv is the module itself, an up-conv is second in a sequence."""
    leaves: Iterable[str] = ("weight", "bias")
    ups = [f"{unet}.ups.{i}.4" for i in range(levels - 1)]
    deconv = sum(f"{up}.{leaf}" in shapes for up in ups for leaf in leaves)
    upconv = sum(f"{up}.1.{leaf}" in shapes for up in ups for leaf in leaves)
    return "upconv" if upconv > deconv else "deconv"
