"""Rotary tables and position bias in the memory layout of the kernel: a warp reads contiguous values.

Lane 4 g + t of a warp has row g of a tile of 8 rows. Source: `kernel.cuh`; layouts of mma.m16n8k16 in the PTX ISA.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lfdm_export.ops.temporal_attention.kernels import TILE

_LANES = 32


def lay_out_turns(cos: Tensor, sin: Tensor, head_width: int) -> Tensor:
    """The cosines and sines by which each lane rotates its pairs of channels.

    Args:
        cos: rotary table (T, R / 2), for interleaved pairs; channels from R on pass unchanged.
        sin: likewise.
        head_width: D, a multiple of 16.

    Returns:
        (tiles of 8 frames, D / 16, 32 lanes, 4) float32: two cosines and sines, c0, s0, c1, s1.
    """
    frames, turned = cos.shape
    rows = -(-frames // TILE) * TILE
    beyond = (0, head_width // 2 - turned, 0, rows - frames)
    table = torch.stack([F.pad(cos.float(), beyond, value=1.0), F.pad(sin.float(), beyond)], dim=-1)
    registers = head_width // 8
    moved = min(4, registers)
    lane, register = torch.arange(_LANES)[:, None], torch.arange(registers)
    pair = (4 * (register // moved) + lane % 4) * moved + register % moved  # of channels 2 pair and 2 pair + 1
    row = torch.arange(0, rows, TILE)[:, None, None] + lane // 4
    by_lane = table[row, pair]  # (tiles, lanes, registers, 2)
    laid_out: Tensor = by_lane.unflatten(2, (-1, 2)).transpose(1, 2).flatten(3).contiguous()
    return laid_out


def lay_out_bias(bias: Tensor) -> Tensor:
    """The bias that each lane adds to its logits, to base 2; -infinity for keys that do not exist.

    Args:
        bias: (H, T, T), [query, key].

    Returns:
        (H, tiles of 16 queries, tiles of 8 keys, 32 lanes, 4) float32.
    """
    frames = bias.shape[-1]
    keys, queries = -(-frames // TILE) * TILE, -(-frames // (2 * TILE)) * 2 * TILE
    table = F.pad(bias.double() / math.log(2), (0, keys - frames), value=-math.inf)
    table = F.pad(table, (0, 0, 0, queries - frames)).float()
    lane, element = torch.arange(_LANES)[:, None], torch.arange(4)
    query = torch.arange(0, queries, 2 * TILE)[:, None, None, None] + lane // 4 + element // 2 * TILE
    key = torch.arange(0, keys, TILE)[:, None, None] + lane % 4 * 2 + element % 2
    return table[:, query, key].contiguous()
