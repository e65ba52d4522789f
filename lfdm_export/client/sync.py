"""The client for ordinary programs and threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType

from numpy.typing import ArrayLike

from lfdm_export.client.calls import QUICK
from lfdm_export.client.connection import Connection, Flight
from lfdm_export.client.events import plan_stream
from lfdm_export.client.faults import Attempts
from lfdm_export.client.health import Health, not_up, read_facts
from lfdm_export.client.jobs import Asked, Job, Plan, Report, make_clip, make_plan
from lfdm_export.client.motions import plan_motion
from lfdm_export.client.settings import Retry, Settings, import_protocol
from lfdm_export.client.sync_stream import Stream
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.motion import Motion, as_motion
from lfdm_export.pictures.preprocess import ImageLike
from lfdm_export.protocol.contract import CLIP_MODEL, Array
from lfdm_export.protocol.model_facts import ModelFacts


class Client:
    """Makes clips on a server. For any number of threads.

    Examples:
        >>> with Client("localhost:8001") as client:
        ...     client.generate("face.jpg", label="happiness", seed=0).save("happiness.gif")
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
        self._connection = Connection(address, settings or Settings())
        self._facts: ModelFacts | None = None

    @property
    def settings(self) -> Settings:
        """Those of the connection."""
        return self._connection.settings

    def __repr__(self) -> str:
        return f"<Client of {self._connection.address}>"

    def __enter__(self) -> Client:
        """The client itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Give up what is under way, on the server too, and close the connection."""
        self._connection.close()

    # --- What the server is ---------------------------------------------------------------------

    def health(self, *, timeout: float = QUICK) -> Health:
        """What is up; a server that cannot be reached is not an error here.

        Raises:
            AuthenticationError: the server does not accept the token or the certificate.
            ServerError: TLS does not fit, or it is no such server.
        """
        connection = self._connection
        messages, _ = import_protocol()
        requests = {
            "ServerLive": messages.ServerLiveRequest(),
            "ServerReady": messages.ServerReadyRequest(),
            "ModelReady": messages.ModelReadyRequest(name=CLIP_MODEL),
            "ServerMetadata": messages.ServerMetadataRequest(),
        }
        attempts = Attempts(Retry(attempts=1), timeout)
        try:
            live, ready, clips, about = (
                getattr(connection.stub, method)(
                    request, timeout=attempts.begin(), metadata=connection.settings.metadata()
                )
                for method, request in requests.items()
            )
        except connection.grpc.RpcError as error:
            return not_up(connection.calls.fault(error))
        return Health(live.live, ready.ready, clips.ready, about.version)

    def facts(self) -> ModelFacts:
        """What the served model is: labels, sizes, defaults. Asked for once.

        Raises:
            ServerError: the server cannot be reached, or does not say.
        """
        if self._facts is None:
            connection = self._connection
            flight = connection.flight("", min(connection.settings.timeout, QUICK))
            with connection.under_way([flight]):
                response = connection.unary("ModelConfig", lambda _: connection.calls.config_request(), flight)
            self._facts = read_facts(response, connection.address)
        return self._facts

    def labels(self) -> tuple[str, ...]:
        """The labels that the served model knows.

        Raises:
            ServerError: the server cannot be reached, or does not say.
        """
        return self.facts().labels

    # --- Clips ----------------------------------------------------------------------------------

    def generate(
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
        facts = self.facts()
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
        plan = make_plan(asked, facts)
        seconds = self._connection.settings.timeout if deadline is None else deadline
        flights = [self._connection.flight(job.request_id, seconds) for job in plan.jobs]
        with self._connection.under_way(flights):
            answers = self._together(plan, facts, flights, progress)
        return make_clip(answers, plan, facts)

    def animate(
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
        plan = plan_motion(image, as_motion(motion), self.facts(), crop)
        seconds = self._connection.settings.timeout if deadline is None else deadline
        first, second = (self._connection.flight(plan.request_id, seconds) for _ in range(2))
        with self._connection.under_way([first, second]):
            encoded = plan.encoded(self._connection.unary("ModelInfer", plan.encode_request, first))
            response = self._connection.unary("ModelInfer", lambda left: plan.decode_request(encoded, left), second)
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
    ) -> Stream:
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
        """
        facts = self.facts()
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
        plan, job = plan_stream(asked, facts, preview_every=preview_every, progress_every=progress_every)
        seconds = self._connection.settings.timeout if deadline is None else deadline
        return Stream(self._connection, plan, job, facts, seconds)

    def cancel(self, request_id: str) -> bool:
        """Give up a request, here and on the server.

        Returns:
            Whether the server had it waiting or running.

        Raises:
            ServerError: the server cannot be reached.
        """
        return self._connection.cancel(request_id, QUICK)

    def _together(
        self, plan: Plan, facts: ModelFacts, flights: Sequence[Flight], progress: Report | None
    ) -> list[dict[str, Array]]:
        """The answers of all samples; if one fails, the others are given up."""
        if progress is not None:
            progress("clips", 0, len(flights))
        failures: list[BaseException] = []

        def sample(job: Job, flight: Flight) -> dict[str, Array]:
            if failures:
                raise failures[0]  # not begun: its answer would be of no use
            try:
                return self._sample(job, plan, facts, flight)
            except BaseException as error:
                failures.append(error)
                raise

        futures: list[Future[dict[str, Array]]] = []
        with ThreadPoolExecutor(min(len(flights), self._connection.settings.concurrency), "lfdm-client") as pool:
            try:
                futures += (pool.submit(sample, job, flight) for job, flight in zip(plan.jobs, flights, strict=True))
                pending = set(futures)
                while pending and not failures:
                    _, pending = wait(pending, return_when=FIRST_COMPLETED)
                    if progress is not None and not failures:
                        progress("clips", len(futures) - len(pending), len(futures))
                if failures:
                    raise failures[0]
            except BaseException as error:  # one failed, or Ctrl-C: nothing of the batch is of use any more
                failures.append(error)
                self._connection.abandon(flights)
                raise
        return [future.result() for future in futures]

    def _sample(self, job: Job, plan: Plan, facts: ModelFacts, flight: Flight) -> dict[str, Array]:
        """The answer to one sample's request."""
        calls = self._connection.calls
        response = self._connection.unary("ModelInfer", lambda seconds: calls.clip_request(job, plan, seconds), flight)
        return calls.clip_answer(response, job, plan, facts)
