"""`lfdm_stream`: a whole clip in one decoupled model, which sends previews, and frames as they are decoded.

Three threads serve all streams: one prepares (picture, label, encode), one runs the sampler's loop, one decodes and
sends. A disconnected client is noticed before the next step or chunk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from lfdm_export.batching.jobs import Latent, Sampled, SampleJob
from lfdm_export.generate.frame_choice import FrameChoice
from lfdm_export.ops.warp.on_host import warped_images
from lfdm_export.pictures.preprocess import to_float, to_uint8
from lfdm_export.protocol.contract import (
    QUEUE_FULL_MESSAGE,
    STREAM_INPUTS,
    USED_SEED,
    Array,
    OverloadedError,
    RequestCancelledError,
    StreamKind,
    preview_indices,
)
from lfdm_export.protocol.requests import check_request, parse_priority, parse_sampling
from lfdm_export.serving.models.clips import Clips, DeviceClips, HostClips
from lfdm_export.serving.models.condition import conditions, warm_up_text
from lfdm_export.serving.models.preprocess import prepared_pixels
from lfdm_export.serving.models.sampler import RunningSampler
from lfdm_export.serving.models.stub import Loaded, custom_parameters, deadline, failure, inputs, load, log_error
from lfdm_export.serving.models.warm_up import step_batches, warm_up

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class StreamModel:
    """The Triton model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load all engines, run each once, and start the threads."""
        self._loaded = load(args)
        warm_up_text(self._loaded)
        pipeline = self._loaded.pipeline
        on_device = self._loaded.settings.on_device
        if not on_device:
            warm_up(pipeline, {**step_batches(self._loaded.settings.slots), "encode": [1], "decode": [1]})
        self._clips: Clips = DeviceClips(pipeline.stages.device_chain) if on_device else HostClips(pipeline)
        self._sampler = RunningSampler(self._loaded)
        self._preparing = ThreadPoolExecutor(1, "lfdm-prepare")
        self._decoding = ThreadPoolExecutor(1, "lfdm-decode")
        self._lock, self._live = threading.Lock(), 0
        self._sampler.metrics.follow(lambda: self._live)

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit each request to the threads, which answer it later."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except Exception as error:  # noqa: BLE001 (each request has its own answer)
                sender.send(failure(error, stream=True), flags=_FINAL)

    def finalize(self) -> None:
        """End the threads; remaining streams get an error."""
        self._preparing.shutdown(cancel_futures=True)
        self._sampler.close()
        self._decoding.shutdown(cancel_futures=True)

    def _accept(self, request: Any, sender: Any) -> None:
        limit = self._loaded.settings.slots + self._loaded.settings.queue_limit
        with self._lock:
            if self._live >= limit:
                self._sampler.metrics.rejected()
                raise OverloadedError(
                    f"{QUEUE_FULL_MESSAGE}: found {self._live} streams running or waiting, which is the limit; send it "
                    "again later"
                )
            self._live += 1
        try:
            stream = _Stream(self, sender, inputs(request, self._loaded.interface), _sampling_of(request))
            self._preparing.submit(stream.guarded(stream.prepare))
        except BaseException:
            self.ended()
            raise

    # --- For streams ------------------------------------------------------------------------------

    @property
    def loaded(self) -> Loaded:
        """The bundle's pipeline, settings and interface."""
        return self._loaded

    @property
    def clips(self) -> Clips:
        """What encodes and decodes."""
        return self._clips

    @property
    def sampler(self) -> RunningSampler:
        """The running sampler."""
        return self._sampler

    def decode_later(self, work: Callable[[], None]) -> None:
        """Run work on the decoding thread."""
        self._decoding.submit(work)

    def ended(self) -> None:
        """Count a stream that has sent its last response."""
        with self._lock:
            self._live -= 1


def _sampling_of(request: Any) -> tuple[int, float | None]:
    """Priority and deadline of a request."""
    return parse_priority(custom_parameters(request)), deadline(request)


class _Stream:
    """One request in progress."""

    def __init__(
        self, model: StreamModel, sender: Any, tensors: Mapping[str, Array], urgency: tuple[int, float | None]
    ) -> None:
        self._model, self._sender, self._tensors = model, sender, tensors
        self._priority, self._deadline = urgency
        self._began = time.monotonic()
        self._steps = self._seed = 0
        self._encoded: Any = None
        self._chosen: FrameChoice | None = None
        self._warped: NDArray[np.float32] | None = None  # the image, if previews show it warped
        self._preview: tuple[int, Latent] | None = None
        # Keeps responses in order, and nothing after the last one.
        self._lock, self._over = threading.Lock(), False

    def guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        """Wrap `work` so that any error ends the stream."""

        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 (the stream's own answer)
                self._fail(error)

        return run

    def prepare(self) -> None:
        """Make a sampler job from the tensors, and submit it."""
        loaded, tensors = self._model.loaded, self._tensors
        self._check_wanted()
        check_request(tensors, STREAM_INPUTS)
        found = conditions(tensors, loaded)
        reports = parse_sampling(tensors, loaded.settings.limits)
        self._chosen = FrameChoice.of(reports.only_frames, loaded.pipeline.bundle.manifest.geometry.frames)
        image = to_float(prepared_pixels(tensors, loaded)[None])
        clips = self._model.clips
        self._encoded = clips.encode(image)
        self._warped = image if reports.preview_warped else None
        self._steps, self._seed = found.table.steps, found.seed
        job = SampleJob(
            context=clips.context(self._encoded),
            embedding=found.embedding,
            table=found.table,
            guidance_scale=found.guidance_scale,
            guided_steps=found.guided,
            seed=found.seed,
            priority=self._priority,
            deadline=self._deadline,
            preview_every=reports.preview_every or None,
            progress_every=reports.progress_every or None,
        )
        self._model.sampler.batcher.submit(
            job,
            on_done=self._on_done,
            on_error=self._fail,
            on_preview=self._on_preview,
            on_progress=lambda step: self._respond("progress", step),
            is_cancelled=self._sender.is_cancelled,
        )

    def _on_preview(self, step: int, latent: Latent) -> None:
        """Keep the newest estimate for when the decoding thread has time."""
        with self._lock:
            waiting, self._preview = self._preview is not None, (step, latent)
        if not waiting:
            self._model.decode_later(self.guarded(self._show_preview))

    def _on_done(self, sampled: Sampled) -> None:
        self._model.decode_later(self.guarded(partial(self._decode, sampled)))

    def _show_preview(self) -> None:
        with self._lock:
            preview, self._preview = self._preview, None
        if preview is None or self._over:
            return
        self._check_wanted()
        step, latent = preview
        geometry = self._model.loaded.pipeline.bundle.manifest.geometry
        indices = preview_indices(geometry.frames, geometry.chunk_frames)
        clips = self._model.clips
        if self._warped is None:
            frames = np.concatenate([part for _, (part,) in clips.decode(self._encoded, latent, indices.tolist())])
        else:
            some = clips.on_host(latent)[:, :, indices]
            residual_flow = self._model.loaded.pipeline.bundle.manifest.config.residual_flow
            (frames,) = to_uint8(warped_images(self._warped, some, residual_flow=residual_flow))
        self._respond("preview", step, {"frame_indices": indices, "frames": frames})

    def _decode(self, sampled: Sampled) -> None:
        """Decode and send chunk by chunk, then send the "done" response."""
        began = time.monotonic()
        geometry = self._model.loaded.pipeline.bundle.manifest.geometry
        chosen = None if self._chosen is None else self._chosen.positions
        positions = np.arange(geometry.frames, dtype=np.int32) if chosen is None else np.array(chosen, np.int32)
        self._check_wanted()
        for begin, (frames,) in self._model.clips.decode(self._encoded, sampled.latent, chosen):
            indices = positions[begin : begin + len(frames)]
            self._respond("frames", self._steps, {"frame_indices": indices, "frames": frames})
            if begin == 0:
                self._model.sampler.metrics.first_frame(time.monotonic() - self._began)
            self._check_wanted()
        times = sampled.timings
        timings = np.array([times.queued, times.sampling, times.steps, time.monotonic() - began], np.float32)
        outputs: dict[str, Array] = {
            "frame_count": np.array([geometry.frames], np.int32),
            "timings": timings,
            USED_SEED.name: np.array([self._seed], np.int64),
        }
        self._respond("done", self._steps, outputs, last=True)

    def _check_wanted(self) -> None:
        if self._sender.is_cancelled():
            raise RequestCancelledError("the request was cancelled")

    def _respond(
        self, kind: StreamKind, step: int, outputs: Mapping[str, Array] | None = None, *, last: bool = False
    ) -> None:
        tensors: dict[str, Array] = {
            "kind": np.array([kind.encode()], np.object_),
            "step": np.array([step], np.int32),
            "steps": np.array([self._steps], np.int32),
            **(outputs or {}),
        }
        answer = pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, np.ascontiguousarray(array)) for name, array in tensors.items()]
        )
        self._send(answer, last=last)

    def _fail(self, error: Exception) -> None:
        self._send(failure(error, stream=True), last=True)

    def _send(self, answer: Any, *, last: bool) -> None:
        """Send a response, unless the stream is over; a disconnected client ends it."""
        with self._lock:
            if self._over:
                return
            self._over = last
            try:
                self._sender.send(answer, flags=_FINAL if last else 0)
            except Exception as error:  # noqa: BLE001 (this client is gone; others wait)
                log_error(error)
                last = self._over = True
        if last:
            self._model.ended()
