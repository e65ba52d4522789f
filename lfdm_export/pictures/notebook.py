"""A clip as HTML, for notebooks."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lfdm_export.pictures.gif import encode_gif

#: Maximum pixels of all frames shown; a GIF takes at most about one byte per pixel.
PIXELS = 3_000_000


def clips_html(clips: npt.NDArray[np.uint8], captions: Sequence[str], *, fps: float = 10.0) -> str:
    """Animated GIFs side by side, embedded in the HTML, for as many clips as `PIXELS` allows.

    Of a clip that alone has more than `PIXELS` pixels, frames are dropped at equal distances.

    Args:
        clips: (B, T, H, W, 3).
        captions: one per clip; escaped here.
        fps: frames per second.
    """
    pixels = math.prod(clips.shape[1:4])
    every = math.ceil(pixels / PIXELS)
    room = max(1, PIXELS // pixels)
    figures = []
    for frames, caption in zip(clips[:room, ::every], captions[:room], strict=True):
        data = base64.b64encode(encode_gif(np.ascontiguousarray(frames), fps / every)).decode("ascii")
        text, (height, width) = html.escape(caption), frames.shape[1:3]
        figures.append(
            '<figure style="display:inline-block;margin:4px">'
            f'<img src="data:image/gif;base64,{data}" width="{width}" height="{height}" alt="{text}">'
            f"<figcaption>{text}</figcaption></figure>"
        )
    if len(clips) > room:
        figures.append(f"<p>+ {len(clips) - room} more</p>")
    return f"<div>{''.join(figures)}</div>"
