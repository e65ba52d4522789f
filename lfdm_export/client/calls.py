"""The messages of each call, the same for threads and asyncio. No network here."""

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

#: Seconds for requests that compute nothing.
QUICK = 10.0
# Triton's header `triton_grpc_error` would give streams a status, but errors in streams then crash server 2.51 for all.


@dataclass(frozen=True)
class Calls:
    """Builds requests and reads answers.

    Attributes:
        address: HOST:PORT.
        settings: of the connection.
    """

    address: str
    settings: Settings

    def clip_request(self, job: Job, plan: Plan, seconds: float) -> Any:
        """The unary request of one sample, with the seconds that it has."""
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
        """Its answer.

        Raises:
            ServerError: it is not what was asked for.
        """
        answer = decode(response, CLIP_OUTPUTS)
        check_answer(answer, plan, job, facts)
        return answer

    def stream_request(self, job: Job, plan: Plan, seconds: float) -> Any:
        """The request of a streamed sample, with the seconds that it has."""
        return infer_request(
            STREAM_MODEL,
            STREAM_INPUTS,
            job.tensors,
            request_id=job.request_id,
            seconds=seconds,
            priority=plan.priority,
        )

    def stream_answer(self, response: Any) -> Mapping[str, Array]:
        """The tensors of one response of a stream that is no error.

        Raises:
            ServerError: they are not what a stream may have.
        """
        return decode(response.infer_response, STREAM_OUTPUTS)

    def stream_fault(self, message: str, job: Job, *, answered: bool) -> Fault:
        """What the error message of a stream's response means: its status stands in it, for Triton sends none."""
        code, details = stream_status(message)
        return self.sort(code, details, request_id=job.request_id, answered=answered)

    def cancel_request(self, request_id: str) -> Any:
        """The request that cancels another one."""
        return infer_request(
            SAMPLE_MODEL, (CANCEL_INPUT,), {CANCEL_INPUT.name: text_tensor(request_id)}, outputs=(CANCEL_OUTPUT.name,)
        )

    def cancel_answer(self, response: Any) -> bool:
        """Whether a request of that id was waiting or running.

        Raises:
            ServerError: the answer does not say.
        """
        return bool(decode(response, (CANCEL_OUTPUT,)).get(CANCEL_OUTPUT.name, [False])[0])

    def config_request(self) -> Any:
        """Asks for the configuration of the clip's model."""
        messages, _ = import_protocol()
        return messages.ModelConfigRequest(name=CLIP_MODEL)

    def fault(self, error: Any, *, request_id: str = "", answered: bool = False) -> Fault:
        """How a call ended that raised gRPC's `error`."""
        return self.sort(error.code().name, error.details() or "", request_id=request_id, answered=answered)

    def sort(self, code: str, details: str, *, request_id: str = "", answered: bool = False) -> Fault:
        """How a call ended with this status."""
        return read_fault(
            code,
            details,
            address=self.address,
            tls=self.settings.tls is not None,
            request_id=request_id,
            answered=answered,
        )
