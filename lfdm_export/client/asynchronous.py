"""The client for asyncio."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import TracebackType

from numpy.typing import ArrayLike

from lfdm_export.client.async_connection import AsyncConnection
from lfdm_export.client.async_stream import AsyncStream, OpeningStream
from lfdm_export.client.calls import QUICK
from lfdm_export.client.events import plan_stream
from lfdm_export.client.faults import Attempts
from lfdm_export.client.health import Health, not_up, read_facts
from lfdm_export.client.jobs import Asked, Job, Plan, Report, make_clip, make_plan
from lfdm_export.client.motions import plan_motion
from lfdm_export.client.settings import Settings, import_protocol
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.motion import Motion, as_motion
from lfdm_export.pictures.preprocess import ImageLike
from lfdm_export.protocol.contract import CLIP_MODEL, Array, RequestCancelledError
from lfdm_export.protocol.model_facts import ModelFacts


class AsyncClient:
    """Makes clips on a server; the methods of `lfdm_export.client.Client`, to be awaited. For one event loop.

    Cancelling the task that awaits a clip gives the request up, on the server too.

    Examples:
        >>> async with AsyncClient("localhost:8001") as client:
        ...     clip = await client.generate("face.jpg", label="happiness", seed=0)
    """

    def __init__(self, address: str, settings: Settings | None = None) -> None:
        """Name a server; the connection is opened with the first request.

        Args:
            address: HOST:PORT of its gRPC port.
            settings: TLS, token, time-outs and the rest; the usual ones if None.

        Raises:
            InputError: the address or a file of the settings cannot be used.
            MissingDependencyError: gRPC or Triton's client is not installed.
        """
        self._connection = AsyncConnection(address, settings or Settings())
        self._facts: ModelFacts | None = None
        self._tasks: set[asyncio.Task[dict[str, Array]]] = set()
        self._closing = False

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._connection.address}>"

    async def __aenter__(self) -> AsyncClient:
        """The client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        await self.close()

    async def close(self) -> None:
        """Give up what is under way, on the server too, and close the connection."""
        self._closing = True
        await _end(self._tasks)
        await self._connection.close()

    async def health(self, *, timeout: float = QUICK) -> Health:
        """What is up; see `Client.health`."""
        connection = self._connection
        messages, _ = import_protocol()
        metadata = connection.settings.metadata()
        stub = connection.stub
        try:
            live, ready, clips, about = await asyncio.gather(
                stub.ServerLive(messages.ServerLiveRequest(), timeout=timeout, metadata=metadata),
                stub.ServerReady(messages.ServerReadyRequest(), timeout=timeout, metadata=metadata),
                stub.ModelReady(messages.ModelReadyRequest(name=CLIP_MODEL), timeout=timeout, metadata=metadata),
                stub.ServerMetadata(messages.ServerMetadataRequest(), timeout=timeout, metadata=metadata),
            )
        except connection.grpc.RpcError as error:
            return not_up(connection.calls.fault(error))
        return Health(live.live, ready.ready, clips.ready, about.version)

    async def facts(self) -> ModelFacts:
        """What the served model is; see `Client.facts`."""
        if self._facts is None:
            connection = self._connection
            attempts = connection.attempts(min(connection.settings.timeout, QUICK))
            response = await connection.unary("ModelConfig", lambda _: connection.calls.config_request(), attempts)
            self._facts = read_facts(response, connection.address)
        return self._facts

    async def labels(self) -> tuple[str, ...]:
        """The labels that the served model knows."""
        return (await self.facts()).labels

    async def generate(
        self,
        image: ImageLike,
        *,
        crop: Crop | None = None,
        label: str | Sequence[str] | None = None,
        text: str | Sequence[str] | None = None,
        text_embedding: ArrayLike | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        warped: bool = False,
        latent: bool = False,
        priority: int = 0,
        deadline: float | None = None,
        request_id: str | None = None,
        progress: Report | None = None,
    ) -> Clip:
        """Make a clip; arguments and errors are those of `Client.generate`."""
        facts = await self.facts()
        asked = Asked(
            image=image,
            crop=crop,
            label=label,
            text=text,
            text_embedding=text_embedding,
            sampler=sampler,
            steps=steps,
            eta=eta,
            guidance_scale=guidance_scale,
            seed=seed,
            warped=warped,
            latent=latent,
            priority=priority,
            deadline=deadline,
            request_id=request_id,
        )
        # Scaling a large photograph takes some 100 ms, in which the event loop should not stand still.
        plan = await asyncio.to_thread(make_plan, asked, facts)
        seconds = self._connection.settings.timeout if deadline is None else deadline
        slots, done = asyncio.Semaphore(self._connection.settings.concurrency), 0

        async def sample(job: Job, attempts: Attempts) -> dict[str, Array]:
            nonlocal done
            async with slots:
                answer = await self._sample(job, plan, facts, attempts)
            done += 1
            if progress is not None:
                progress("clips", done, len(plan.jobs))
            return answer

        if progress is not None:
            progress("clips", 0, len(plan.jobs))
        tasks = [asyncio.create_task(sample(job, self._connection.attempts(seconds))) for job in plan.jobs]
        self._tasks.update(tasks)
        try:
            answers = await asyncio.gather(*tasks)
        except asyncio.CancelledError:
            if self._closing:  # the caller's own task goes on
                raise RequestCancelledError("the client was closed meanwhile") from None
            raise
        finally:  # if one failed, nothing of the batch is of use any more
            await _end(tasks)
            self._tasks.difference_update(tasks)
        return make_clip(answers, plan, facts)

    async def animate(
        self,
        image: ImageLike,
        motion: Motion | str | os.PathLike[str],
        *,
        crop: Crop | None = None,
        deadline: float | None = None,
    ) -> Clip:
        """Make a clip of `image` moving as an earlier clip did; arguments and errors are those of `Client.animate`."""
        facts = await self.facts()
        plan = await asyncio.to_thread(lambda: plan_motion(image, as_motion(motion), facts, crop))
        attempts = self._connection.attempts(self._connection.settings.timeout if deadline is None else deadline)
        name = plan.request_id
        encoded = plan.encoded(
            await self._connection.unary("ModelInfer", plan.encode_request, attempts, request_id=name)
        )
        response = await self._connection.unary(
            "ModelInfer", lambda left: plan.decode_request(encoded, left), attempts, request_id=name
        )
        return plan.clip(response)

    def stream(
        self,
        image: ImageLike,
        *,
        crop: Crop | None = None,
        label: str | None = None,
        text: str | None = None,
        text_embedding: ArrayLike | None = None,
        sampler: str | None = None,
        steps: int | None = None,
        eta: float | None = None,
        guidance_scale: float | None = None,
        seed: int | None = None,
        preview_every: int = 0,
        progress_every: int = 0,
        priority: int = 0,
        deadline: float | None = None,
        request_id: str | None = None,
    ) -> OpeningStream:
        """Make one clip, and tell of it meanwhile; arguments and errors are those of `Client.stream`.

        Examples:
            >>> async with client.stream("face.jpg", label="happiness", progress_every=1) as stream:
            ...     async for event in stream:
            ...         print(event)
        """
        asked = Asked(
            image=image,
            crop=crop,
            label=label,
            text=text,
            text_embedding=text_embedding,
            sampler=sampler,
            steps=steps,
            eta=eta,
            guidance_scale=guidance_scale,
            seed=seed,
            priority=priority,
            deadline=deadline,
            request_id=request_id,
        )
        seconds = self._connection.settings.timeout if deadline is None else deadline

        async def begin() -> AsyncStream:
            facts = await self.facts()
            plan, job = await asyncio.to_thread(
                plan_stream, asked, facts, preview_every=preview_every, progress_every=progress_every
            )
            return AsyncStream(self._connection, plan, job, facts, seconds)

        return OpeningStream(begin)

    async def cancel(self, request_id: str) -> bool:
        """Give up a request on the server; see `Client.cancel`.

        Returns:
            Whether the server had it waiting or running.
        """
        connection = self._connection
        attempts = connection.attempts(QUICK)
        response = await connection.unary(
            "ModelInfer", lambda _: connection.calls.cancel_request(request_id), attempts, request_id=request_id
        )
        return connection.calls.cancel_answer(response)

    async def _sample(self, job: Job, plan: Plan, facts: ModelFacts, attempts: Attempts) -> dict[str, Array]:
        """The answer to one sample's request."""
        calls = self._connection.calls
        response = await self._connection.unary(
            "ModelInfer",
            lambda seconds: calls.clip_request(job, plan, seconds),
            attempts,
            request_id=job.request_id,
            tell=True,
        )
        return calls.clip_answer(response, job, plan, facts)


async def _end(tasks: Sequence[asyncio.Task[dict[str, Array]]] | set[asyncio.Task[dict[str, Array]]]) -> None:
    """Cancel tasks, and wait until they are done."""
    running = [task for task in tasks if not task.done()]
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
