"""The makers of the page's clips: the engines of a bundle in this process, or a server."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lfdm_export.client import Client, Frames, Progress
from lfdm_export.client import Preview as ServerPreview
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.generate.previews import Previews
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.motion import load_motion
from lfdm_export.protocol.contract import preview_indices
from lfdm_export.protocol.model_facts import ModelFacts
from lfdm_export.sampling.tables import SAMPLERS
from lfdm_export.sampling.tuned import sampler_names
from lfdm_export.web.page.form import Form
from lfdm_export.web.page.watch import Preview, Waiting, Watch
from lfdm_export.web.turns import Turns

# About this many previews per clip: each decodes some frames.
_PREVIEWS = 6


class Maker(Protocol):
    """Makes clips, for any number of threads.

    Attributes:
        name: the name of the model, and where it runs.
        facts: facts of the model.
        samplers: names of the available samplers.
        follows_clips: whether a driving clip is possible.
        streams_alone: whether panels and motions are available only without previews.
    """

    name: str
    facts: ModelFacts
    samplers: tuple[str, ...]
    follows_clips: bool
    streams_alone: bool

    def make(self, form: Form, photo: NDArray[np.uint8], watch: Watch) -> Clip:
        """Make the clip that the form describes.

        Args:
            form: the form.
            photo: (size, size, 3) uint8, the prepared photograph.
            watch: receives the progress.

        Raises:
            Stopped: the clip was cancelled.
            LfdmExportError: the clip cannot be made.
        """


class LocalMaker:
    """Makes clips with a pipeline of this process, in turn with its other users."""

    follows_clips: bool
    streams_alone = False

    def __init__(self, pipeline: Pipeline, turns: Turns, queue: int) -> None:
        """Use a pipeline.

        Args:
            pipeline: the pipeline.
            turns: the queue of all its users.
            queue: most clips that may be queued or running.
        """
        bundle = pipeline.bundle
        self._pipeline, self._turns, self._queue = pipeline, turns, queue
        self.name = f"{bundle.name}, on {pipeline.stages.target}"
        self.facts = ModelFacts.of(bundle.manifest)
        self.samplers = sampler_names() if bundle.manifest.tuned is not None else tuple(SAMPLERS)
        self.follows_clips = bundle.manifest.has_drive

    def make(self, form: Form, photo: NDArray[np.uint8], watch: Watch) -> Clip:
        """See `Maker`."""
        work = self._checked(form, photo, watch)  # before the clip is queued
        with self._turns.taken(most=self._queue, on_wait=lambda before: watch.tell(Waiting(before))):
            watch.progress("encode", 0, 1)
            return work()

    def _checked(self, form: Form, photo: NDArray[np.uint8], watch: Watch) -> Callable[[], Clip]:
        """Check the form, and return the function that makes its clip."""
        pipeline = self._pipeline
        if not form.sampled:
            path = form.motion_file()
            if form.source == "motion":
                return partial(pipeline.animate, photo, load_motion(path), progress=watch.progress)
            # The photograph is a square already, which this crop leaves as it is: it is for the driving frames.
            middle: Crop | None = None if form.crop is None else "center"
            return partial(pipeline.transfer_motion, photo, path, crop=middle, progress=watch.progress)
        steps, geometry = form.whole("steps"), pipeline.bundle.manifest.geometry
        previews = Previews(
            every=_every(pipeline.sampler_table(form.sampler, steps).steps),
            indices=preview_indices(geometry.frames, geometry.chunk_frames),
            show=lambda step, total, frames: watch.tell(Preview(step, total, frames[0])),
        )
        return partial(
            pipeline.generate,
            photo,
            **form.condition(),  # type: ignore[arg-type]
            sampler=form.sampler,
            steps=steps,
            guidance_scale=form.guidance,
            seed=form.whole("seed"),
            progress=watch.progress,
            previews=previews,
        )


class RemoteMaker:
    """Makes clips with a server. They are streamed, except when the panels are requested."""

    follows_clips = False
    streams_alone = True
    samplers = sampler_names()

    def __init__(self, client: Client, address: str) -> None:
        """Read the facts of the model from the server.

        Raises:
            ServerError: the server cannot be reached, or its answer is wrong.
        """
        self._client = client
        self.name, self.facts = f"the server {address}", client.facts()

    def make(self, form: Form, photo: NDArray[np.uint8], watch: Watch) -> Clip:
        """See `Maker`."""
        if form.source == "motion":
            return self._client.animate(photo, form.motion_file())
        return self._whole(form, photo, watch) if form.panels else self._streamed(form, photo, watch)

    def _whole(self, form: Form, photo: NDArray[np.uint8], watch: Watch) -> Clip:
        request_id = uuid.uuid4().hex
        watch.on_stop(lambda: self._client.cancel(request_id))
        return self._client.generate(
            photo,
            **form.condition(),  # type: ignore[arg-type]
            sampler=form.sampler,
            steps=form.whole("steps"),
            guidance_scale=form.guidance,
            seed=form.whole("seed") or 0,
            warped=True,
            latent=True,
            request_id=request_id,
        )

    def _streamed(self, form: Form, photo: NDArray[np.uint8], watch: Watch) -> Clip:
        steps, have = form.whole("steps"), 0
        with self._client.stream(
            photo,
            **form.condition(),  # type: ignore[arg-type]
            sampler=form.sampler,
            steps=steps,
            guidance_scale=form.guidance,
            seed=form.whole("seed") or 0,
            progress_every=1,
            preview_every=_every(steps or self.facts.sampler.steps or _PREVIEWS),
        ) as stream:
            watch.on_stop(stream.close)
            for event in stream:
                if isinstance(event, Progress):
                    watch.progress("denoise", event.step, event.steps)
                elif isinstance(event, ServerPreview):
                    watch.tell(Preview(event.step, event.steps, event.frames))
                elif isinstance(event, Frames):
                    have += len(event.frames)
                    watch.progress("decode", have, self.facts.frames)
            return stream.clip()


def _every(steps: int) -> int:
    return max(1, math.ceil(steps / _PREVIEWS))
