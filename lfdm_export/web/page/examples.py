"""Photographs for who has none at hand: drawn characters, which no training has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lfdm_models.training.procedural import HELD_OUT_SEEDS, clip_parts, render

# Of the first two dozen, some that differ much.
_SEEDS = (0, 3, 10, 19)
_SIZE = 256


def draw_examples(folder: Path) -> list[Path]:
    """Draw some pictures into a folder."""
    found = []
    for index, number in enumerate(_SEEDS):
        character, motion = clip_parts(HELD_OUT_SEEDS[number])
        found.append(folder / f"character{index + 1}.png")
        Image.fromarray(render(character, motion, np.zeros(1), _SIZE)[0]).save(found[-1])
    return found
