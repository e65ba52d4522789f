"""The real server, as clients see it: every endpoint, every refusal, concurrent requests, and cancellation."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import queue
import struct
import threading
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from PIL import Image
from tritonclient.utils import InferenceServerException

from lfdm_export import Pipeline
from lfdm_export.bundle.reader import Bundle
from lfdm_export.pictures.clip import Clip
from lfdm_export.pictures.preprocess import prepare_image, read_image
from lfdm_export.protocol.contract import CLIP_MODEL, SAMPLE_MODEL, STREAM_MODEL, preview_indices
from lfdm_export.serving.server.control import open_directly
from tests.running_server import DEADLINE, DIRECT, RunningServer, eventually, inputs_of, json_input

PHOTO = Path(__file__).parents[1] / "data" / "astronaut.jpg"
JPEG = PHOTO.read_bytes()
REQUEST = {"image_bytes": np.array([JPEG], np.object_), "label": "happiness", "seed": 7, "steps": 4}


@pytest.fixture(scope="module")
def pipeline(small_bundle: Bundle) -> Pipeline:
    return Pipeline.open(small_bundle, threads=1)


@pytest.fixture(scope="module")
def clip(pipeline: Pipeline) -> Clip:
    """The clip of `REQUEST`, made in this process."""
    return pipeline.generate(PHOTO, label="happiness", seed=7, steps=4)


@pytest.fixture
def client(triton_server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with triton_server.client() as client:
        yield client


def assert_same_pictures(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.dtype == np.uint8
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected.astype(int)).max() <= 1


# --- Endpoints ------------------------------------------------------------------------------------


def test_grpc_gives_the_clip_of_the_pipeline(triton_server: RunningServer, client: Any, clip: Clip):
    outputs = triton_server.infer(client, REQUEST, ("frames", "warped", "latent", "timings"))
    assert_same_pictures(outputs["frames"], clip.frames[0])
    assert_same_pictures(outputs["warped"], clip.warped[0])
    np.testing.assert_allclose(outputs["latent"], clip.latent[0], atol=1e-4)
    queued, sampling, steps, decoding = outputs["timings"]
    assert steps == 4
    assert min(queued, sampling, decoding) >= 0
    assert sampling > 0


def test_the_defaults_are_the_bundles(triton_server: RunningServer, client: Any, pipeline: Pipeline):
    values = {"image_bytes": REQUEST["image_bytes"], "label": "Happiness "}
    outputs, other = (triton_server.infer(client, values, ("frames", "used_seed")) for _ in range(2))
    (seed,) = outputs["used_seed"].tolist()
    assert other["used_seed"] != seed, "a seed that is not given is drawn for each request"
    assert_same_pictures(outputs["frames"], pipeline.generate(PHOTO, label="happiness", seed=seed).frames[0])


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": "unipc", "steps": 3, "guidance_scale": 2.0},
        {"sampler": "dpm++2m", "steps": 4, "guidance_scale": 0.0},
        {"sampler": "sde-dpm++2m", "steps": 4, "guidance_scale": 3.0, "guidance_interval": [0.3, 0.8]},
        {"sampler": "ddim", "steps": 3, "eta": 0.5},
    ],
    ids=lambda options: options["sampler"],
)
def test_every_option_reaches_the_sampler(
    triton_server: RunningServer, client: Any, pipeline: Pipeline, options: dict[str, Any]
):
    embedding = np.linspace(-1, 1, 768, dtype=np.float32)
    values = {"image_bytes": REQUEST["image_bytes"], "text_embedding": embedding, "seed": 2**40, **options}
    outputs = triton_server.infer(client, values, ("frames", "latent"))
    expected = pipeline.generate(PHOTO, text_embedding=embedding, seed=2**40, **options)
    if "guidance_interval" in options:
        whole = pipeline.generate(
            PHOTO, text_embedding=embedding, seed=2**40, **options | {"guidance_interval": (0, 1)}
        )
        assert np.abs(whole.latent - expected.latent).max() > 1e-3, "the interval must matter, or nothing is tested"
    np.testing.assert_allclose(outputs["latent"], expected.latent[0], atol=1e-4)
    assert_same_pictures(outputs["frames"], expected.frames[0])


def test_pixels_give_the_same_clip_as_a_file(triton_server: RunningServer, client: Any, clip: Clip):
    values = {**REQUEST, "image": read_image(PHOTO)}
    del values["image_bytes"]
    assert_same_pictures(triton_server.infer(client, values)["frames"], clip.frames[0])


def test_http_with_json(triton_server: RunningServer, clip: Clip):
    body = {
        "inputs": [
            json_input("image_bytes", base64.b64encode(JPEG).decode()),
            json_input("label", "happiness"),
            json_input("seed", 7),
            json_input("steps", 4),
        ],
        "outputs": [{"name": "frames"}],
    }
    status, answer = triton_server.post(CLIP_MODEL, body)
    assert status == 200, answer
    (output,) = answer["outputs"]
    assert_same_pictures(np.array(output["data"], np.uint8).reshape(output["shape"]), clip.frames[0])


def test_http_with_binary_data(triton_server: RunningServer, clip: Clip):
    photo = struct.pack("<I", len(JPEG)) + JPEG
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "image_bytes",
                    "datatype": "BYTES",
                    "shape": [1],
                    "parameters": {"binary_data_size": len(photo)},
                },
                *(json_input(name, REQUEST[name]) for name in ("label", "seed", "steps")),
            ],
            "outputs": [{"name": "frames", "parameters": {"binary_data": True}}],
        }
    ).encode()
    request = urllib.request.Request(
        f"{triton_server.http}/v2/models/{CLIP_MODEL}/infer",
        head + photo,
        {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"},
    )
    with open_directly(request, DEADLINE) as answer:
        content, length = answer.read(), int(answer.headers["Inference-Header-Content-Length"])
    (output,) = json.loads(content[:length])["outputs"]
    assert_same_pictures(np.frombuffer(content[length:], np.uint8).reshape(output["shape"]), clip.frames[0])


def test_asyncio(triton_server: RunningServer, clip: Clip):
    async def ask() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(triton_server.grpc, channel_args=DIRECT) as client:
            asked = [triton.InferRequestedOutput("frames")]
            calls = [
                client.infer(CLIP_MODEL, inputs_of(REQUEST), outputs=asked, client_timeout=DEADLINE) for _ in range(3)
            ]
            return [result.as_numpy("frames") for result in await asyncio.gather(*calls)]

    for frames in asyncio.run(ask()):
        assert_same_pictures(frames, clip.frames[0])


# --- The stream -----------------------------------------------------------------------------------


def stream(client: Any, values: dict[str, Any], **options: Any) -> list[Any]:
    """All responses of one streamed request; an error ends them."""
    responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(lambda result, error: responses.put(error or result), stream_timeout=DEADLINE)
    client.async_stream_infer(
        STREAM_MODEL, inputs_of(values), request_id="a stream", enable_empty_final_response=True, **options
    )
    found: list[Any] = []
    while True:
        found.append(responses.get(timeout=DEADLINE))
        if isinstance(found[-1], Exception) or kind(found[-1]) == "done":
            client.stop_stream()
            return found


def kind(response: Any) -> str:
    array = response.as_numpy("kind")
    return "" if array is None else array[0].decode()


def test_stream_gives_progress_previews_and_the_same_frames(
    client: Any, clip: Clip, small_bundle: Bundle, pipeline: Pipeline
):
    responses = stream(client, {**REQUEST, "preview_every": 2, "progress_every": 1})
    kinds = [kind(response) for response in responses]
    assert kinds.count("progress") in (3, 4)  # the last step is not reported
    assert kinds.count("preview") >= 1
    assert kinds[-3:] == ["frames", "frames", "done"]
    geometry = small_bundle.manifest.geometry
    preview = responses[kinds.index("preview")]
    assert preview.as_numpy("step")[0] < preview.as_numpy("steps")[0] == 4
    np.testing.assert_array_equal(
        preview.as_numpy("frame_indices"), preview_indices(geometry.frames, geometry.chunk_frames)
    )
    assert preview.as_numpy("frames").shape == (geometry.chunk_frames, 64, 64, 3)
    chunks = [response for response in responses if kind(response) == "frames"]
    indices = np.concatenate([chunk.as_numpy("frame_indices") for chunk in chunks])
    np.testing.assert_array_equal(indices, np.arange(geometry.frames))
    assert_same_pictures(np.concatenate([chunk.as_numpy("frames") for chunk in chunks]), clip.frames[0])
    assert responses[-1].as_numpy("frame_count")[0] == geometry.frames
    assert responses[-1].as_numpy("timings")[2] == 4
    assert responses[-1].as_numpy("used_seed").tolist() == [REQUEST["seed"]]


def test_a_stream_of_some_frames_with_warped_previews(client: Any, clip: Clip, small_bundle: Bundle):
    only = np.array([1, 5, 9], np.int32)
    responses = stream(client, {**REQUEST, "preview_every": 3, "preview_warped": np.array([True]), "only_frames": only})
    frames = next(response for response in responses if kind(response) == "frames")
    np.testing.assert_array_equal(frames.as_numpy("frame_indices"), only)
    assert_same_pictures(frames.as_numpy("frames"), clip.frames[0][only])
    assert [kind(response) for response in responses].count("frames") == 1
    preview = next(response for response in responses if kind(response) == "preview")
    geometry = small_bundle.manifest.geometry
    assert preview.as_numpy("frames").shape == (geometry.chunk_frames, 64, 64, 3)
    (error,) = stream(client, {**REQUEST, "only_frames": np.array([10], np.int32)})
    assert "expected ascending positions from 0 to 9" in str(error)


def test_a_stream_draws_a_seed_and_tells_it(client: Any):
    values = {name: value for name, value in REQUEST.items() if name != "seed"}
    first, second = (stream(client, values)[-1].as_numpy("used_seed").tolist() for _ in range(2))
    assert first != second


def test_a_stream_reports_what_is_wrong(client: Any):
    (error,) = stream(client, {**REQUEST, "label": "hapiness"})
    assert "did you mean 'happiness'?" in str(error)


def test_a_closed_stream_frees_its_slot(triton_server: RunningServer, client: Any):
    started = threading.Event()
    client.start_stream(lambda result, error: started.set())
    client.async_stream_infer(STREAM_MODEL, inputs_of({**REQUEST, "steps": 900, "progress_every": 1}))
    assert started.wait(DEADLINE)
    client.stop_stream(cancel_requests=True)
    eventually(lambda: ended(triton_server, STREAM_MODEL, "cancelled") >= 1, "the stream is counted as cancelled")
    eventually(lambda: busy(triton_server, STREAM_MODEL) == 0, "no slot is busy")


def busy(server: RunningServer, model: str) -> float:
    return server.metric("lfdm_slots_busy", model=model)


def ended(server: RunningServer, model: str, outcome: str) -> float:
    return server.metric("lfdm_requests_total", model=model, outcome=outcome)


# --- Refusals -------------------------------------------------------------------------------------


def huge_png(side: int) -> bytes:
    """A picture of side² pixels in a few kilobytes: a bomb for programs that decode it without a check."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compressobj(9)
    data = b"".join([rows.compress(bytes(1 + side // 8)) for _ in range(side)] + [rows.flush()])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiny_png(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, "PNG")
    return buffer.getvalue()


def one(data: bytes) -> np.ndarray:
    return np.array([data], np.object_)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "not an image": ({"image_bytes": one(b"\0\1\2 no picture")}, "image_bytes cannot be read as an image"),
    "an empty image": ({"image_bytes": one(b"")}, "image_bytes is empty"),
    "a damaged image": ({"image_bytes": one(JPEG[: len(JPEG) // 2])}, "image_bytes cannot be read as an image"),
    "a decompression bomb": (
        {"image_bytes": one(huge_png(9000))},
        "9000x9000 pixels, expected 1 to 40,000,000 of a PNG",
    ),
    "too many bytes": ({"image_bytes": one(b"\xff" * (21 << 20))}, "expected at most 20,971,520"),
    "a long thin image": ({"image_bytes": one(tiny_png(size=(2000, 1)))}, "too long and thin"),
    "two images": ({"image": np.zeros((8, 8, 3), np.uint8)}, "found image_bytes and image"),
    "no image": ({"image_bytes": None}, "found none of image_bytes, image"),
    "unknown label": ({"label": "joy"}, "unknown label 'joy': known are anger"),
    "label not UTF-8": ({"label": one(b"\xff\xfe")}, "label is not text in UTF-8"),
    "no label": ({"label": None}, "found none of label, text, text_embedding"),
    "label and text": ({"text": "smiling"}, "found label and text"),
    "text without an encoder": ({"label": None, "text": "smiling"}, "this bundle has no text encoder"),
    "steps 0": ({"steps": 0}, "steps is 0, expected 1 to 1000"),
    "too many steps": ({"steps": 100_000}, "steps is 100000, expected 1 to 1000"),
    "steps that the sampler cannot do": ({"steps": 1000}, "expected 1 to 999 for sampler 'ddim'"),
    "unknown sampler": ({"sampler": "euler"}, "sampler: found 'euler', expected one of ddpm"),
    "eta beyond 1": ({"eta": 1.5}, "eta: found 1.5, expected 0 to 1"),
    "eta for a sampler without": ({"sampler": "unipc", "eta": 0.5}, "has no eta"),
    "guidance that is not a number": ({"guidance_scale": float("nan")}, "guidance_scale is nan, expected 0 to 20"),
    "negative guidance": ({"guidance_scale": -1.0}, "guidance_scale is -1.0, expected 0 to 20"),
    "negative seed": ({"seed": -1}, "seed is -1, expected 0 to"),
    "NaN embedding": ({"label": None, "text_embedding": np.full(768, np.nan, np.float32)}, "not finite"),
    "embedding of another width": ({"label": None, "text_embedding": np.zeros(5, np.float32)}, "[5]"),
    "image of another shape": ({"image_bytes": None, "image": np.zeros((8, 8, 4), np.uint8)}, "[8,8,4]"),
    "two seeds": ({"seed": np.array([1, 2])}, "[2]"),
}


@pytest.mark.parametrize("change", BAD)
def test_bad_input_is_refused_with_a_reason(triton_server: RunningServer, client: Any, change: str):
    values, message = BAD[change]
    request = {name: value for name, value in {**REQUEST, **values}.items() if value is not None}
    with pytest.raises(InferenceServerException) as refused:
        triton_server.infer(client, request)
    assert message in refused.value.message()
    assert refused.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_the_server_survives_bad_input(triton_server: RunningServer, client: Any, clip: Clip):
    """After all of the above, with its original processes."""
    assert client.is_server_ready()
    assert_same_pictures(triton_server.infer(client, REQUEST)["frames"], clip.frames[0])


def test_a_refusal_over_http_has_a_status_and_a_reason(triton_server: RunningServer):
    body = {"inputs": [json_input("image_bytes", "AAAA"), json_input("label", "fear"), json_input("steps", 0)]}
    status, answer = triton_server.post(CLIP_MODEL, body)
    assert status == 400
    assert "image_bytes cannot be read as an image" in answer["error"] or "steps is 0" in answer["error"]


def test_an_invalid_priority_is_refused(triton_server: RunningServer, client: Any):
    with pytest.raises(InferenceServerException, match="lfdm_priority is 'high', expected an integer"):
        triton_server.infer(client, REQUEST, parameters={"lfdm_priority": "high"})


def test_only_the_servers_owner_may_unload_models(triton_server: RunningServer, client: Any):
    with pytest.raises(InferenceServerException, match="restricted"):
        client.unload_model(CLIP_MODEL)
    request = urllib.request.Request(f"{triton_server.http}/v2/repository/models/{CLIP_MODEL}/unload", b"{}")
    with pytest.raises(urllib.error.HTTPError) as refused:
        open_directly(request, DEADLINE)
    assert refused.value.code == 403
    assert client.is_model_ready(CLIP_MODEL)


# --- Concurrent requests, deadlines, cancellation -------------------------------------------------


def test_64_different_concurrent_requests_each_get_their_own_clip(triton_server: RunningServer, pipeline: Pipeline):
    labels, samplers = pipeline.bundle.labels, ("ddim", "unipc", "dpm++2m")
    pixels = prepare_image(PHOTO, 64)

    def request(index: int) -> dict[str, Any]:
        return {
            "label": labels[index % len(labels)],
            "seed": index,
            "steps": 1 + index % 3,
            "sampler": samplers[index % len(samplers)],
            "guidance_scale": 1.0 if index % 8 else 1.5,
        }

    with triton_server.client() as client, ThreadPoolExecutor(64) as pool:
        found = list(
            pool.map(
                lambda index: triton_server.infer(
                    client,
                    {"image": pixels, **request(index)},
                    ("latent", "timings"),
                    request_id=f"mixed {index}",
                ),
                range(64),
            )
        )
    encoded = pipeline.encode(pixels)
    for index, outputs in enumerate(found):
        options = request(index)
        expected = pipeline.sample(encoded, pipeline.bundle.embedding(options.pop("label")), **options)
        np.testing.assert_allclose(outputs["latent"], expected[0], atol=2e-4, err_msg=f"request {index}")
        assert outputs["timings"][2] == options["steps"]


def test_a_deadline_is_kept(triton_server: RunningServer, client: Any):
    with pytest.raises(InferenceServerException, match="deadline exceeded") as missed:
        triton_server.infer(client, {**REQUEST, "steps": 900}, timeout=500_000)
    assert missed.value.status() == "StatusCode.UNAVAILABLE"
    eventually(lambda: busy(triton_server, SAMPLE_MODEL) == 0, "no slot is busy")


def test_cancelling_by_id_frees_the_slot(triton_server: RunningServer, client: Any):
    def cancel() -> bool:
        given = triton.InferInput("cancel_request_id", [1], "BYTES")
        given.set_data_from_numpy(one(b"a long clip"))
        result = client.infer(SAMPLE_MODEL, [given], outputs=[triton.InferRequestedOutput("cancelled")])
        return bool(result.as_numpy("cancelled")[0])

    assert not cancel()
    eventually(lambda: busy(triton_server, SAMPLE_MODEL) == 0, "no slot is busy with an earlier test's clip")
    with triton_server.client() as other, ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            triton_server.infer, other, {**REQUEST, "steps": 900}, client_timeout=DEADLINE, request_id="a long clip"
        )
        eventually(lambda: busy(triton_server, SAMPLE_MODEL) == 1, "the clip is being sampled")
        assert cancel()
        with pytest.raises(InferenceServerException, match="the request was cancelled") as given_up:
            running.result(DEADLINE)
    assert given_up.value.status() == "StatusCode.CANCELLED"
    eventually(lambda: busy(triton_server, SAMPLE_MODEL) == 0, "no slot is busy")
    assert not cancel()


def test_metrics_count_requests(triton_server: RunningServer, client: Any):
    def count(name: str) -> float:
        return triton_server.metric(name, model=SAMPLE_MODEL)

    def finished() -> float:
        return ended(triton_server, SAMPLE_MODEL, "finished")

    wait_for_the_page(triton_server, client)
    before = {name: count(name) for name in ("lfdm_steps_total", "lfdm_queue_seconds_count")}
    was_finished = finished()
    triton_server.infer(client, REQUEST)
    eventually(lambda: finished() == was_finished + 1, "the clip is counted")
    assert count("lfdm_steps_total") == before["lfdm_steps_total"] + 4
    assert count("lfdm_queue_seconds_count") == before["lfdm_queue_seconds_count"] + 1
    assert count("lfdm_slots") == 4


def wait_for_the_page(server: RunningServer, client: Any) -> None:
    """Wait until the page shows the requests of all earlier tests: it is updated in order, twice a second.

    Requests whose deadline has passed take no step, and are counted after all earlier ones. Two are sent, because the
    count that the first one waits for may be an earlier test's.
    """
    eventually(lambda: busy(server, SAMPLE_MODEL) == 0, "no slot is busy")
    for _ in range(2):
        expired = ended(server, SAMPLE_MODEL, "expired")
        with pytest.raises(InferenceServerException, match="deadline exceeded"):
            server.infer(client, REQUEST, timeout=1)
        eventually(lambda was=expired: ended(server, SAMPLE_MODEL, "expired") > was, "it is counted")  # type: ignore[misc]
