"""One gRPC channel for asyncio; what `lfdm_export.client.connection` is for threads."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

from lfdm_export.client.calls import Calls
from lfdm_export.client.faults import Attempts, Fault
from lfdm_export.client.settings import Settings, import_grpc, import_protocol
from lfdm_export.errors import InputError, LfdmExportError

logger = logging.getLogger(__name__)

#: Seconds that telling the server of a request that is given up may take.
_TELLING = 2.0
#: Seconds until it is told again.
_AGAIN = 0.05


class AsyncConnection:
    """A channel of one event loop."""

    def __init__(self, address: str, settings: Settings) -> None:
        """Check everything; the channel is made by the first call, which knows the event loop.

        Raises:
            InputError: the address or a file of the settings cannot be used.
            MissingDependencyError: gRPC or Triton's client is not installed.
        """
        self.address, self.settings = settings.check_address(address), settings
        self.calls = Calls(self.address, settings)
        self.grpc, (_, self._stubs) = import_grpc(), import_protocol()
        self._credentials = None if settings.tls is None else settings.tls.credentials()
        self._channel: Any = None
        self._stub: Any = None
        self._closed = False

    @property
    def stub(self) -> Any:
        """Triton's service.

        Raises:
            InputError: the channel is closed.
        """
        if self._closed:
            raise InputError("the client is closed; open a new one")
        if self._stub is None:
            from grpc import aio

            options = self.settings.channel_options(self.address)
            if self._credentials is None:
                self._channel = aio.insecure_channel(self.address, options)
            else:
                self._channel = aio.secure_channel(self.address, self._credentials, options)
            self._stub = self._stubs.GRPCInferenceServiceStub(self._channel)
        return self._stub

    async def close(self) -> None:
        """End what is under way, and close the channel."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    def attempts(self, seconds: float) -> Attempts:
        """Those of a new request, which has so many seconds from now.

        Raises:
            InputError: it has none.
        """
        return Attempts(self.settings.retry, seconds)

    async def unary(
        self,
        method: str,
        make_request: Callable[[float], Any],
        attempts: Attempts,
        *,
        request_id: str = "",
        tell: bool = False,
    ) -> Any:
        """The response of a unary call, begun anew where that is safe.

        Args:
            method: of the stub.
            make_request: given the seconds that the call has.
            attempts: those made, and the time left.
            request_id: of the request, for messages.
            tell: whether the server is told if the task that awaits this is cancelled.

        Raises:
            LfdmExportError: what its end means.
        """
        while True:
            seconds = attempts.begin()
            call = getattr(self.stub, method)(
                make_request(seconds),
                timeout=seconds,
                metadata=self.settings.metadata(),
                compression=self.settings.grpc_compression(),
            )
            answer = asyncio.ensure_future(_response(call))
            try:
                return await asyncio.shield(answer)
            except self.grpc.RpcError as error:
                fault = self.calls.fault(error, request_id=request_id)
            except asyncio.CancelledError:
                answer.add_done_callback(_forget)
                if tell:
                    await asyncio.shield(self._tell_to_cancel(request_id, call))
                raise
            finally:
                call.cancel()
            await self.pause_or_raise(attempts, fault)

    async def pause_or_raise(self, attempts: Attempts, fault: Fault) -> None:
        """Wait for the next attempt, or raise what the end of the last one means.

        Raises:
            LfdmExportError: there is to be no other attempt.
        """
        pause = attempts.pause_after(fault)
        logger.info("%s; attempt %d in %.1f s", fault.error, attempts.made + 1, pause)
        await asyncio.sleep(pause)

    async def _tell_to_cancel(self, request_id: str, call: Any) -> None:
        """Tell the server that a request is given up, for cancellation does not reach into a running ensemble.

        Again and again while it does not know of one that is under way, for it may not have come to the sampler yet.
        """
        end = time.monotonic() + _TELLING
        try:
            while time.monotonic() < end:
                response = await self.stub.ModelInfer(
                    self.calls.cancel_request(request_id), timeout=_TELLING, metadata=self.settings.metadata()
                )
                if self.calls.cancel_answer(response) or call.done():
                    return
                await asyncio.sleep(_AGAIN)
        except (self.grpc.RpcError, LfdmExportError) as error:
            logger.debug("%s could not be told to cancel %s: %s", self.address, request_id, error)


async def _response(call: Any) -> Any:
    return await call


def _forget(answer: asyncio.Future[Any]) -> None:
    """Nobody asks for this answer any more, or for why there is none."""
    if not answer.cancelled():
        answer.exception()
