"""`lfdm_sample`: sampler inputs -> latent. Requests join and leave the running batch at any step.

`execute` only submits requests and returns; the sampler answers each when its sample is done, independently of the
others. With the setting `on_device` it takes the image instead of the context and returns the clip: encoder outputs,
state and latent stay on the device, and only pictures leave it (and the latent, if it is requested).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from lfdm_export.batching.jobs import Sampled, SampleJob
from lfdm_export.batching.step_batcher import Ticket
from lfdm_export.engines.device_chain import FRAMES, WARPED
from lfdm_export.errors import InputError
from lfdm_export.protocol.contract import CANCEL_INPUT, CANCEL_OUTPUT, Array
from lfdm_export.protocol.requests import Limits, parse_priority
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.serving.models.clips import DeviceClips
from lfdm_export.serving.models.sampler import RunningSampler
from lfdm_export.serving.models.stub import custom_parameters, deadline, failure, inputs, load, log_error, response
from lfdm_export.serving.models.warm_up import step_batches, warm_up

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class SampleModel:
    """The Triton model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engines and start the sampler's loop."""
        self._loaded = load(args)
        on_device = self._loaded.settings.on_device
        self._clips = DeviceClips(self._loaded.pipeline.stages.device_chain) if on_device else None
        if not on_device:
            warm_up(self._loaded.pipeline, step_batches(self._loaded.settings.slots))
        self._sampler = RunningSampler(self._loaded)
        self._preparing, self._decoding = (ThreadPoolExecutor(1, f"lfdm-{name}") for name in ("prepare", "decode"))
        self._tickets: dict[str, list[Ticket]] = {}
        self._lock = threading.Lock()

    def execute(self, requests: Sequence[Any]) -> None:
        """Submit each request to the sampler, which answers it later."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self._accept(request, sender)
            except Exception as error:  # noqa: BLE001 (each request has its own answer)
                sender.send(failure(error), flags=_FINAL)

    def finalize(self) -> None:
        """End the threads and the loop."""
        self._preparing.shutdown(cancel_futures=True)
        self._sampler.close()
        self._decoding.shutdown(cancel_futures=True)

    def _accept(self, request: Any, sender: Any) -> None:
        tensors, requested = inputs(request, self._loaded.interface), list(request.requested_output_names())
        if CANCEL_INPUT.name in tensors:
            found = self._cancel(str(tensors[CANCEL_INPUT.name][0], "utf-8", "replace"))
            sender.send(response({CANCEL_OUTPUT.name: np.array([found])}, requested), flags=_FINAL)
            return
        priority, due, identity = parse_priority(custom_parameters(request)), deadline(request), request.request_id()
        job = sample_job(tensors, priority, due, self._loaded.settings.limits, given=self._first_input)
        if self._clips is None:
            self._submit(job, identity, sender, lambda sampled: response(latent_outputs(sampled), requested))
        else:
            self._preparing.submit(self._prepare, self._clips, job, identity, sender, requested)

    @property
    def _first_input(self) -> str:
        return "context" if self._clips is None else "image"

    def _prepare(
        self, clips: DeviceClips, job: SampleJob, identity: str, sender: Any, requested: Sequence[str]
    ) -> None:
        """Encode the image of a job, and submit it; its clip is decoded on the decoding thread."""
        try:
            encoded = clips.encode(job.context)
            job = replace(job, context=clips.context(encoded))
            self._submit(job, identity, sender, lambda sampled: _clip_response(clips, encoded, sampled, requested))
        except Exception as error:  # noqa: BLE001 (each request has its own answer)
            _send(sender, failure(error))

    def _submit(self, job: SampleJob, identity: str, sender: Any, answer: Callable[[Sampled], Any]) -> None:
        """Submit a job whose sample `answer` turns into the response."""

        def respond(sampled: Sampled) -> None:
            try:
                made = answer(sampled)
            except Exception as error:  # noqa: BLE001 (each request has its own answer)
                made = failure(error)
            _send(sender, made)

        def on_done(sampled: Sampled) -> None:
            self._forget(identity)
            if self._clips is None:
                respond(sampled)
            else:  # decoding must not delay the callbacks of others
                self._decoding.submit(respond, sampled)

        def on_error(error: Exception) -> None:
            self._forget(identity)
            _send(sender, failure(error))

        with self._lock:  # the ticket must be stored before a callback looks for it
            ticket = self._sampler.batcher.submit(
                job, on_done=on_done, on_error=on_error, is_cancelled=sender.is_cancelled
            )
            if identity:
                self._tickets.setdefault(identity, []).append(ticket)

    def _cancel(self, identity: str) -> bool:
        """Cancel all requests with an id; returns whether there was one."""
        with self._lock:
            tickets = list(self._tickets.get(identity, ()))
        return sum(ticket.cancel() for ticket in tickets) > 0

    def _forget(self, identity: str) -> None:
        """Drop the ended tickets of an id."""
        with self._lock:
            left = [ticket for ticket in self._tickets.pop(identity, []) if not ticket.ended]
            if left:
                self._tickets[identity] = left


def latent_outputs(sampled: Sampled) -> dict[str, Array]:
    """The outputs for a sample on the host."""
    times = sampled.timings
    return {
        "latent": sampled.latent[0],
        "sample_timings": np.array([times.queued, times.sampling, times.steps], np.float32),
    }


def _clip_response(clips: DeviceClips, encoded: Any, sampled: Sampled, requested: Sequence[str]) -> Any:
    """Decode a clip, and make its response."""
    began, times = time.monotonic(), sampled.timings
    wanted = [name for name in (FRAMES, WARPED) if name in requested]
    parts = [pictures for _, pictures in clips.decode(encoded, sampled.latent, wanted=wanted)]
    outputs: dict[str, Array] = {
        name: np.concatenate([pictures[index] for pictures in parts]) for index, name in enumerate(wanted)
    }
    if "latent" in requested:
        outputs["latent"] = clips.chain.latent(sampled.latent)
    seconds = time.monotonic() - began
    outputs["timings"] = np.array([times.queued, times.sampling, times.steps, seconds], np.float32)
    return response(outputs, requested)


def sample_job(
    tensors: Mapping[str, Array], priority: int, due: float | None, limits: Limits, *, given: str = "context"
) -> SampleJob:
    """Make a sampler job from a request's tensors; the sampler itself checks shapes and values.

    The ensemble always passes these checks, but a server without the front accepts requests from any client.

    Args:
        tensors: the tensors, by name.
        priority: of the request.
        due: its deadline.
        limits: limits of the server.
        given: name of the tensor that becomes the context.

    Raises:
        InputError: a tensor is missing, or exceeds a limit of the server.
    """
    names = (given, "text_embedding", "seed", "guidance_scale", "timesteps", "coefficients", "draws_noise", "guided")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"the inputs {', '.join(missing)} are missing; the ensemble gives them")
    table = SamplerTable("", tensors["timesteps"], tensors["coefficients"], tensors["draws_noise"])
    if table.steps > limits.steps:
        raise InputError(f"found {table.steps} steps, expected at most {limits.steps}; use fewer")
    return SampleJob(
        context=tensors[given],
        embedding=tensors["text_embedding"],
        table=table,
        guidance_scale=float(tensors["guidance_scale"][0]),
        guided_steps=tensors["guided"],
        seed=int(tensors["seed"][0]),
        priority=priority,
        deadline=due,
    )


def _send(sender: Any, answer: Any) -> None:
    try:
        sender.send(answer, flags=_FINAL)
    except Exception as error:  # noqa: BLE001 (this client is gone; others wait)
        log_error(error)
