"""The clients and ``lfdm-generate --url`` against a real Triton server: the same clips as in the local pipeline."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from lfdm_export.bundle.reader import Bundle
from lfdm_export.cli import generate_main
from lfdm_export.client import AsyncClient, Client, Frames, Health, Preview, Progress, RequestCancelledError
from lfdm_export.errors import DeadlineError, InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.clip_files import load_clip
from lfdm_export.protocol.model_facts import ModelFacts
from tests.running_server import RunningServer

PHOTO = Path(__file__).parents[1] / "data" / "astronaut.jpg"


@pytest.fixture(scope="module")
def client(triton_server: RunningServer) -> Iterator[Client]:
    with Client(triton_server.grpc) as opened:
        yield opened


@pytest.fixture(scope="module")
def label(small_bundle: Bundle) -> str:
    return small_bundle.labels[0]


@pytest.fixture(scope="module")
def local(small_bundle: Bundle, label: str) -> Clip:
    return Pipeline.open(small_bundle, threads=1).generate(PHOTO, label=label, seed=[3, 4], steps=4, guidance_scale=1.5)


def levels(found: np.ndarray, expected: np.ndarray) -> int:
    assert found.shape == expected.shape
    return int(np.abs(found.astype(int) - expected).max())


def test_what_the_server_says_of_itself(client: Client, small_bundle: Bundle):
    health = client.health()
    assert health == Health(live=True, ready=True, clips=True, version=health.version)
    assert client.labels() == small_bundle.labels
    assert client.facts() == ModelFacts.of(small_bundle.manifest)


def test_a_batch_is_as_without_a_server(client: Client, local: Clip, label: str):
    clip = client.generate(
        PHOTO, label=label.upper(), seed=[3, 4], steps=4, guidance_scale=1.5, warped=True, latent=True
    )
    assert levels(clip.frames, local.frames) <= 1
    assert levels(clip.warped, local.warped) <= 1
    np.testing.assert_allclose(clip.latent, local.latent, atol=1e-5)
    np.testing.assert_array_equal(clip.source, local.source)
    assert (clip.labels, clip.seeds, clip.residual_flow) == (local.labels, local.seeds, local.residual_flow)
    assert clip.timings is not None
    assert [timings["steps"] for timings in clip.timings] == [4, 4]
    assert all(timings["sampling_seconds"] > 0 for timings in clip.timings)


def test_a_stream_is_as_without_a_server(client: Client, local: Clip, label: str):
    with client.stream(
        PHOTO, label=label, seed=4, steps=4, guidance_scale=1.5, progress_every=1, preview_every=3
    ) as stream:
        events = list(stream)
    # No progress event follows the last step: the frames do.
    assert [event.step for event in events if isinstance(event, Progress)][:3] == [1, 2, 3]
    assert [event.step for event in events if isinstance(event, Preview)] == [3]
    assert sum(isinstance(event, Frames) for event in events) >= 2
    assert levels(stream.clip().frames[0], local.frames[1]) <= 1


def test_asyncio_is_as_without_a_server(triton_server: RunningServer, local: Clip, label: str):
    async def run() -> tuple[Clip, Clip]:
        async with AsyncClient(triton_server.grpc) as client:
            whole = client.generate(PHOTO, label=label, seed=[3, 4], steps=4, guidance_scale=1.5)
            async with client.stream(PHOTO, label=label, seed=3, steps=4, guidance_scale=1.5) as stream:
                async for _ in stream:
                    pass
            return await whole, stream.clip()

    whole, streamed = asyncio.run(run())
    assert levels(whole.frames, local.frames) <= 1
    assert levels(streamed.frames[0], local.frames[0]) <= 1


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_the_command_writes_what_it_writes_without_a_server(
    triton_server: RunningServer, small_bundle: Bundle, label: str, tmp_path: Path, more: list[str]
):
    arguments = ["--image", str(PHOTO), "--label", label, "--steps", "3", "--seed", "5", "-q"]
    assert generate_main(["--url", triton_server.grpc, *arguments, "-o", str(tmp_path / "there.gif"), *more]) == 0
    here = ["--threads", "1", "-o", str(tmp_path / "here.gif")]
    assert generate_main([str(small_bundle.path), *arguments, *here]) == 0
    assert levels(load_clip(tmp_path / "there.gif"), load_clip(tmp_path / "here.gif")) <= 1


def ask(how: str, client: Client, label: str, steps: int, deadline: float | None = None) -> None:
    """Request a clip and discard it."""
    if how == "whole":
        client.generate(PHOTO, label=label, steps=steps, deadline=deadline)
    else:
        list(client.stream(PHOTO, label=label, steps=steps, deadline=deadline))


@pytest.mark.parametrize("how", ["whole", "stream"])
def test_refusals_are_the_servers_own_sentences(client: Client, label: str, how: str):
    with pytest.raises(InputError, match=r"^unknown label 'no such label'"):
        ask(how, client, "no such label", 2)
    with pytest.raises(InputError, match=r"^steps is 100000, expected 1 to"):
        ask(how, client, label, 100_000)


@pytest.mark.parametrize("how", ["whole", "stream"])
def test_a_deadline_is_kept(client: Client, label: str, how: str):
    with pytest.raises(DeadlineError):
        ask(how, client, label, 900, deadline=0.5)


def test_cancelling_frees_the_server(client: Client, label: str):
    raised: list[Exception] = []

    def wait() -> None:
        try:
            client.generate(PHOTO, label=label, steps=900, request_id="to be cancelled")
        except RequestCancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    while not client.cancel("to be cancelled"):
        assert thread.is_alive()
        time.sleep(0.05)
    thread.join(60)
    assert len(raised) == 1
    end = time.monotonic() + 60
    while client.cancel("to be cancelled"):  # its last step may still run
        assert time.monotonic() < end, "it goes on"
        time.sleep(0.05)


def test_a_motion_moves_pictures_there_as_it_does_here(
    client: Client, triton_server: RunningServer, local: Clip, label: str, tmp_path: Path
):
    made = client.generate(PHOTO, label=label, seed=3, steps=4, warped=True, latent=True)
    (path,) = made.save(tmp_path / "a.motion")
    again = client.animate(PHOTO, path)
    for name in ("frames", "warped", "latent", "source"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
    assert (again.labels, again.seeds, again.metadata(0)["made_by"]) == ((label,), (3,), "animate")

    async def animate() -> Clip:
        async with AsyncClient(triton_server.grpc) as other:
            return await other.animate(PHOTO, made.motion)

    np.testing.assert_array_equal(asyncio.run(animate()).frames, made.frames)
    here = local.sample(0)
    assert levels(client.animate(PHOTO, here.motion).frames, here.frames) <= 1
    words = ["--image", str(PHOTO), "--motion", str(path), "-o", str(tmp_path / "b.npz"), "-q"]
    assert generate_main(["--url", triton_server.grpc, *words]) == 0
    np.testing.assert_array_equal(load_clip(tmp_path / "b.npz"), made.frames[0])
