"""The client for asyncio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from types import TracebackType

from numpy.typing import ArrayLike

from lfdm_export.client.calls import QUICK
from lfdm_export.client.connection import Connection, Flight
from lfdm_export.client.events import plan_stream
from lfdm_export.client.faults import Attempts
from lfdm_export.client.health import Health, not_up, read_facts
from lfdm_export.client.jobs import Asked, Job, Plan, make_clip, make_plan
from lfdm_export.client.motions import plan_motion
from lfdm_export.client.settings import Retry, Settings, import_protocol
from lfdm_export.client.stream import AsyncStream, OpeningStream
from lfdm_export.client.waiting import Suspending, Waiting
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.motion import Motion, as_motion
from lfdm_export.pictures.preprocess import ImageLike
from lfdm_export.progress import Progress, report
from lfdm_export.protocol.contract import CLIP_MODEL, Array
from lfdm_export.protocol.model_facts import ModelFacts
from lfdm_export.sampling.options import SamplingOptions


class AsyncClient:
    """Makes clips on a server, for one event loop. `lfdm_export.client.Client` has the same methods, not to be awaited.

    Cancelling the task that awaits a clip gives the request up, on the server too.

    Examples:
        >>> async with AsyncClient("localhost:8001") as client:
        ...     clip = await client.generate("face.jpg", label="happiness", seed=0)
    """

    def __init__(self, address: str, settings: Settings | None = None, *, waiting: Waiting | None = None) -> None:
        """Name a server; the connection is opened with the first request.

        Args:
            address: HOST:PORT of its gRPC port.
            settings: TLS, token, time-outs and the rest; the usual ones if None.
            waiting: None for asyncio; `lfdm_export.client.Client` waits without it.

        Raises:
            InputError: the address or a file of the settings cannot be used.
            MissingDependencyError: gRPC or Triton's client is not installed.
        """
        self._connection = Connection(address, settings or Settings(), waiting or Suspending())
        self._facts: ModelFacts | None = None

    @property
    def settings(self) -> Settings:
        """Those of the connection."""
        return self._connection.settings

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
        await self._connection.close()

    async def health(self, *, timeout: float = QUICK) -> Health:
        """What is up; a server that cannot be reached is not an error here.

        Raises:
            AuthenticationError: the server does not accept the token or the certificate.
            ServerError: TLS does not fit, or it is no such server.
        """
        connection, (messages, _), seconds = self._connection, import_protocol(), Attempts(Retry(), timeout).begin()
        requests = {
            "ServerLive": messages.ServerLiveRequest(),
            "ServerReady": messages.ServerReadyRequest(),
            "ModelReady": messages.ModelReadyRequest(name=CLIP_MODEL),
            "ServerMetadata": messages.ServerMetadataRequest(),
        }
        calls = [connection.begin(method, request, seconds) for method, request in requests.items()]
        try:
            live, ready, clips, about = [await connection.waiting.answer(call) for call in calls]
        except connection.grpc.RpcError as error:
            return not_up(connection.calls.fault(error))
        finally:
            for call in calls:
                call.cancel()
        return Health(live.live, ready.ready, clips.ready, about.version)

    async def facts(self) -> ModelFacts:
        """What the served model is: labels, sizes, defaults. Asked for once.

        Raises:
            ServerError: the server cannot be reached, or does not say.
        """
        if self._facts is None:
            connection = self._connection
            flight = connection.flight("", min(connection.settings.timeout, QUICK))
            with connection.under_way(flight):
                response = await connection.unary("ModelConfig", lambda _: connection.calls.config_request(), flight)
            self._facts = read_facts(response, connection.address)
        return self._facts

    async def labels(self) -> tuple[str, ...]:
        """The labels that the served model knows.

        Raises:
            ServerError: the server cannot be reached, or does not say.
        """
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
        progress: Progress | None = None,
    ) -> Clip:
        """Make a clip of `image` moving as the label says, as `lfdm_export.generate.pipeline.Pipeline.generate` does.

        Several images, labels or seeds are as many requests at once.

        Args:
            image: a path, a PIL image, (H,W,3) uint8, or (B,H,W,3) uint8 for a batch.
            crop: what is cut out of the image first; see `lfdm_export.generate.pipeline.Pipeline.generate`.
            label: a known label, or one a sample.
            text: free text, or one a sample; for models with a text encoder.
            text_embedding: (text_width,) or (B, text_width).
            sampler: a name of `lfdm_export.sampling.tables.SAMPLERS`; None for the model's default, as below.
            steps: sampling steps.
            eta: DDIM's share of fresh noise, 0 … 1.
            guidance_scale: 1 as trained, above 1 for more of the label.
            seed: one a sample; a single one gives sample i the seed ``seed + i``. None draws one, which the clip names.
            warped: ask for the warped images too.
            latent: ask for the latent too.
            priority: -1000 … 1000, higher goes first.
            deadline: seconds for the whole call; None for the settings' `timeout`.
            request_id: for logs, traces and `cancel`; sample i of several has ``request_id-i``. None for a new one.
            progress: called as ``progress("clips", done, total)``.

        Raises:
            InputError: an argument cannot be used, here or there.
            ServerUnavailableError: no server is there, or it takes no more requests now.
            DeadlineError: the clip was not there in time.
            RequestCancelledError: `cancel` or `close` was called meanwhile.
            AuthenticationError: the token or the certificate is not accepted.
            ServerError: the server failed in another way.
        """
        facts = await self.facts()
        asked = Asked(
            image=image,
            crop=crop,
            label=label,
            text=text,
            text_embedding=text_embedding,
            options=SamplingOptions(sampler, steps, eta, guidance_scale),
            seed=seed,
            warped=warped,
            latent=latent,
            priority=priority,
            deadline=deadline,
            request_id=request_id,
        )
        # Scaling a large photograph takes some 100 ms, in which an event loop should not stand still.
        plan = await self._connection.waiting.aside(partial(make_plan, asked, facts))
        answers = await self._answers(plan, facts, self.settings.timeout if deadline is None else deadline, progress)
        return make_clip(answers, plan, facts)

    async def animate(
        self,
        image: ImageLike,
        motion: Motion | str | os.PathLike[str],
        *,
        crop: Crop | None = None,
        deadline: float | None = None,
    ) -> Clip:
        """Make a clip of `image` moving as an earlier clip did; see `lfdm_export.generate.pipeline.Pipeline.animate`.

        Nothing is sampled: the server encodes the picture and decodes the motion's latent. With the picture of that
        clip, on the same server, the frames are the same to the bit.

        Args:
            image: a path, a PIL image or (H,W,3) uint8.
            motion: ``clip.motion`` of a clip (ask for its latent), or the path of one that was saved as ``.motion``.
            crop: what is cut out of the image first; see `lfdm_export.generate.pipeline.Pipeline.generate`.
            deadline: seconds for both requests together; None for the settings' `timeout`.

        Raises:
            InputError: the image or the motion cannot be used, or the motion is of a model of other sizes.
            ServerError: see `generate`.
        """
        facts = await self.facts()
        connection = self._connection
        plan = await connection.waiting.aside(lambda: plan_motion(image, as_motion(motion), facts, crop))
        flight = connection.flight(plan.request_id, self.settings.timeout if deadline is None else deadline)
        with connection.under_way(flight):
            encoded = plan.encoded(await connection.unary("ModelInfer", plan.encode_request, flight))
            response = await connection.unary("ModelInfer", lambda left: plan.decode_request(encoded, left), flight)
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
        """Make one clip, and tell of it meanwhile.

        The request is sent when the first event is asked for. Leaving the stream early gives the request up.

        Args:
            image: as for `generate`, and so are the others.
            crop: what is cut out of it first.
            label: a known label.
            text: free text.
            text_embedding: (text_width,).
            sampler: its name.
            steps: sampling steps.
            eta: DDIM's share of fresh noise.
            guidance_scale: of classifier-free guidance.
            seed: of the noise; None draws one.
            preview_every: a `Preview` after each so many steps; 0 for none. Each costs the decoding of some frames.
            progress_every: a `Progress` after each so many steps; 0 for none.
            priority: higher goes first.
            deadline: seconds; None for the settings' `timeout`.
            request_id: None for a new one.

        Raises:
            InputError: an argument cannot be used. The errors of `generate` come with the events.

        Examples:
            >>> async with client.stream("face.jpg", label="happiness", progress_every=1) as stream:
            ...     async for event in stream:
            ...         print(event)
        """
        seconds = self.settings.timeout if deadline is None else deadline

        async def begin() -> AsyncStream:
            asked = Asked(
                image=image,
                crop=crop,
                label=label,
                text=text,
                text_embedding=text_embedding,
                options=SamplingOptions(sampler, steps, eta, guidance_scale),
                seed=seed,
                priority=priority,
                deadline=deadline,
                request_id=request_id,
            )
            facts = await self.facts()
            plan, job = await self._connection.waiting.aside(
                partial(plan_stream, asked, facts, preview_every=preview_every, progress_every=progress_every)
            )
            return AsyncStream(self._connection, plan, job, facts, seconds)

        return OpeningStream(begin)

    async def cancel(self, request_id: str) -> bool:
        """Give up a request, here and on the server.

        Returns:
            Whether the server had it waiting or running.

        Raises:
            ServerError: the server cannot be reached.
        """
        return await self._connection.cancel(request_id, QUICK)

    async def _answers(
        self, plan: Plan, facts: ModelFacts, seconds: float, progress: Progress | None
    ) -> list[dict[str, Array]]:
        """The answers of all samples; if one fails, the others are given up."""
        connection, total = self._connection, len(plan.jobs)
        flights = [connection.flight(job.request_id, seconds, told=True) for job in plan.jobs]

        async def sample(job: Job, flight: Flight) -> dict[str, Array]:
            response = await connection.unary(
                "ModelInfer", lambda left: connection.calls.clip_request(job, plan, left), flight
            )
            return connection.calls.clip_answer(response, job, plan, facts)

        report(progress, "clips", 0, total)
        with connection.under_way(*flights):
            return await connection.waiting.together(
                [partial(sample, *pair) for pair in zip(plan.jobs, flights, strict=True)],
                self.settings.concurrency,
                lambda done: report(progress, "clips", done, total),
                partial(connection.abandon, flights),
            )
