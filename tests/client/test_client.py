"""The clients against an in-process server with Triton's protocol, which fails on demand."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from PIL import Image

from lfdm_export.client import (
    AsyncClient,
    AsyncStream,
    Client,
    Done,
    Event,
    Frames,
    Health,
    Preview,
    Progress,
    RequestCancelledError,
    Retry,
    Settings,
    Tls,
)
from lfdm_export.errors import (
    AuthenticationError,
    DeadlineError,
    InputError,
    LfdmExportError,
    ServerError,
    ServerUnavailableError,
)
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.preprocess import prepare_image
from lfdm_export.protocol.contract import CLIP_MODEL, PRIORITY_PARAMETER, STREAM_MODEL
from tests.fake_triton import FACTS, FakeTriton, Port, Serving

Arguments = dict[str, Any]
PHOTO = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
#: Seconds after which a test fails.
PATIENCE = 120.0
#: Retries with minimal pauses.
QUICK = Retry(first_pause=0.01, longest_pause=0.02)
SETTINGS = Settings(retry=QUICK, timeout=120)


@pytest.fixture
def fake() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def address(fake: FakeTriton) -> Iterator[str]:
    with Serving(fake) as serving:
        yield serving.address
        fake.gate.set()


@pytest.fixture
def client(address: str) -> Iterator[Client]:
    with Client(address, SETTINGS) as opened:
        yield opened


def generate(kind: str, address: str, settings: Settings = SETTINGS, **arguments: Any) -> Clip:
    """Call `generate` of either client."""
    every: Arguments = {"image": PHOTO, "label": "anger", "seed": 3} | arguments
    if kind == "sync":
        with Client(address, settings) as client:
            return client.generate(**every)

    async def run() -> Clip:
        async with AsyncClient(address, settings) as client:
            return await client.generate(**every)

    return asyncio.run(run())


def generate_with(client: Client, arguments: Arguments) -> Clip:
    every: Arguments = {"image": PHOTO, "label": "anger", "seed": 3} | arguments
    return client.generate(**every)


def stream(kind: str, address: str, settings: Settings = SETTINGS, **arguments: Any) -> tuple[list[Event], Clip]:
    """Call `stream` of either client, and return the events and the clip."""
    every: Arguments = {"image": PHOTO, "label": "anger", "seed": 3} | arguments
    if kind == "sync":
        with Client(address, settings) as client, client.stream(**every) as events:
            return list(events), events.clip()

    async def run() -> tuple[list[Event], Clip]:
        async with AsyncClient(address, settings) as client, client.stream(**every) as events:
            return [event async for event in events], events.clip()

    return asyncio.run(run())


def expected_frames(value: int) -> np.ndarray:
    """Return the fake server's frames for the image, when all other inputs add up to `value`."""
    image = prepare_image(PHOTO, FACTS.image_size).astype(int)
    return ((np.arange(FACTS.frames)[:, None, None, None] + value + image) % 256).astype(np.uint8)


ANGER = sum(b"Anger")
MINE: Arguments = {"label": "anger", "request_id": "mine"}
both = pytest.mark.parametrize("kind", ["sync", "async"])


# ------------------------------------------------------------------------------------------- clips


@both
def test_a_clip(kind: str, fake: FakeTriton, address: str):
    clip = generate(kind, address)
    np.testing.assert_array_equal(clip.frames, expected_frames(3 + ANGER)[None])
    np.testing.assert_array_equal(clip.source, prepare_image(PHOTO, FACTS.image_size)[None])
    assert (clip.labels, clip.seeds, clip.residual_flow) == (("Anger",), (3,), False)
    assert clip.timings == ({"queue_seconds": 0.25, "sampling_seconds": 1.5, "steps": 4, "decode_seconds": 0.5},)
    assert clip.warped.shape == (1, 0, 16, 16, 3)
    assert clip.latent.shape == (1, 3, 0, 4, 4)
    (seen,) = fake.seen
    assert (seen.model, seen.outputs) == (CLIP_MODEL, ("frames", "timings"))
    assert set(seen.tensors) == {"image", "label", "seed"}, "the rest is the server's choice"


@both
def test_every_argument_reaches_the_server(kind: str, fake: FakeTriton, address: str):
    clip = generate(
        kind, address, sampler="unipc", steps=7, guidance_scale=1.5, guidance_interval=(0.25, 0.5), seed=2**40,
        warped=True, latent=True, priority=-3, deadline=500.0, request_id="mine",
    )  # fmt: skip
    (seen,) = fake.seen
    assert {name: value.tolist() for name, value in seen.tensors.items() if name != "image"} == {
        "label": [b"Anger"],
        "seed": [2**40],
        "sampler": [b"unipc"],
        "steps": [7],
        "guidance_scale": [1.5],
        "guidance_interval": [0.25, 0.5],
    }
    assert clip.settings["guidance_interval"] == [0.25, 0.5]
    assert (seen.request_id, seen.outputs) == ("mine", ("frames", "warped", "latent", "timings"))
    assert seen.parameters[PRIORITY_PARAMETER] == -3
    assert 400e6 < seen.parameters["timeout"] <= 500e6, "microseconds"
    assert 400 < seen.seconds < 501, "the client does not wait longer either"
    np.testing.assert_array_equal(clip.warped, 255 - clip.frames)
    assert clip.latent.shape == (1, 3, 5, 4, 4)


@both
@pytest.mark.parametrize(
    ("arguments", "value", "words"),
    [
        ({"label": None, "text": "wave"}, sum(b"wave"), ("wave",)),
        ({"label": None, "text_embedding": np.ones(6)}, 6, None),
        ({"label": " HAPPINESS ", "eta": 0.5}, sum(b"happiness") + 5, ("happiness",)),
    ],
)
def test_conditions(kind: str, address: str, arguments: Arguments, value: int, words: Any):
    clip = generate(kind, address, **arguments)
    np.testing.assert_array_equal(clip.frames[0], expected_frames(3 + value))
    assert clip.labels == words


@both
def test_a_batch_is_as_many_requests(kind: str, fake: FakeTriton, address: str):
    seen: list[tuple[str, int, int]] = []
    labels = ["anger", "happiness"] * 10
    settings = Settings(retry=QUICK, timeout=120, concurrency=6)
    clip = generate(
        kind, address, settings, label=labels, request_id="all", progress=lambda *report: seen.append(report)
    )
    assert clip.seeds == tuple(range(3, 23))
    assert clip.labels == ("Anger", "happiness") * 10
    for index, label in enumerate(clip.labels):
        np.testing.assert_array_equal(clip.frames[index], expected_frames(3 + index + sum(label.encode())))
    assert {request.request_id for request in fake.seen} == {f"all-{index}" for index in range(20)}
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert (seen[0], seen[-1]) == (("clips", 0, 20), ("clips", 20, 20))


@both
def test_a_batch_of_images(kind: str, address: str):
    images = np.stack([PHOTO, 255 - PHOTO])
    clip = generate(kind, address, image=images, seed=[5, 9])
    np.testing.assert_array_equal(clip.frames[0], expected_frames(5 + ANGER))
    np.testing.assert_array_equal(clip.source[1], prepare_image(images[1], 16))


@both
def test_a_seed_that_is_not_given_is_drawn_and_told(kind: str, address: str):
    first, second = (generate(kind, address, seed=None) for _ in range(2))
    assert first.seeds != second.seeds
    assert first.seeds is not None
    again = generate(kind, address, seed=first.seeds[0])
    np.testing.assert_array_equal(again.frames, first.frames)


def test_kinds_of_image(client: Client, tmp_path: Path):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    for image in (tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(PHOTO), PHOTO):
        np.testing.assert_array_equal(
            client.generate(image, label="anger", seed=3).frames[0], expected_frames(3 + ANGER)
        )


def test_many_threads_share_a_client(client: Client):
    found: dict[int, Clip] = {}

    def one(seed: int) -> None:
        found[seed] = client.generate(PHOTO, label="anger", seed=seed)

    threads = [threading.Thread(target=one, args=(seed,)) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in range(12):
        np.testing.assert_array_equal(found[seed].frames[0], expected_frames(seed + ANGER))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label": None}, "found 0 of label"),
        ({"text": "wave"}, "found 2 of label"),
        ({"label": None, "text_embedding": np.ones(3)}, r"expected \(6,\)"),
        ({"label": None, "text_embedding": np.full(6, np.nan)}, "not finite"),
        ({"sampler": "euler"}, "sampler: found 'euler'"),
        ({"steps": 0}, "steps: found 0"),
        ({"steps": 2.5}, "steps: found 2.5"),
        ({"eta": float("nan")}, "eta is nan"),
        ({"guidance_scale": "much"}, "guidance_scale is 'much'"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**63}, "seed: found 9223372036854775808"),
        ({"seed": [1, 2], "label": ["anger"] * 3}, "found 1 of images, 3 of labels, 2 of seeds"),
        ({"priority": 1001}, "priority is 1001"),
        ({"request_id": ""}, "request_id is ''"),
        ({"deadline": 0.0}, "deadline is 0.0"),
        ({"image": np.zeros((4, 4), bool)}, "type bool"),
        ({"image": "nowhere.png"}, "nowhere.png does not exist"),
    ],
)
def test_wrong_arguments_are_not_sent(client: Client, fake: FakeTriton, arguments: Arguments, message: str):
    with pytest.raises(InputError, match=message):
        generate_with(client, arguments)
    assert fake.seen == []


# ------------------------------------------------------------------------------------------ streams


@both
def test_a_stream(kind: str, fake: FakeTriton, address: str):
    events, clip = stream(kind, address, progress_every=1, preview_every=3, steps=4)
    frames = expected_frames(3 + ANGER + 4)
    assert [type(event) for event in events] == [*[Progress] * 3, Preview, Progress, *[Frames] * 3, Done]
    assert events[0] == Progress(1, 4)
    assert isinstance(events[3], Preview)
    assert (events[3].step, events[3].indices.tolist()) == (3, [0, 2, 4])
    np.testing.assert_array_equal(events[3].frames, frames[[0, 2, 4]])
    assert [event.first_frame for event in events if isinstance(event, Frames)] == [0, 2, 3]
    np.testing.assert_array_equal(clip.frames[0], frames)
    assert isinstance(events[-1], Done)
    assert events[-1].timings["steps"] == 4
    assert (clip.seeds, clip.labels) == ((3,), ("Anger",))
    assert "triton_grpc_error" not in fake.seen[0].metadata, "Triton 2.51 crashes on it"
    assert fake.seen[0].model == STREAM_MODEL


@both
def test_previews_are_only_made_when_asked_for(kind: str, address: str):
    events, _ = stream(kind, address)
    assert [type(event) for event in events] == [*[Frames] * 3, Done]


@both
def test_a_stream_of_some_frames(kind: str, fake: FakeTriton, address: str):
    chosen = [1, 3]
    events, clip = stream(
        kind, address, frames=chosen, preview_every=3, preview_warped=True, guidance_interval=(0, 0.5), steps=4
    )
    frames = expected_frames(3 + ANGER + 4 + 5)
    assert fake.seen[0].tensors["only_frames"].tolist() == chosen
    np.testing.assert_array_equal(clip.frames[0], frames[chosen])
    assert [event.indices.tolist() for event in events if isinstance(event, Frames)] == [[1], [3], [3]]
    (preview,) = (event for event in events if isinstance(event, Preview))
    np.testing.assert_array_equal(preview.frames, 255 - frames[[0, 2, 4]])
    assert (clip.fps, clip.settings["frame_indices"]) == (5, chosen)
    assert stream(kind, address, frames=slice(0, None, 4))[1].frames.shape[1] == 2


def test_a_stream_that_lacks_a_requested_frame_is_an_error(fake: FakeTriton, address: str):
    def drop(response: Any) -> None:
        if response.outputs[0].name == "kind" and b"frames" in response.raw_output_contents[0]:
            response.raw_output_contents[3] = np.array([0], np.int32).tobytes()

    fake.change = drop
    with pytest.raises(ServerError, match="the end after 1 of 2 frames"):
        stream("sync", address, frames=[1, 3])


def test_a_stream_is_one_clip(client: Client):
    with pytest.raises(InputError, match=r"frames is \[5\], expected ascending positions from 0 to 4"):
        client.stream(PHOTO, label="anger", frames=[5])
    with pytest.raises(InputError, match="found 2 samples"):
        client.stream(PHOTO, label=["anger", "happiness"])  # type: ignore[arg-type]
    with pytest.raises(InputError, match="preview_every is -1"):
        client.stream(PHOTO, label="anger", preview_every=-1)


@both
def test_a_stream_that_dies_in_the_middle_is_not_begun_anew(kind: str, fake: FakeTriton, address: str):
    fake.break_stream_after = 2
    with pytest.raises(ServerUnavailableError, match=r"connection to localhost:[0-9]+ was lost"):
        stream(kind, address)
    assert len(fake.seen) == 1


@both
def test_a_stream_that_dies_before_an_answer_is_begun_anew(kind: str, fake: FakeTriton, address: str):
    fake.refusals = [("UNAVAILABLE", "queue full: 64 are waiting")] * 2
    _, clip = stream(kind, address)
    np.testing.assert_array_equal(clip.frames[0], expected_frames(3 + ANGER))
    assert len(fake.seen) == 3


@both
def test_a_stream_that_ends_too_early_is_an_error(kind: str, fake: FakeTriton, address: str):
    fake.break_stream_after, fake.stream_end = 2, None
    with pytest.raises(ServerError, match="holds 4 of 5 frames and no end"):
        stream(kind, address)


@both
@pytest.mark.parametrize(
    ("code", "details", "kind_of_error", "message"),
    [
        ("INVALID_ARGUMENT", "unknown label 'x'", InputError, "^unknown label 'x'$"),
        ("UNAVAILABLE", "deadline exceeded after 3 of 10 steps", DeadlineError, "^deadline exceeded after 3"),
        ("CANCELLED", "the request was cancelled", RequestCancelledError, "^the request was cancelled$"),
        ("INTERNAL", "the engine failed", ServerError, "failed: the engine failed"),
    ],
)
def test_errors_in_a_stream(
    kind: str, fake: FakeTriton, address: str, code: str, details: str, kind_of_error: type[Exception], message: str
):
    fake.refusals = [(code, details)]
    with pytest.raises(kind_of_error, match=message):
        stream(kind, address)
    assert len(fake.seen) == 1


@both
def test_wrong_frames_in_a_stream(kind: str, fake: FakeTriton, address: str):
    def beyond(response: Any) -> None:
        for index, output in enumerate(response.outputs):
            if output.name == "frame_indices":
                response.raw_output_contents[index] = np.array([4, 5], "<i4").tobytes()

    fake.change = beyond
    with pytest.raises(ServerError, match=r"holds frames \[4, 5\]"):
        stream(kind, address)


def test_leaving_a_stream_gives_it_up(client: Client, fake: FakeTriton):
    fake.gate.clear()
    events = client.stream(PHOTO, label="anger")
    with ThreadPoolExecutor(1) as pool:
        taking = pool.submit(list, events)
        until(lambda: len(fake.seen) == 1)
        events.close()
        with pytest.raises(RequestCancelledError, match="was cancelled here"):
            taking.result(PATIENCE)
    until(lambda: fake.cut_off == 1)


def test_a_stream_that_nobody_holds_is_given_up(client: Client, fake: FakeTriton):
    for event in client.stream(PHOTO, label="anger", progress_every=1):
        assert isinstance(event, Progress)
        break
    gc.collect()
    assert client._client._connection._flights == set()


# --------------------------------------------------------------------------------------- faults


@both
def test_unavailable_twice_then_fine(kind: str, fake: FakeTriton, address: str):
    fake.refusals = [("UNAVAILABLE", "queue full: 64 are waiting")] * 2
    clip = generate(kind, address, seed=None)
    assert len(fake.seen) == 3
    assert len({request.request_id for request in fake.seen}) == 1
    assert {int(request.tensors["seed"][0]) for request in fake.seen} == set(clip.seeds or ()), (
        "the same clip each time"
    )


@both
def test_attempts_come_to_an_end(kind: str, fake: FakeTriton, address: str):
    fake.refusals = [("UNAVAILABLE", "queue full: 64 are waiting")] * 9
    with pytest.raises(ServerUnavailableError, match="is not available: queue full: 64 are waiting") as caught:
        generate(kind, address, request_id="mine")
    assert len(fake.seen) == QUICK.attempts
    assert (caught.value.code, caught.value.request_id) == ("UNAVAILABLE", "mine")


@both
@pytest.mark.parametrize(
    ("code", "details", "kind_of_error", "message"),
    [
        (
            "INVALID_ARGUMENT",
            "in ensemble 'lfdm', unknown label 'x': did you mean",
            InputError,
            "^unknown label 'x': did",
        ),
        ("INVALID_ARGUMENT", "[request id: 7] eta is 2", InputError, "^eta is 2$"),
        (
            "UNAVAILABLE",
            "deadline exceeded after 3 of 10 steps",
            DeadlineError,
            "^deadline exceeded after 3 of 10 steps$",
        ),
        ("DEADLINE_EXCEEDED", "", DeadlineError, "did not answer in time"),
        ("CANCELLED", "the request was cancelled", RequestCancelledError, "^the request was cancelled$"),
        ("PERMISSION_DENIED", "RBAC: access denied", AuthenticationError, r"refused access \(RBAC: access denied\)"),
        ("INTERNAL", "Stub process 'lfdm_sample_0' is not healthy.", ServerError, "failed: Stub process"),
        ("NOT_FOUND", "Request for unknown model: 'lfdm' is not found", ServerError, "does not serve the model"),
        ("UNIMPLEMENTED", "", ServerError, "does not serve the model"),
    ],
)
def test_what_is_not_tried_again(
    kind: str, fake: FakeTriton, address: str, code: str, details: str, kind_of_error: type[Exception], message: str
):
    fake.refusals = [(code, details)]
    with pytest.raises(kind_of_error, match=message):
        generate(kind, address)
    assert len(fake.seen) == 1


@both
def test_a_slow_server_meets_the_deadline(kind: str, fake: FakeTriton, address: str):
    fake.gate.clear()
    with pytest.raises(DeadlineError, match="did not answer in time"):
        generate(kind, address, deadline=0.2)
    with pytest.raises(DeadlineError, match="did not answer in time"):
        stream(kind, address, deadline=0.2)


@both
def test_retries_end_at_the_deadline(kind: str, fake: FakeTriton, address: str):
    fake.refusals = [("UNAVAILABLE", "queue full")] * 9
    settings = Settings(retry=Retry(attempts=9, first_pause=1000, longest_pause=1000))
    with pytest.raises(ServerUnavailableError, match="queue full"):
        generate(kind, address, settings, deadline=300.0)  # below the shortest pause
    assert len(fake.seen) == 1


@both
def test_one_failure_ends_the_batch(kind: str, fake: FakeTriton, address: str):
    """The first request is refused while as many as allowed wait for a response, which the others never get."""
    fake.refused_at_once = ("INVALID_ARGUMENT", "unknown label 'Anger'")
    fake.gate.clear()
    with pytest.raises(InputError, match="unknown label"):
        generate(kind, address, Settings(retry=QUICK, timeout=120, concurrency=4), seed=list(range(40)))
    assert len(fake.seen) < 40, "those that had not begun never did"
    until(lambda: fake.cut_off == len(fake.seen) - 1)


@both
@pytest.mark.parametrize("fault", ["shape", "datatype", "content", "missing", "count"])
def test_wrong_answers(kind: str, fake: FakeTriton, address: str, fault: str):
    def change(response: Any) -> None:
        if fault == "shape":
            response.outputs[0].shape[:] = [5, 32, 8, 3]
        elif fault == "datatype":
            response.outputs[0].datatype = "INT8"
        elif fault == "content":
            response.raw_output_contents[0] = response.raw_output_contents[0][:-1]
        elif fault == "missing":
            del response.outputs[0], response.raw_output_contents[0]
        else:
            del response.raw_output_contents[0]

    fake.change = change
    message = {
        "shape": r"frames in the server's answer has shape \(5, 32, 8, 3\), expected \(5, 16, 16, 3\)",
        "datatype": r"frames as INT8 \(5, 16, 16, 3\), expected UINT8",
        "content": "with 3839 bytes of content",
        "missing": "lacks frames",
        "count": "2 tensors with 1 contents",
    }[fault]
    with pytest.raises(ServerError, match=message):
        generate(kind, address)


@both
def test_a_message_that_is_too_large(kind: str, fake: FakeTriton, address: str):
    def swell(response: Any) -> None:
        response.outputs.add(name="other", datatype="UINT8", shape=[3 << 20])
        response.raw_output_contents.append(bytes(3 << 20))

    fake.change = swell
    np.testing.assert_array_equal(generate(kind, address).frames[0], expected_frames(3 + ANGER))
    with pytest.raises(ServerError, match=r"larger than max.*raise max_message_bytes"):
        generate(kind, address, Settings(retry=QUICK, max_message_bytes=2 << 20))


@both
def test_a_server_that_comes_back(kind: str, fake: FakeTriton, caplog: pytest.LogCaptureFixture):
    """The server restarts after the client was refused and has logged its retry."""
    settings = Settings(retry=Retry(attempts=200, first_pause=0.1, longest_pause=0.1), timeout=120)
    started: list[Serving] = []

    class Start(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "attempt 2 in" in record.getMessage():
                started.append(Serving(fake, port=port.number))

    log, handler = logging.getLogger("lfdm_export.client"), Start()
    with Port() as port, caplog.at_level(logging.INFO, log.name):
        log.addHandler(handler)
        try:
            clip = generate(kind, port.address, settings)
        finally:
            log.removeHandler(handler)
            for serving in started:
                serving.stop()
    np.testing.assert_array_equal(clip.frames[0], expected_frames(3 + ANGER))


@both
def test_no_server(kind: str):
    message = "no server answers at {}; start one with lfdm-serve"
    with Port() as port, pytest.raises(ServerUnavailableError, match=message.format(port.address)):
        generate(kind, port.address)


# --------------------------------------------------------------------------------- cancellation


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came to pass"
        time.sleep(0.01)


def test_cancel_from_another_thread(client: Client, fake: FakeTriton):
    fake.gate.clear()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            client.generate(PHOTO, label="anger", request_id="mine")
        except LfdmExportError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: len(fake.seen) == 1)
    assert client.cancel("mine")
    thread.join(PATIENCE)
    assert isinstance(raised[0], RequestCancelledError)
    assert fake.cancelled == ["mine"]
    assert not client.cancel("another")


def test_cancelling_waits_until_the_sampler_knows_of_the_request(client: Client, fake: FakeTriton):
    fake.gate.clear()
    fake.unknown_for = 3
    raised: list[RequestCancelledError] = []

    def wait() -> None:
        try:
            client.generate(PHOTO, **MINE)
        except RequestCancelledError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: len(fake.seen) == 1)
    assert client.cancel("mine")
    thread.join(PATIENCE)
    assert len(raised) == 1
    assert fake.cancelled == ["mine"] * 4


def test_a_cancelled_task_waits_until_the_sampler_knows_of_the_request(fake: FakeTriton, address: str):
    async def run() -> None:
        async with AsyncClient(address, SETTINGS) as client:
            task = asyncio.create_task(client.generate(PHOTO, **MINE))
            while not fake.seen:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    fake.gate.clear()
    fake.unknown_for = 3
    asyncio.run(run())
    assert fake.cancelled == ["mine"] * 4


def test_closing_gives_up_what_is_under_way(client: Client, fake: FakeTriton):
    fake.gate.clear()
    raised: list[BaseException] = []

    def wait() -> None:
        try:
            client.generate(PHOTO, label="anger", request_id="mine", seed=[1, 2])
        except LfdmExportError as error:
            raised.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    until(lambda: len(fake.seen) == 2)
    client.close()
    thread.join(PATIENCE)
    assert isinstance(raised[0], RequestCancelledError)
    assert set(fake.cancelled) == {"mine-0", "mine-1"}
    with pytest.raises(InputError, match="the client is closed"):
        client.generate(PHOTO, label="anger")


def test_a_cancelled_task_gives_its_request_up(fake: FakeTriton, address: str):
    async def run() -> None:
        async with AsyncClient(address, SETTINGS) as client:
            await client.facts()
            task = asyncio.create_task(client.generate(PHOTO, label="anger", request_id="mine"))
            while not fake.seen:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert not await client.cancel("another")

    fake.gate.clear()
    asyncio.run(run())
    assert fake.cancelled == ["mine", "another"]


def test_closing_gives_up_asynchronous_requests(fake: FakeTriton, address: str):
    async def run() -> None:
        client = AsyncClient(address, SETTINGS)
        task = asyncio.create_task(client.generate(PHOTO, label="anger", request_id="mine"))
        while not fake.seen:
            await asyncio.sleep(0.01)
        await client.close()
        with pytest.raises(RequestCancelledError, match="closed meanwhile"):
            await task
        with pytest.raises(InputError, match="the client is closed"):
            await client.generate(PHOTO, label="anger")

    fake.gate.clear()
    asyncio.run(run())
    assert fake.cancelled == ["mine"]


async def take(events: AsyncStream) -> None:
    async for _ in events:
        pass


def test_leaving_the_context_of_an_asynchronous_stream_gives_it_up(fake: FakeTriton, address: str):
    async def run() -> None:
        async with AsyncClient(address, SETTINGS) as client:
            async with client.stream(PHOTO, label="anger", seed=3, request_id="mine") as stream:
                task = asyncio.create_task(take(stream))
                while not fake.seen:
                    await asyncio.sleep(0.01)
                assert repr(stream) == "<AsyncStream mine: seed 3, 0 of 5 frames>"
            with pytest.raises(RequestCancelledError, match="was cancelled here"):
                await task

    fake.gate.clear()
    asyncio.run(run())
    until(lambda: fake.cut_off == 1)


def test_an_asynchronous_stream_of_wrong_arguments_is_refused_as_it_is_entered(fake: FakeTriton, address: str):
    async def run() -> None:
        async with AsyncClient(address, SETTINGS) as client:
            opening = client.stream(PHOTO, label="anger", steps=0)
            with pytest.raises(InputError, match="steps: found 0"):
                async with opening:
                    raise AssertionError("entered")

    asyncio.run(run())
    assert fake.seen == []


def test_what_the_client_shows_is_one_line(client: Client, address: str):
    assert repr(client) == f"<Client of {address}>"
    assert repr(AsyncClient(address)) == f"<AsyncClient of {address}>"
    assert repr(client.facts()) == "<ModelFacts: fp32, 5 frames of 16x16, 2 labels (Anger, happiness)>"
    with client.stream(PHOTO, label="anger", seed=3, progress_every=1, request_id="mine") as stream:
        assert repr(stream) == "<Stream mine: seed 3, 0 of 5 frames>"
        shown = [repr(event) for event in stream]
        assert repr(stream) == "<Stream mine: seed 3, done>"
    assert any(line.startswith("Frames(2 frames, ") for line in shown), shown
    assert shown[-1].startswith("Done(")
    assert all("\n" not in line and len(line) < 150 for line in shown)
    assert repr(Settings()) == "Settings()"
    assert repr(Settings(timeout=3, token="x")) == "Settings(token=<hidden>, timeout=3)"


def test_leaving_an_asynchronous_stream_gives_it_up(fake: FakeTriton, address: str):
    async def run() -> None:
        async with AsyncClient(address, SETTINGS) as client:
            events = await client.stream(PHOTO, label="anger")  # also without `async with`
            task = asyncio.create_task(take(events))
            while not fake.seen:
                await asyncio.sleep(0.01)
            await events.close()
            with pytest.raises(RequestCancelledError, match="was cancelled here"):
                await task

    fake.gate.clear()
    asyncio.run(run())
    until(lambda: fake.cut_off == 1)


@both
def test_a_server_on_this_machine_is_reached_past_a_proxy(
    kind: str, fake: FakeTriton, address: str, monkeypatch: pytest.MonkeyPatch
):
    for name in ("no_proxy", "NO_PROXY", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # no listener on this port
    quickly = replace(SETTINGS, retry=Retry(attempts=1), timeout=10)
    assert generate(kind, address, quickly).labels == ("Anger",)


# ------------------------------------------------------------------------ uses of the blocking client


@pytest.mark.parametrize(("seed", "told"), [(1, {"mine"}), ([1, 2], {"mine-0", "mine-1"})])
def test_ctrl_c_gives_up_what_is_under_way(client: Client, fake: FakeTriton, seed: int | list[int], told: set[str]):
    def interrupt() -> None:
        until(lambda: len(fake.seen) == len(told))
        os.kill(os.getpid(), signal.SIGINT)

    fake.gate.clear()
    client.facts()
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        client.generate(PHOTO, label="anger", request_id="mine", seed=seed)
    thread.join(PATIENCE)
    assert set(fake.cancelled) == told
    until(lambda: fake.cut_off == len(told))
    fake.gate.set()
    assert client.generate(PHOTO, label="anger").labels == ("Anger",), "the client can still be used"


def test_ctrl_c_gives_up_a_stream(client: Client, fake: FakeTriton):
    def interrupt() -> None:
        until(lambda: len(fake.seen) == 1 and events._stream._flight.call is not None)
        os.kill(os.getpid(), signal.SIGINT)

    fake.gate.clear()
    thread = threading.Thread(target=interrupt)
    with client.stream(PHOTO, label="anger") as events:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            list(events)
    thread.join(PATIENCE)
    until(lambda: fake.cut_off == 1)


def test_a_running_event_loop_does_not_matter(client: Client):
    """A notebook cell has a running event loop."""

    async def cell() -> tuple[Clip, Clip]:
        with client.stream(PHOTO, label="anger", seed=3) as events:
            list(events)
        return client.generate(PHOTO, label=["anger", "anger"], seed=3), events.clip()

    whole, streamed = asyncio.run(cell())
    np.testing.assert_array_equal(whole.frames[:1], streamed.frames)


def test_programs_that_fork_or_end_without_closing(address: str):
    """A child process can use an inherited client, and an open client or stream does not keep a program from ending."""
    program = f"""
import os, numpy as np
from lfdm_export.client import Client
client, photo = Client({address!r}), np.zeros((40, 30, 3), np.uint8)
client.generate(photo, label="anger")
child = os.fork()
if child == 0:
    os._exit(len(client.generate(photo, label=["anger"] * 7).frames))
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(next(iter(client.stream(photo, label="anger", progress_every=1))))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert ran.stdout.splitlines() == ["7", "Progress(step=1, steps=4)"]


def test_errors_show_who_called(client: Client, fake: FakeTriton):
    fake.refusals = [("INVALID_ARGUMENT", "eta is 2")]
    with pytest.raises(InputError) as caught:
        client.generate(PHOTO, label="anger")
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[0] == "test_errors_show_who_called"
    assert "unary" in names
    assert caught.value.__context__ is None or caught.value.__suppress_context__


# ------------------------------------------------------------------------- health, labels, facts


def health(kind: str, address: str, settings: Settings = SETTINGS) -> Health:
    if kind == "sync":
        with Client(address, settings) as client:
            return client.health()

    async def run() -> Health:
        async with AsyncClient(address, settings) as client:
            return await client.health()

    return asyncio.run(run())


@both
def test_health(kind: str, fake: FakeTriton, address: str):
    assert health(kind, address) == Health(live=True, ready=True, clips=True, version="2.51.0")
    fake.ready = False
    assert health(kind, address) == Health(live=True, ready=False, clips=False, version="2.51.0")
    fake.token = "secret"
    with pytest.raises(AuthenticationError):
        health(kind, address)


@both
def test_health_of_nothing(kind: str):
    with Port() as port:
        assert health(kind, port.address) == Health(live=False)


def test_labels_and_facts(client: Client, address: str):
    assert client.labels() == ("Anger", "happiness")
    assert client.facts() == FACTS

    async def run() -> tuple[str, ...]:
        async with AsyncClient(address) as asynchronous:
            return await asynchronous.labels()

    assert asyncio.run(run()) == ("Anger", "happiness")


@pytest.mark.parametrize(
    ("facts", "message"), [("", "no parameter lfdm_facts.*lfdm-serve"), ("{", "cannot be read"), ("{}", "lacks labels")]
)
def test_servers_that_do_not_say_what_they_are(fake: FakeTriton, client: Client, facts: str, message: str):
    fake.facts = facts
    with pytest.raises(LfdmExportError, match=message):
        client.generate(PHOTO, label="anger")


# -------------------------------------------------------------------------------- TLS and tokens


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pems(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pems")
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    trustme.CA().cert_pem.write_to_path(str(folder / "other.pem"))
    person = authority.issue_cert("person@example.org")
    person.private_key_pem.write_to_path(str(folder / "person.key"))
    person.cert_chain_pems[0].write_to_path(str(folder / "person.pem"))
    return folder


def server_credentials(authority: trustme.CA, name: str = "localhost", *, mutual: bool = False) -> Any:
    certificate = authority.issue_cert(name)
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    return grpc.ssl_server_credentials([pair], authority.cert_pem.bytes() if mutual else None, mutual)


@both
def test_tls(kind: str, fake: FakeTriton, authority: trustme.CA, pems: Path):
    with Serving(fake, server_credentials(authority)) as serving:
        for compression in (None, "gzip", "deflate"):
            settings = Settings(tls=Tls(pems / "ca.pem"), compression=compression)
            np.testing.assert_array_equal(
                generate(kind, serving.address, settings).frames[0], expected_frames(3 + ANGER)
            )


@both
def test_certificates_of_both_sides(kind: str, fake: FakeTriton, authority: trustme.CA, pems: Path):
    with Serving(fake, server_credentials(authority, "clips.example.org", mutual=True)) as serving:
        tls = Tls(pems / "ca.pem", pems / "person.key", pems / "person.pem", "clips.example.org")
        assert generate(kind, serving.address, Settings(tls=tls)).seeds == (3,)
        nobody = Settings(tls=Tls(pems / "ca.pem", server_name="clips.example.org"), retry=QUICK)
        with pytest.raises(ServerUnavailableError, match="was lost; if it requires a client certificate"):
            generate(kind, serving.address, nobody)


@pytest.mark.parametrize(
    ("tls", "server", "message"),
    [
        ("other.pem", "localhost", "the certificate of localhost:[0-9]+ is not trusted or names another server"),
        ("ca.pem", "clips.example.org", "the certificate of localhost:[0-9]+ is not trusted or names another server"),
        ("ca.pem", None, "does not speak TLS"),
        (None, "localhost", "connection to localhost:[0-9]+ was lost; if it uses TLS, switch on TLS"),
    ],
)
def test_tls_that_does_not_fit(
    fake: FakeTriton, authority: trustme.CA, pems: Path, tls: str | None, server: str | None, message: str
):
    credentials = None if server is None else server_credentials(authority, server)
    settings = Settings(tls=None if tls is None else Tls(pems / tls), retry=QUICK)
    with Serving(fake, credentials) as serving, pytest.raises(ServerError, match=message):
        generate("sync", serving.address, settings)


@both
def test_tokens_and_headers(kind: str, fake: FakeTriton, address: str, caplog: pytest.LogCaptureFixture):
    fake.token = "top-secret"
    headers = {"x-tenant": "hush-hush"}
    fake.refusals = [("UNAVAILABLE", "queue full")]
    with caplog.at_level(logging.DEBUG):
        generate(kind, address, Settings(token="top-secret", headers=headers, retry=QUICK))
        assert fake.seen[0].metadata["x-tenant"] == "hush-hush"
        for token in (None, "guessed"):
            with pytest.raises(AuthenticationError, match=r"refused access \(Jwt is missing\)") as caught:
                generate(kind, address, Settings(token=token))
            assert "guessed" not in str(caught.value)
    shown = caplog.text + repr(Settings(token="top-secret", headers=headers))
    assert "queue full" in shown
    assert "secret" not in shown
    assert "hush" not in shown
