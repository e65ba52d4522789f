"""`lfdm_sample`: sampler inputs -> latent. Requests join and leave the running batch at any step.

`execute` only submits requests and returns; the sampler answers each when its sample is done, independently of the
others.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from lfdm_export.batching.jobs import Sampled, SampleJob
from lfdm_export.batching.step_batcher import Ticket
from lfdm_export.errors import InputError
from lfdm_export.protocol.contract import CANCEL_INPUT, CANCEL_OUTPUT, Array
from lfdm_export.protocol.requests import Limits, parse_priority
from lfdm_export.sampling.rows import SamplerTable
from lfdm_export.serving.models.sampler import RunningSampler
from lfdm_export.serving.models.stub import custom_parameters, deadline, failure, inputs, load, log_error, response

_FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class SampleModel:
    """The Triton model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load the engines and start the sampler's loop."""
        self._loaded = load(args)
        self._sampler = RunningSampler(self._loaded)
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
        """End the loop."""
        self._sampler.close()

    def _accept(self, request: Any, sender: Any) -> None:
        tensors, requested = inputs(request, self._loaded.interface), list(request.requested_output_names())
        if CANCEL_INPUT.name in tensors:
            found = self._cancel(str(tensors[CANCEL_INPUT.name][0], "utf-8", "replace"))
            sender.send(response({CANCEL_OUTPUT.name: np.array([found])}, requested), flags=_FINAL)
            return
        limits = self._loaded.settings.limits
        job = sample_job(tensors, parse_priority(custom_parameters(request)), deadline(request), limits)
        identity = request.request_id()

        def on_done(sampled: Sampled) -> None:
            self._forget(identity)
            times = sampled.timings
            outputs = {
                "latent": sampled.latent[0],
                "sample_timings": np.array([times.queued, times.sampling, times.steps], np.float32),
            }
            _send(sender, response(outputs, requested))

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


def sample_job(tensors: Mapping[str, Array], priority: int, due: float | None, limits: Limits) -> SampleJob:
    """Make a sampler job from a request's tensors; the sampler itself checks shapes and values.

    The ensemble always passes these checks, but a server without the front accepts requests from any client.

    Raises:
        InputError: a tensor is missing, or exceeds a limit of the server.
    """
    names = ("context", "text_embedding", "seed", "guidance_scale", "timesteps", "coefficients", "draws_noise")
    missing = [name for name in names if name not in tensors]
    if missing:
        raise InputError(f"the inputs {', '.join(missing)} are missing; the ensemble gives them")
    table = SamplerTable("", tensors["timesteps"], tensors["coefficients"], tensors["draws_noise"])
    if table.steps > limits.steps:
        raise InputError(f"found {table.steps} steps, expected at most {limits.steps}; use fewer")
    return SampleJob(
        context=tensors["context"],
        embedding=tensors["text_embedding"],
        table=table,
        guidance_scale=float(tensors["guidance_scale"][0]),
        seed=int(tensors["seed"][0]),
        priority=priority,
        deadline=due,
    )


def _send(sender: Any, answer: Any) -> None:
    try:
        sender.send(answer, flags=_FINAL)
    except Exception as error:  # noqa: BLE001 (this client is gone; others wait)
        log_error(error)
