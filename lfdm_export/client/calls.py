"""Request and response messages of each call, shared by the blocking and the asyncio client. No network access."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lfdm_export.client.faults import Fault, read_fault, stream_status
from lfdm_export.client.jobs import Job, Plan, check_answer, text_tensor
from lfdm_export.client.settings import Settings, import_protocol
from lfdm_export.client.wire import decode, infer_request
from lfdm_export.protocol.contract import (
    CANCEL_INPUT,
    CANCEL_OUTPUT,
    CLIP_INPUTS,
    CLIP_MODEL,
    CLIP_OUTPUTS,
    SAMPLE_MODEL,
    STREAM_INPUTS,
    STREAM_MODEL,
    STREAM_OUTPUTS,
    Array,
)
from lfdm_export.protocol.model_facts import ModelFacts

#: Timeout in seconds of requests that compute nothing.
QUICK = 10.0
# Triton's header `triton_grpc_error` would add a status to stream errors, but with it such errors crash server 2.51.


@dataclass(frozen=True)
class Calls:
    """Builds requests and reads responses.

    Attributes:
        address: HOST:PORT of the server.
        settings: settings of the connection.
    """

    address: str
    settings: Settings

    def clip_request(self, job: Job, plan: Plan, seconds: float) -> Any:
        """Build the unary request of one sample, with its timeout in seconds."""
        return infer_request(
            CLIP_MODEL,
            CLIP_INPUTS,
            job.tensors,
            outputs=plan.outputs,
            request_id=job.request_id,
            seconds=seconds,
            priority=plan.priority,
        )

    def clip_answer(self, response: Any, job: Job, plan: Plan, facts: ModelFacts) -> dict[str, Array]:
        """Read the response to `clip_request`.

        Raises:
            ServerError: the response does not match the request.
        """
        answer = decode(response, CLIP_OUTPUTS)
        check_answer(answer, plan, job, facts)
        return answer

    def stream_request(self, job: Job, plan: Plan, seconds: float) -> Any:
        """Build the request of a streamed sample, with its timeout in seconds."""
        return infer_request(
            STREAM_MODEL,
            STREAM_INPUTS,
            job.tensors,
            request_id=job.request_id,
            seconds=seconds,
            priority=plan.priority,
        )

    def stream_answer(self, response: Any) -> Mapping[str, Array]:
        """Read the tensors of a stream's response that is not an error.

        Raises:
            ServerError: a stream may not contain these tensors.
        """
        return decode(response.infer_response, STREAM_OUTPUTS)

    def stream_fault(self, message: str, job: Job, *, answered: bool) -> Fault:
        """Classify the error message of a stream's response; only the message holds the status."""
        code, details = stream_status(message)
        return self.sort(code, details, request_id=job.request_id, answered=answered)

    def cancel_request(self, request_id: str) -> Any:
        """Build the request that cancels another request."""
        return infer_request(
            SAMPLE_MODEL, (CANCEL_INPUT,), {CANCEL_INPUT.name: text_tensor(request_id)}, outputs=(CANCEL_OUTPUT.name,)
        )

    def cancel_answer(self, response: Any) -> bool:
        """Read whether the cancelled request was queued or running.

        Raises:
            ServerError: the response does not say.
        """
        return bool(decode(response, (CANCEL_OUTPUT,)).get(CANCEL_OUTPUT.name, [False])[0])

    def config_request(self) -> Any:
        """Build the request for the configuration of the clip's model."""
        messages, _ = import_protocol()
        return messages.ModelConfigRequest(name=CLIP_MODEL)

    def fault(self, error: Any, *, request_id: str = "", answered: bool = False) -> Fault:
        """Classify the gRPC `error` that a call raised."""
        return self.sort(error.code().name, error.details() or "", request_id=request_id, answered=answered)

    def sort(self, code: str, details: str, *, request_id: str = "", answered: bool = False) -> Fault:
        """Classify the status that a call ended with."""
        return read_fault(
            code,
            details,
            address=self.address,
            tls=self.settings.tls is not None,
            request_id=request_id,
            answered=answered,
        )
