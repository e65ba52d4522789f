"""What both doors do with a request that they have read: hand it on, wait for it, give it up."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Coroutine, Mapping
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
#: What begins the id of a request whose client gave none.
_UNNAMED = "unnamed-"
#: A field of a protobuf message that says the request's id is "": of two, the last one counts.
_NO_ID = b"\x1a\x00"
#: Seconds in which the sampler is told of a request that nobody wants any more, and between two attempts.
_TELLING, _AGAIN = 2.0, 0.25


class _Call:
    """A call that may be cancelled before it is begun."""

    begun: Any = None

    def cancel(self) -> None:
        """Cancel it, if it was begun."""
        if self.begun is not None:
            self.begun.cancel()


class Service:
    """State of one front. For its event loop alone."""

    def __init__(self, access: Access, limits: FrontLimits, models: Mapping[str, Model]) -> None:
        """Begin without a server.

        Args:
            access: who may call.
            limits: of requests.
            models: that clients may use.
        """
        self.access, self.limits, self.models = access, limits, models
        self.flights = Flights(limits)
        self._triton: Triton | None = None
        self._numbers = itertools.count(1)
        self._background: set[asyncio.Task[None]] = set()
        self._calls = Calls("", Settings())

    # --- The server -------------------------------------------------------------------------------

    @property
    def triton(self) -> Triton:
        """The server.

        Raises:
            RefusedError: there is none now.
        """
        if self._triton is None:
            raise unavailable(LOST_SENTENCE)
        return self._triton

    @property
    def open(self) -> bool:
        """Whether new requests are taken."""
        return self._triton is not None and not self.flights.draining

    async def attach(self, target: str) -> None:
        """Hand requests on to a server.

        Args:
            target: gRPC's name of its socket.
        """
        self._triton = Triton(target)

    async def detach(self) -> int:
        """Hand nothing on: the server has gone, and with it what it had.

        Returns:
            How many requests are told so.
        """
        triton, self._triton = self._triton, None
        lost = self.flights.lose(LOST_SENTENCE)
        if triton is not None:
            await triton.close()
        return lost

    def lose(self, model: str) -> int:
        """A model's process has died: what it had is given up.

        Returns:
            How many requests are told so.
        """
        sentence = f"the process of {model} has died and is started again; send the request again"
        served = {STREAM_MODEL} if model == STREAM_MODEL else {CLIP_MODEL, model}
        return sum(self.flights.lose(sentence, one) for one in served)

    # --- Requests ---------------------------------------------------------------------------------

    async def check(self, request: Any) -> None:
        """Look at a whole `ModelInferRequest`.

        Raises:
            RefusedError: anything about it is not as it should be.
        """
        check_request(self.models, request)
        await check_picture(request, self.limits.requests)

    async def infer(self, model: str, request_id: str, message: bytes, seconds: float | None) -> bytes:
        """The raw answer to a checked `ModelInferRequest`.

        Args:
            model: that it is for.
            request_id: that it carries.
            message: the request itself.
            seconds: that its client waits; None for as long as it takes.

        Raises:
            RefusedError: the server's refusal, or why there is no answer.
        """
        if model == SAMPLE_MODEL:  # a cancellation, which nothing cancels, and which a full queue must not hold up
            return await answered(self.triton.unary(INFER, message, seconds))
        triton, call = self.triton, _Call()
        flight = self.begin(model, request_id, call.cancel)
        try:
            call.begun = triton.unary(INFER, named(message, flight.request_id) if flight.unnamed else message, seconds)
            answer: bytes = await flight.result(answered(call.begun))
            return answer + _NO_ID if flight.unnamed else answer
        except asyncio.CancelledError:  # the client has gone
            call.cancel()
            self.flights.end(flight)
            self.abandon(flight.request_id)
            raise
        except RefusedError as error:
            if error.code == "DEADLINE_EXCEEDED":  # the client waits no more
                self.flights.end(flight)
                self.abandon(flight.request_id)
            raise
        finally:
            self.flights.end(flight)

    def begin(self, model: str, request_id: str, give_up: Callable[[], object]) -> Flight:
        """Note a request, which has an id from now on so that it can be cancelled.

        Raises:
            RefusedError: there are as many as there may be, or the server is stopping.
        """
        identity = request_id or f"{_UNNAMED}{next(self._numbers)}"
        return self.flights.begin(model, identity, give_up, unnamed=not request_id)

    def abandon(self, request_id: str) -> None:
        """Have the sampler give up a request that nobody wants any more, unless another one has its id."""
        if self._triton is not None and not self.flights.knows(request_id):
            self.spawn(self._tell(self._triton, request_id))

    async def _tell(self, triton: Triton, identity: str) -> None:
        """Have the sampler give up a request; cancelling a call does not reach into a running ensemble."""
        message = self._calls.cancel_request(identity).SerializeToString()
        messages, _ = import_protocol()
        for _ in range(int(_TELLING / _AGAIN)):  # it may not have come to the sampler yet
            try:
                answer = messages.ModelInferResponse.FromString(await answered(triton.unary(INFER, message, _TELLING)))
            except RefusedError as error:
                logger.debug("the sampler could not be told to give up %s: %s", identity, error)
                return
            if self._calls.cancel_answer(answer):
                return
            await asyncio.sleep(_AGAIN)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done meanwhile."""
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def named(message: bytes, request_id: str) -> bytes:
    """A raw `ModelInferRequest` with an id of less than 128 characters: of two, the last one counts."""
    return message + b"\x1a" + bytes([len(request_id)]) + request_id.encode()
