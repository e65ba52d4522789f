"""The client for asyncio."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from types import TracebackType

from numpy.typing import ArrayLike

from lfdm_export.client.calls import QUICK
from lfdm_export.client.connection import Connection, Flight
from lfdm_export.client.events import Reports, plan_stream
from lfdm_export.client.faults import Attempts
from lfdm_export.client.health import Health, not_up, read_facts
from lfdm_export.client.jobs import Arguments, Job, Plan, make_clip, make_plan
from lfdm_export.client.motions import plan_motion
from lfdm_export.client.settings import Retry, Settings, import_protocol
from lfdm_export.client.stream import AsyncStream, OpeningStream
from lfdm_export.client.waiting import Suspending, Waiting
from lfdm_export.generate.frame_choice import FrameChoice
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.motion import Motion, as_motion
from lfdm_export.pictures.preprocess import ImageLike
from lfdm_export.progress import Progress, report
from lfdm_export.protocol.contract import CLIP_MODEL, Array
from lfdm_export.protocol.model_facts import ModelFacts
from lfdm_export.sampling.options import WHOLE, SamplingOptions


class AsyncClient:
    """Generates clips on a server, within one event loop. `lfdm_export.client.Client` has the same methods, blocking.

    Canceling the task that awaits a clip cancels its request, on the server too.

    Examples:
        >>> async with AsyncClient("localhost:8001") as client:
        ...     clip = await client.generate("face.jpg", label="happiness", seed=0)
    """

    def __init__(self, address: str, settings: Settings | None = None, *, waiting: Waiting | None = None) -> None:
        """Set the server's address; the first request opens the connection.

        Args:
            address: HOST:PORT of the server's gRPC endpoint.
            settings: TLS, token, timeouts and limits; None uses the defaults of `Settings`.
            waiting: how calls wait; None uses asyncio. `lfdm_export.client.Client` passes `Blocking`.

        Raises:
            InputError: the address or a file named in the settings is invalid.
            MissingDependencyError: gRPC or Triton's client is not installed.
        """
        self._connection = Connection(address, settings or Settings(), waiting or Suspending())
        self._facts: ModelFacts | None = None

    @property
    def settings(self) -> Settings:
        """Settings of the connection."""
        return self._connection.settings

    def __repr__(self) -> str:
        return f"<AsyncClient of {self._connection.address}>"

    async def __aenter__(self) -> AsyncClient:
        """Return the client itself."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the client."""
        await self.close()

    async def close(self) -> None:
        """Cancel the requests in progress, on the server too, and close the connection."""
        await self._connection.close()

    async def health(self, *, timeout: float = QUICK) -> Health:
        """Query the server's health; an unreachable server is not an error.

        Raises:
            AuthenticationError: the server rejects the token or the certificate.
            ServerError: the TLS settings do not match the server's, or the server is of another kind.
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
        """Labels, sizes and defaults of the served model. Requested once, then cached.

        Raises:
            ServerError: the server is unreachable, or does not report them.
        """
        if self._facts is None:
            connection = self._connection
            flight = connection.flight("", min(connection.settings.timeout, QUICK))
            with connection.under_way(flight):
                response = await connection.unary("ModelConfig", lambda _: connection.calls.config_request(), flight)
            self._facts = read_facts(response, connection.address)
        return self._facts

    async def labels(self) -> tuple[str, ...]:
        """Labels of the served model.

        Raises:
            ServerError: the server is unreachable, or does not report them.
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
        guidance_interval: tuple[float, float] = WHOLE,
        seed: int | Sequence[int] | None = None,
        warped: bool = False,
        latent: bool = False,
        priority: int = 0,
        deadline: float | None = None,
        request_id: str | None = None,
        progress: Progress | None = None,
    ) -> Clip:
        """Generate a clip of `image` for a label, as `lfdm_export.generate.pipeline.Pipeline.generate` does.

        Several images, labels or seeds are sent as concurrent requests, one per sample.

        Args:
            image: a path, a PIL image, (H,W,3) uint8, or (B,H,W,3) uint8 for a batch.
            crop: region of the image to use: "center", the largest square in its middle; "face", a square around the
                largest face; or (x, y, width, height) in pixels. None keeps the whole image, and pads it to a square
                with black bars.
            label: a label of the model, or one per sample.
            text: free text, or one per sample; only for models with a text encoder.
            text_embedding: embedding of the text, (text_width,) or (B, text_width).
            sampler: a name of `lfdm_export.sampling.tables.SAMPLERS`. For this and the next three arguments, None uses
                the model's default.
            steps: sampling steps.
            eta: DDIM's share of fresh noise, in [0, 1].
            guidance_scale: scale of classifier-free guidance: 1 as trained; above 1 strengthens the label.
            guidance_interval: (low, high), shares of the schedule, 0 (no noise) … 1 (pure noise), in which guidance
                acts. Steps outside it use the conditional prediction alone, at half the cost.
            seed: one per sample; a single seed gives sample i ``seed + i``. None draws one, stored in the clip.
            warped: whether to return the warped images too.
            latent: whether to return the latent too.
            priority: -1000 … 1000; higher runs first.
            deadline: seconds for the whole call; None uses `Settings.timeout`.
            request_id: ID for logs, traces and `cancel`; sample i of several has ``request_id-i``. None creates one.
            progress: called as ``progress("clips", done, total)``.

        Raises:
            InputError: the client or the server rejects an argument.
            ServerUnavailableError: the server is unreachable, or accepts no more requests now.
            DeadlineError: the clip did not arrive in time.
            RequestCancelledError: `cancel` or `close` was called during the request.
            AuthenticationError: the server rejects the token or the certificate.
            ServerError: any other failure of the server.
        """
        facts = await self.facts()
        call = Arguments(
            image=image,
            crop=crop,
            label=label,
            text=text,
            text_embedding=text_embedding,
            options=SamplingOptions(sampler, steps, eta, guidance_scale, guidance_interval),
            seed=seed,
            warped=warped,
            latent=latent,
            priority=priority,
            request_id=request_id,
        )
        # Scaling a large image takes some 100 ms; the event loop must not block for so long.
        plan = await self._connection.waiting.aside(partial(make_plan, call, facts))
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
        """Generate a clip of `image` with a saved motion, as `lfdm_export.generate.pipeline.Pipeline.animate` does.

        Nothing is sampled: the server encodes the image and decodes the motion's latent. For the image of the clip that
        the motion comes from, on the same server, the frames are bit-identical.

        Args:
            image: a path, a PIL image or (H,W,3) uint8.
            motion: ``clip.motion`` of a clip generated with ``latent=True``, or the path of a saved ``.motion`` file.
            crop: region of the image to use: "center", the largest square in its middle; "face", a square around the
                largest face; or (x, y, width, height) in pixels. None keeps the whole image, and pads it to a square
                with black bars.
            deadline: seconds for both requests together; None uses `Settings.timeout`.

        Raises:
            InputError: the image or the motion is invalid, or the motion has the sizes of another model.
            ServerError: as for `generate`.
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
        guidance_interval: tuple[float, float] = WHOLE,
        seed: int | None = None,
        frames: Sequence[int] | slice | None = None,
        preview_every: int = 0,
        preview_warped: bool = False,
        progress_every: int = 0,
        priority: int = 0,
        deadline: float | None = None,
        request_id: str | None = None,
    ) -> OpeningStream:
        """Generate one clip and report events meanwhile.

        The first iteration sends the request. Leaving the stream early cancels the request.

        Args:
            image: as for `generate`, like the following arguments.
            crop: region of the image to use.
            label: a label of the model.
            text: free text.
            text_embedding: embedding of the text, (text_width,).
            sampler: name of the sampler.
            steps: sampling steps.
            eta: DDIM's share of fresh noise.
            guidance_scale: scale of classifier-free guidance.
            guidance_interval: (low, high), where guidance acts.
            seed: seed of the noise; None draws one.
            frames: ascending positions of the frames to decode, from 0, or a slice; None for all.
            preview_every: steps between `Preview` events; 0 disables them. Each preview decodes some frames.
            preview_warped: previews show the image moved by the flow alone, which costs no decoding.
            progress_every: steps between `Progress` events; 0 disables them.
            priority: higher runs first.
            deadline: seconds; None uses `Settings.timeout`.
            request_id: ID of the request; None creates one.

        Raises:
            InputError: an argument is invalid. Iteration raises the errors of `generate`.

        Examples:
            >>> async with client.stream("face.jpg", label="happiness", progress_every=1) as stream:
            ...     async for event in stream:
            ...         print(event)
        """
        seconds = self.settings.timeout if deadline is None else deadline

        async def begin() -> AsyncStream:
            call = Arguments(
                image=image,
                crop=crop,
                label=label,
                text=text,
                text_embedding=text_embedding,
                options=SamplingOptions(sampler, steps, eta, guidance_scale, guidance_interval),
                seed=seed,
                priority=priority,
                request_id=request_id,
            )
            facts = await self.facts()
            reports = Reports(preview_every, progress_every, preview_warped)
            plan, job = await self._connection.waiting.aside(
                partial(plan_stream, call, facts, FrameChoice.of(frames, facts.frames), reports)
            )
            return AsyncStream(self._connection, plan, job, facts, seconds)

        return OpeningStream(begin)

    async def cancel(self, request_id: str) -> bool:
        """Cancel a request, in this client and on the server.

        Returns:
            Whether the request was queued or running on the server.

        Raises:
            ServerError: the server is unreachable.
        """
        return await self._connection.cancel(request_id, QUICK)

    async def _answers(
        self, plan: Plan, facts: ModelFacts, seconds: float, progress: Progress | None
    ) -> list[dict[str, Array]]:
        """Return the responses of all samples; if one fails, cancel the others."""
        connection, total = self._connection, len(plan.jobs)
        flights = [connection.flight(job.request_id, seconds, notify=True) for job in plan.jobs]

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
