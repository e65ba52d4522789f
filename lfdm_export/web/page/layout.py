"""The layout of the page, built from Gradio's components."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import gradio as gr

from lfdm_export.pictures.faces import can_find_faces
from lfdm_export.web.page import markup
from lfdm_export.web.page.examples import draw_examples
from lfdm_export.web.page.form import Form, Part, Source
from lfdm_export.web.page.makers import Maker
from lfdm_export.web.page.studio import Studio
from lfdm_models.pictures.formats import FORMAT_NAMES

STYLE = Path(__file__).with_name("page.css")
_SOURCES: dict[Source, str] = {"label": "Label", "text": "Text", "motion": "Saved motion", "clip": "Another clip"}
_PARTS: dict[Part, str] = {
    "whole": "All, with black bars", "center": "Centered square", "face": "Largest face", "region": "A region",
}  # fmt: skip
#: Names for screen readers: Gradio gives its buttons of examples none.
NAMES = """
() => document.querySelectorAll("#examples button").forEach((button, index) =>
    button.setAttribute("aria-label", `drawing ${index + 1}`))
"""
#: Fonts of the visitor's machine: none is fetched.
_FONTS, _MONO = ("system-ui", "sans-serif"), ("ui-monospace", "monospace")


def theme() -> gr.themes.Base:
    """Colors and fonts of the page."""
    return gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=_FONTS, font_mono=_MONO)


def build(studio: Studio, folder: Path) -> gr.Blocks:
    """Build the page.

    Args:
        studio: makes the clips.
        folder: the folder for the examples.
    """
    maker = studio.maker
    page = gr.Blocks(title="lfdm-export", analytics_enabled=False, delete_cache=(600, 3600))
    with page:
        gr.HTML(f"<h1>A photograph that moves</h1><p>{_about(maker)}</p>", elem_classes="lfdm-head")
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                inputs = _form(maker, folder)
                with gr.Row():
                    make = gr.Button("Make the clip", variant="primary", elem_id="make", min_width=140)
                    stop = gr.Button("Stop", elem_id="stop", min_width=80)
            with gr.Column(scale=1, min_width=320):
                status = gr.HTML(markup.said("Choose a photograph and a motion."), elem_id="status")
                picture = gr.HTML(markup.nothing(), elem_id="result")

        def made(request: gr.Request, *values: object) -> Iterator[tuple[str, str]]:
            yield from studio.make(str(request.session_hash), values)

        def stopped(request: gr.Request) -> None:
            studio.stop(str(request.session_hash))

        # `preprocess=False`: the library decodes the files and checks all values.
        make.click(
            made, inputs, [status, picture], preprocess=False, show_progress="hidden", concurrency_limit=None,
            api_visibility="private",
        )  # fmt: skip
        # Not with Gradio's `cancels`, which shows an error afterwards.
        stop.click(stopped, None, None, queue=False, show_progress="hidden", api_visibility="private")
    return page


def _form(maker: Maker, folder: Path) -> list[gr.components.Component]:
    """The components of the form, in the order of the fields of `Form`."""
    photo = gr.Image(
        label="Photograph", placeholder=f"Drop a photograph here, or click to choose one\n{FORMAT_NAMES}",
        sources=["upload", "webcam", "clipboard"], type="filepath", height=260, buttons=[], elem_id="photo",
        alt_text="the photograph",
    )  # fmt: skip
    gr.Examples(
        [[str(path)] for path in draw_examples(folder)], [photo], label="Or choose a drawing", elem_id="examples",
        api_visibility="private",
    )  # fmt: skip
    parts_of_photo = _parts_of_photo()
    sources = [(words, name) for name, words in _SOURCES.items() if _has(maker, name)]
    first: Source = sources[0][1]
    source = gr.Radio(sources, value=first, label="Source of the motion", elem_id="source")
    parts = _motion_parts(maker, first)
    sampling, fields_of_sampling = _sampling(maker)
    words = "Show the panels (source, clip, warped, grid, occlusion)"
    alone = "With panels there are no previews; only then you can save the motion." if maker.streams_alone else None
    panels = gr.Checkbox(False, label=words, info=alone, elem_id="panels")
    source.change(
        lambda chosen: [gr.update(visible=name == chosen) for name in parts]
        + [gr.update(visible=Form(source=chosen).sampled)],
        source, [*parts.values(), sampling], queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    found = {
        "photo": photo, **parts_of_photo, "source": source, **parts, **fields_of_sampling, "panels": panels,
    }  # fmt: skip
    return [found[field.name] for field in fields(Form)]


def _parts_of_photo() -> dict[str, gr.components.Component]:
    choices = [(words, name) for name, words in _PARTS.items() if name != "face" or can_find_faces()]
    part = gr.Radio(choices, value="whole", label="Part of the photograph that moves", elem_id="part")
    region = gr.Textbox(
        label="Region", placeholder="X,Y,W,H in pixels, from the upper left", max_lines=1, visible=False,
        elem_id="region",
    )  # fmt: skip
    paste_back = gr.Checkbox(False, label="Put it back into the photograph", visible=False, elem_id="paste-back")
    part.change(
        lambda chosen: (
            gr.update(visible=chosen == "region"),
            gr.update(visible=False, value=False) if chosen == "whole" else gr.update(visible=True),
        ),
        part, [region, paste_back], queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    return {"part": part, "region": region, "paste_back": paste_back}


def _motion_parts(maker: Maker, first: Source) -> dict[Source, gr.components.Component]:
    labels = list(maker.facts.labels)
    motion = gr.File(
        label="Saved motion (.motion)", file_types=[".motion"], type="filepath", height=120,
        visible=first == "motion", elem_id="motion",
    )  # fmt: skip
    clip = gr.File(
        label="Driving clip (GIF, MP4, WebP …)", type="filepath", height=120, visible=False,
        elem_id="clip",
    )  # fmt: skip
    return {
        "label": gr.Dropdown(
            labels, value=labels[0] if labels else None, label="Label", visible=first == "label", elem_id="label"
        ),
        "text": gr.Textbox(label="Text", max_lines=3, visible=first == "text", elem_id="text"),
        "motion": motion,
        "clip": clip,
    }


def _sampling(maker: Maker) -> tuple[gr.Group, dict[str, gr.components.Component]]:
    defaults = maker.facts.sampler
    with gr.Group() as group:
        with gr.Row():
            sampler = gr.Dropdown(
                list(maker.samplers), value=defaults.sampler, label="Sampler", elem_id="sampler", min_width=120
            )
            steps = gr.Number(
                defaults.steps, label="Steps", placeholder="default of the sampler", elem_id="steps",
                min_width=120,
            )  # fmt: skip
        with gr.Row():
            guidance = gr.Number(
                defaults.guidance_scale, label="Guidance (1: as trained)", step=0.5, elem_id="guidance", min_width=120
            )
            seed = gr.Number(0, label="Seed", elem_id="seed", min_width=120)
    return group, {"sampler": sampler, "steps": steps, "guidance": guidance, "seed": seed}


def _has(maker: Maker, source: Source) -> bool:
    """Whether a source of motion is available."""
    facts = maker.facts
    able: dict[Source, bool] = {"label": bool(facts.labels), "text": facts.has_text, "clip": maker.follows_clips}
    return able.get(source, True)


def _about(maker: Maker) -> str:
    facts = maker.facts
    untrained = " Its weights are untrained: the clips show only that it runs." if facts.trained is False else ""
    return html.escape(f"{maker.name}: {facts.frames} frames of {facts.image_size} × {facts.image_size}.{untrained}")
