"""One ModelStreamInfer call: any number of requests and their answers in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio

from lfdm_export.client.settings import import_protocol
from lfdm_export.protocol.contract import STREAM_MODEL
from lfdm_export.serving.front.checks import MOST_ID
from lfdm_export.serving.front.flights import Flight
from lfdm_export.serving.front.grpc_messages import MessageDoor, parsed
from lfdm_export.serving.front.inflate import inflated_message
from lfdm_export.serving.front.refusal import RefusedError, forget
from lfdm_export.serving.front.service import Service, named
from lfdm_export.serving.front.triton import LOST_SENTENCE, refused

#: Serialized field that sets the request id in a stream's answer to ""; protobuf keeps the last of two.
_NO_ID = b"\x12\x02\x1a\x00"


class StreamCall:
    """Both directions of a stream, and its requests that still wait for their last answer."""

    def __init__(self, service: Service, door: MessageDoor, context: Any) -> None:
        """Use `run`."""
        self._service, self._door, self._context = service, door, context
        self._messages, _ = import_protocol()
        self._call: Any = None
        self._message: Any = b""
        self._outstanding: list[tuple[Flight, int]] = []
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._writing = asyncio.Lock()

    async def run(self) -> None:
        """Serve the call to its end.

        Raises:
            RefusedError: the call cannot be served.
        """
        tasks: list[asyncio.Future[None]] = []
        with self._service.flights.holding() as hold:
            # Triton opens the stream while the first request is read: 1 ms. Any first message opens one anyway.
            self._call = self._service.triton.stream(self._context.time_remaining())
            try:
                self._message = await self._door.read(self._context, self._service.limits.message_bytes)
                tasks += map(asyncio.ensure_future, (self._requests(hold), self._answers(hold)))
                await self._until_over(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                self._call.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)  # one of them may have failed as well
                for flight, _ in self._outstanding:
                    self._service.flights.end(flight)
                    if flight.fault is None and flight.model != STREAM_MODEL:  # it notices the end of its stream
                        self._service.abandon(flight.request_id)

    async def _until_over(self, requests: asyncio.Future[Any], answers: asyncio.Future[Any]) -> None:
        waiting = {requests, answers, self._lost}
        while waiting:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if self._lost in done:
                return await self._send_lost()
            for task in done:
                task.result()  # re-raises the task's error
            if answers in done:
                return None
        return None

    async def _requests(self, hold: Callable[[int], None]) -> None:
        """Forward the client's requests until it has sent all."""
        while self._message is not grpc.aio.EOF:
            if not await self._forwarded(hold):
                return  # the server has ended the call: its answers say why
            self._message = await self._door.next(self._context, lambda: self._outstanding)
        await self._call.done_writing()

    async def _forwarded(self, hold: Callable[[int], None]) -> bool:
        """Forward or refuse the last message, and let go of it; returns whether the server's call goes on."""
        message, self._message = self._message, b""
        request_id, size = "", 0
        try:
            message = inflated_message(message, self._service.limits.message_bytes)
            hold(len(message))
            size = len(message)
            async with self._service.checking(size):
                request = parsed(self._messages.ModelInferRequest, message)
                request_id = request.id[:MOST_ID]
                await self._service.check(request)
            model, identity = request.model_name, request.id
            del request  # another copy of the picture
            flight = self._service.begin(model, identity, self._lose)
        except RefusedError as error:
            hold(-size)
            sentence, code = str(error), error.code
            forget(error)
        else:
            self._outstanding.append((flight, size))
            try:
                await self._call.write(named(message, flight.request_id) if flight.unnamed else message)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                return False
            return True
        await self._refuse(sentence, code, request_id)
        return True

    def _lose(self) -> None:
        if not self._lost.done():
            self._lost.set_result(None)

    async def _answers(self, hold: Callable[[int], None]) -> None:
        """Forward the server's answers until its stream ends."""
        while True:
            try:
                message = await self._call.read()
            except grpc.aio.AioRpcError as error:
                if not self._outstanding:
                    raise refused(error) from None
                for flight, _ in self._outstanding:
                    flight.fault = flight.fault or refused(error)
                return await self._send_lost()
            if message is grpc.aio.EOF:
                return None
            unnamed = self._answered(message, hold)
            await self._write(message + _NO_ID if unnamed else message)

    def _answered(self, message: bytes, hold: Callable[[int], None]) -> bool:
        """Record an answer, and end its request at the last one; returns whether the request came without an id."""
        answer = self._messages.ModelStreamInferResponse.FromString(message)
        if not self._outstanding:
            return False
        response = answer.infer_response
        found = next((one for one in self._outstanding if one[0].request_id == response.id), self._outstanding[0])
        if answer.error_message or response.model_name != STREAM_MODEL or _is_last(response):
            self._outstanding.remove(found)
            self._service.flights.end(found[0])
            hold(-found[1])
        return found[0].unnamed

    async def _send_lost(self) -> None:
        """Send an error, in the form of Triton's streams, for each request that will get no answer."""
        for flight, _ in self._outstanding:
            fault = flight.fault
            sentence, code = (LOST_SENTENCE, "UNAVAILABLE") if fault is None else (str(fault), fault.code)
            await self._refuse(sentence, code, "" if flight.unnamed else flight.request_id)

    async def _refuse(self, sentence: str, code: str, request_id: str) -> None:
        answer = self._messages.ModelStreamInferResponse(error_message=f"[{code}] {sentence}")
        answer.infer_response.id = request_id
        await self._write(answer.SerializeToString())

    async def _write(self, message: bytes) -> None:
        async with self._writing:
            await self._door.write(self._context, message)


def _is_last(response: Any) -> bool:
    """Whether a response is the last: of kind "done", or marked by Triton as final."""
    if "triton_final_response" in response.parameters and response.parameters["triton_final_response"].bool_param:
        return True
    for output, content in zip(response.outputs, response.raw_output_contents, strict=False):
        if output.name == "kind":
            return bool(content[4:] == b"done")
    return False
