"""Preview pictures of a training run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from lfdm_models.training.drawing import UInt8Array
from lfdm_models.training.files import write_whole

_FRAME_MS = 100


def to_pixels(frames: Tensor) -> UInt8Array:
    """(3, T, H, W) float in [0, 1] -> (T, H, W, 3) uint8, clamped and truncated."""
    values = frames.detach().float().clamp(0, 1).cpu().numpy()
    pixels: UInt8Array = (values.transpose(1, 2, 3, 0) * 255).astype(np.uint8)
    return pixels


def save_gif(path: Path, rows: list[list[Tensor]]) -> None:
    """Write clips of equal size as one GIF.

    Args:
        path: the file.
        rows: rows of clips (3, T, H, W) in [0, 1].

    Raises:
        TrainingError: the file cannot be written.
    """
    table = np.concatenate([np.concatenate([to_pixels(clip) for clip in row], axis=2) for row in rows], axis=1)
    # One palette for all frames: changing palettes make still parts flicker.
    tall = Image.fromarray(table.reshape(-1, *table.shape[2:]))
    palette = tall.quantize(255, method=Image.Quantize.MEDIANCUT)
    images = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in table]
    first, *others = images
    write_whole(
        path,
        lambda part: first.save(part, "GIF", save_all=True, append_images=others, duration=_FRAME_MS, loop=0),
    )
