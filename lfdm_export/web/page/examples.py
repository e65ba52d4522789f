"""Example photographs: drawn characters that were not used in training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from lfdm_models.training.procedural import HELD_OUT_SEEDS, clip_parts, render

# Four of the first 24, chosen because they differ much.
_SEEDS = (0, 3, 10, 19)
_SIZE = 256


def draw_examples(folder: Path) -> list[Path]:
    """Draw the examples into a folder, and return their paths."""
    found = []
    for index, number in enumerate(_SEEDS):
        character, motion = clip_parts(HELD_OUT_SEEDS[number])
        found.append(folder / f"character{index + 1}.png")
        Image.fromarray(render(character, motion, np.zeros(1), _SIZE)[0]).save(found[-1])
    return found
