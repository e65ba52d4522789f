"""What both endpoints do with a parsed request: forward it, wait for it, give it up."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any

from lfdm_export.client.calls import Calls
from lfdm_export.client.settings import Settings, import_protocol
from lfdm_export.protocol.contract import CLIP_MODEL, SAMPLE_MODEL, STREAM_MODEL
from lfdm_export.serving.front.access import Access
from lfdm_export.serving.front.checks import Model, check_request
from lfdm_export.serving.front.flights import Flight, Flights
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.pictures import check_picture
from lfdm_export.serving.front.refusal import RefusedError, unavailable
from lfdm_export.serving.front.triton import LOST_SENTENCE, SERVICE, Triton, answered

logger = logging.getLogger(__name__)

INFER = f"/{SERVICE}/ModelInfer"
#: Prefix of the id of a request whose client gave none.
_UNNAMED = "unnamed-"
#: Serialized field that sets a request's id to ""; protobuf keeps the last of two.
_NO_ID = b"\x1a\x00"
#: Bytes from which a message is large.
_LARGE = 1 << 20
#: Seconds in which an abandoned request is cancelled in the sampler, and seconds between two attempts.
_CANCEL_SECONDS, _RETRY_SECONDS = 2.0, 0.25


class _Call:
    """A call that can be cancelled before it begins."""

    begun: Any = None

    def cancel(self) -> None:
        """Cancel the call if it has begun."""
        if self.begun is not None:
            self.begun.cancel()


class Service:
    """State of one front. Use it only on the front's event loop."""

    def __init__(self, access: Access, limits: FrontLimits, models: Mapping[str, Model]) -> None:
        """Start without a server.

        Args:
            access: the token and TLS files.
            limits: limits of the front.
            models: models that clients may use.
        """
        self.access, self.limits, self.models = access, limits, models
        self.flights = Flights(limits)
        self._triton: Triton | None = None
        self._numbers = itertools.count(1)
        self._background: set[asyncio.Task[None]] = set()
        self._calls = Calls("", Settings())
        self._checks = asyncio.Semaphore(1)

    # --- The server -------------------------------------------------------------------------------

    @property
    def triton(self) -> Triton:
        """The server behind the front.

        Raises:
            RefusedError: none is running now.
        """
        if self._triton is None:
            raise unavailable(LOST_SENTENCE)
        return self._triton

    @property
    def open(self) -> bool:
        """Whether new requests are accepted."""
        return self._triton is not None and not self.flights.draining

    async def attach(self, target: str) -> None:
        """Forward requests to a server.

        Args:
            target: gRPC address of its socket.
        """
        self._triton = Triton(target)

    async def detach(self) -> int:
        """Stop forwarding: the server has ended, and all its requests with it.

        Returns:
            How many requests get an error.
        """
        triton, self._triton = self._triton, None
        lost = self.flights.lose(LOST_SENTENCE)
        if triton is not None:
            await triton.close()
        return lost

    def lose(self, model: str) -> int:
        """Give up the requests of a model whose process has died.

        Returns:
            How many requests get an error.
        """
        sentence = f"the process of {model} has died and is started again; send the request again"
        served = {STREAM_MODEL} if model == STREAM_MODEL else {CLIP_MODEL, model}
        return sum(self.flights.lose(sentence, one) for one in served)

    # --- Requests ---------------------------------------------------------------------------------

    def checking(self, size: int) -> AbstractAsyncContextManager[object]:
        """A context in which a message of `size` bytes is parsed and checked; large ones one after the other.

        Parts of a parsed message are copies.
        """
        return self._checks if size > _LARGE else nullcontext()

    async def check(self, request: Any) -> None:
        """Check a whole `ModelInferRequest`.

        Raises:
            RefusedError: any part of it is invalid.
        """
        check_request(self.models, request)
        await check_picture(request, self.limits.requests)

    async def infer(self, model: str, request_id: str, message: bytes, seconds: float | None) -> bytes:
        """The raw answer to a checked `ModelInferRequest`.

        Args:
            model: name of the model.
            request_id: id of the request.
            message: the serialized request.
            seconds: until the client's deadline; None without one.

        Raises:
            RefusedError: the server's refusal, or why there is no answer.
        """
        if model == SAMPLE_MODEL:  # a cancel request: it cannot be cancelled, and a full queue must not delay it
            return await answered(self.triton.unary(INFER, message, seconds))
        triton, call = self.triton, _Call()
        flight = self.begin(model, request_id, call.cancel)
        try:
            call.begun = triton.unary(INFER, named(message, flight.request_id) if flight.unnamed else message, seconds)
            answer: bytes = await flight.result(answered(call.begun))
            return answer + _NO_ID if flight.unnamed else answer
        except asyncio.CancelledError:  # the client is gone
            call.cancel()
            self.flights.end(flight)
            self.abandon(flight.request_id)
            raise
        except RefusedError as error:
            if error.code == "DEADLINE_EXCEEDED":  # the client no longer waits
                self.flights.end(flight)
                self.abandon(flight.request_id)
            raise
        finally:
            self.flights.end(flight)

    def begin(self, model: str, request_id: str, give_up: Callable[[], object]) -> Flight:
        """Register a request, and give it an id if it has none, so that it can be cancelled.

        Raises:
            RefusedError: the maximum number is in flight, or the server is stopping.
        """
        identity = request_id or f"{_UNNAMED}{next(self._numbers)}"
        return self.flights.begin(model, identity, give_up, unnamed=not request_id)

    def abandon(self, request_id: str) -> None:
        """Cancel a request that no client waits for in the sampler, unless another request has its id."""
        if self._triton is not None and not self.flights.knows(request_id):
            self.spawn(self._cancel(self._triton, request_id))

    async def _cancel(self, triton: Triton, identity: str) -> None:
        """Cancel a request in the sampler: cancelling the call does not reach into a running ensemble."""
        message = self._calls.cancel_request(identity).SerializeToString()
        messages, _ = import_protocol()
        for _ in range(int(_CANCEL_SECONDS / _RETRY_SECONDS)):  # the request may not have reached the sampler yet
            try:
                answer = messages.ModelInferResponse.FromString(
                    await answered(triton.unary(INFER, message, _CANCEL_SECONDS))
                )
            except RefusedError as error:
                logger.debug("the sampler could not cancel %s: %s", identity, error)
                return
            if self._calls.cancel_answer(answer):
                return
            await asyncio.sleep(_RETRY_SECONDS)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run work in the background."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def named(message: bytes, request_id: str) -> bytes:
    """A raw `ModelInferRequest` with this id of less than 128 characters; protobuf keeps the last of two ids."""
    return message + b"\x1a" + bytes([len(request_id)]) + request_id.encode()
