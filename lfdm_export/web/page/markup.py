"""The HTML that the page shows beside its form: the progress of a clip, and the clip."""

from __future__ import annotations

import base64
import html

from lfdm_export.pictures.clip import DEFAULT_FPS
from lfdm_export.pictures.gif import encode_gif
from lfdm_export.pictures.panels import TITLES
from lfdm_export.stages import DRIVE_STAGE
from lfdm_export.web.page.shelf import Kept
from lfdm_export.web.page.watch import Preview, Waiting, Working
from lfdm_export.wording import count

#: The path of the clips' files, below the page.
CLIPS = "clips"
_STAGES = {DRIVE_STAGE: "estimate motion"}
_LINKS = {
    "clip.gif": "GIF",
    "clip.mp4": "MP4",
    "clip.motion": "Motion",
    "panels.mp4": "Panels",
}


def status(event: Waiting | Working | Preview) -> str:
    """The progress of a clip. A preview also says which step is done."""
    if isinstance(event, Waiting):
        return _bar(f"waiting: {count(event.before, 'clip')} ahead in the queue", None)
    if isinstance(event, Preview):
        return _bar(f"denoise {event.step} of {event.steps}", event.step / event.steps)
    stage = _STAGES.get(event.stage, event.stage)
    if event.total == 1:
        return _bar(stage, None)
    return _bar(f"{stage} {event.done} of {event.total}", event.done / event.total)


def starting() -> str:
    """The status after a clip is requested."""
    return _bar("starting", None)


def failure(why: str) -> str:
    """The reason of a failure."""
    return f'<p class="lfdm-error" role="alert">{html.escape(why)}</p>'


def said(text: str) -> str:
    """A line of text as status."""
    return f'<p role="status">{html.escape(text)}</p>'


def preview(event: Preview, size: int) -> str:
    """A preview, as an animated picture.

    Args:
        event: the preview.
        size: rows and columns of a frame.
    """
    # Slower than the clip, because a preview has only some of its frames.
    data = base64.b64encode(encode_gif(event.frames, DEFAULT_FPS / 2)).decode("ascii")
    text = f"preview after step {event.step} of {event.steps}"
    picture = f'<img src="data:image/gif;base64,{data}" width="{size}" height="{size}" alt="{text}">'
    return _figure(picture, text)


def result(kept: Kept) -> str:
    """A clip, its panels, and the links to save them."""
    place, about = f"{CLIPS}/{kept.place}", html.escape(kept.about, quote=True)
    parts = [_figure(_video(f"{place}/clip.mp4", f"the clip: {about}", kept.width, kept.height), f"{about}")]
    if "panels.mp4" in kept.files:
        titles = ", ".join(TITLES)
        video = _video(f"{place}/panels.mp4", f"panels: {titles}", kept.size * len(TITLES), kept.size)
        parts.append(f'<div class="lfdm-panels" tabindex="0" role="group" aria-label="panels">{video}</div>')
    links = "".join(
        f'<a class="lfdm-save" href="{place}/{file}" download="{_saved_as(kept, file)}">{_LINKS[file]}</a>'
        for file in _LINKS
        if file in kept.files
    )
    parts.append(f'<nav class="lfdm-saves" aria-label="save the clip"><span>Save:</span>{links}</nav>')
    return "".join(parts)


def nothing() -> str:
    """The place of the clip before it is made."""
    return '<div class="lfdm-empty">The clip will appear here.</div>'


def _bar(text: str, share: float | None) -> str:
    value = "" if share is None else f' value="{share:.4f}" max="1"'
    progress = f'<progress aria-label="progress"{value}></progress>'
    return f'<div class="lfdm-bar">{progress}<span>{html.escape(text)}</span></div>'


def _figure(inside: str, caption: str) -> str:
    return f'<figure class="lfdm-clip">{inside}<figcaption>{caption}</figcaption></figure>'


def _video(path: str, about: str, width: int, height: int) -> str:
    return (
        f'<video src="{path}" width="{width}" height="{height}" aria-label="{about}" '
        "controls autoplay loop muted playsinline></video>"
    )


def _saved_as(kept: Kept, file: str) -> str:
    stem, _, ending = file.partition(".")
    return html.escape(f"{kept.name}{'-panels' if stem == 'panels' else ''}.{ending}", quote=True)
