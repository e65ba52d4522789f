"""A clip in the making, for threads."""

from __future__ import annotations

from collections.abc import Iterator
from types import TracebackType
from typing import Any

from lfdm_export.client.connection import Connection
from lfdm_export.client.events import Assembly, Event
from lfdm_export.client.jobs import Job, Plan
from lfdm_export.pictures.clip import Clip
from lfdm_export.protocol.model_facts import ModelFacts


class Stream:
    """One clip in the making: iterate over its events.

    Examples:
        >>> with client.stream("face.jpg", label="happiness", progress_every=1) as stream:
        ...     for event in stream:
        ...         print(event)
        ...     stream.clip().save("happiness.gif")

    Attributes:
        request_id: of the request.
        seed: of its noise.
    """

    def __init__(self, connection: Connection, plan: Plan, job: Job, facts: ModelFacts, seconds: float) -> None:
        """Use `lfdm_export.client.Client.stream`."""
        self.request_id, (self.seed,) = job.request_id, plan.seeds
        self._connection, self._plan, self._job = connection, plan, job
        self._assembly = Assembly(plan, job, facts)
        self._flight = connection.flight("", seconds)
        self._events = self._run()

    def __repr__(self) -> str:
        return f"<Stream {self.request_id}: seed {self.seed}, {self._assembly.state()}>"

    def __enter__(self) -> Stream:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give the request up, unless it is done."""
        self.close()

    def __iter__(self) -> Iterator[Event]:
        """The events, up to and with `Done`."""
        return self._events

    def close(self) -> None:
        """Give the request up, unless it is done; for any thread."""
        self._flight.give_up()

    def clip(self) -> Clip:
        """The clip, once `Done` has come; without warped images and latent.

        Raises:
            ServerError: it has not come.
        """
        return self._assembly.clip()

    def _run(self) -> Iterator[Event]:
        connection, flight, answered = self._connection, self._flight, False
        with connection.under_way([flight]):
            while True:
                call = flight.start(self._begin)
                try:
                    for response in call:
                        if response.error_message:
                            fault = connection.calls.stream_fault(response.error_message, self._job, answered=answered)
                            break
                        tensors = connection.calls.stream_answer(response)
                        answered = True
                        yield self._assembly.take(tensors)
                    else:
                        self._assembly.clip()  # raises if the end came too early
                        return
                except connection.grpc.RpcError as error:
                    fault = connection.fault(flight, error, answered=answered)
                finally:
                    call.cancel()
                connection.pause_or_raise(flight, fault)

    def _begin(self, seconds: float) -> Any:
        connection = self._connection
        return connection.stub.ModelStreamInfer(
            iter((connection.calls.stream_request(self._job, self._plan, seconds),)),
            timeout=seconds,
            metadata=connection.settings.metadata(),
            compression=connection.settings.grpc_compression(),
        )
