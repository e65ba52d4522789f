"""A real server whose sampler also encodes and decodes, and keeps clips on the device: PyTorch's CPU."""

from __future__ import annotations

import queue
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton

from lfdm_export.bundle.reader import Bundle
from lfdm_export.engines.pytorch.compiled import VARIABLE
from lfdm_export.errors import InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.protocol.contract import (
    CANCEL_INPUT,
    CANCEL_OUTPUT,
    CLIP_MODEL,
    MOTION_MODELS,
    SAMPLE_MODEL,
    STREAM_MODEL,
)
from lfdm_export.serving.server.files import install_server
from lfdm_export.serving.server.options import ServerOptions
from lfdm_export.serving.server.supervisor import TritonServer
from lfdm_export.serving.triton.config import model_configs
from lfdm_export.serving.triton.repository import write_repository
from lfdm_export.serving.triton.settings import ServingSettings
from tests.running_server import DEADLINE, RunningServer, eventually, inputs_of
from tests.torch_bundle import write_torch_bundle

PHOTO = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
REQUEST: dict[str, Any] = {"image": PHOTO, "label": "happiness", "seed": 3, "steps": 4}


@pytest.fixture(scope="module")
def uncompiled() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "0")
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_torch_bundle(tmp_path_factory.mktemp("device") / "bundle")


@pytest.fixture(scope="module")
def server(bundle: Bundle, uncompiled: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    settings = ServingSettings(slots=2, threads=1, target="torch", on_device=True, self_check=False)
    repository = write_repository(bundle, tmp_path_factory.mktemp("served") / "repository", settings=settings)
    with TritonServer(install_server(), repository, ServerOptions(http_port=0, grpc_port=0, metrics_port=0)) as running:
        host, options = running.options.host, running.options
        yield RunningServer(
            f"{host}:{options.grpc_port}",
            f"http://{host}:{options.http_port}",
            f"http://{host}:{options.metrics_port}/metrics",
        )


@pytest.fixture
def client(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with server.client() as client:
        yield client


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_clip_is_that_of_the_pipeline(
    server: RunningServer, client: Any, bundle: Bundle, guidance: float, uncompiled: None
):
    found = server.infer(
        client, {**REQUEST, "guidance_scale": guidance}, ("frames", "warped", "latent", "timings", "used_seed")
    )
    pipeline = Pipeline(bundle, threads=1, target="torch", self_check=False)
    expected = pipeline.generate(PHOTO, label="happiness", seed=3, steps=4, guidance_scale=guidance)
    assert np.abs(found["latent"] - expected.latent[0]).max() < 1e-4
    for name, clip in (("frames", expected.frames), ("warped", expected.warped)):
        assert np.abs(found[name].astype(int) - clip[0]).max() <= 1
    assert found["used_seed"].tolist() == [3]
    assert found["timings"][2] == 4


def test_a_stream_has_the_same_frames(server: RunningServer, client: Any):
    expected = server.infer(client, REQUEST)["frames"]
    responses: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client.start_stream(lambda result, error: responses.put(error or result), stream_timeout=DEADLINE)
    client.async_stream_infer(STREAM_MODEL, inputs_of({**REQUEST, "preview_every": 2}))
    found: list[Any] = []
    while not found or found[-1].as_numpy("kind")[0] != b"done":
        found.append(responses.get(timeout=DEADLINE))
        assert not isinstance(found[-1], Exception), found[-1]
    client.stop_stream()
    kinds = [response.as_numpy("kind")[0] for response in found]
    assert kinds[-2:] == [b"frames", b"done"], "all frames at once"
    assert np.abs(found[-2].as_numpy("frames").astype(int) - expected).max() <= 1
    assert found[-2].as_numpy("frame_indices").tolist() == list(range(len(expected)))
    assert found[kinds.index(b"preview")].as_numpy("frames").shape == (2, 16, 16, 3)


def test_cancelling_by_id_frees_the_slot(server: RunningServer, client: Any):
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    long = inputs_of({**REQUEST, "steps": 20, "sampler": "ddpm"})
    for _ in range(20):  # enough work that the last one still waits
        client.async_infer(CLIP_MODEL, long, lambda result, error: answers.put(error or result), request_id="a clip")
    given = triton.InferInput(CANCEL_INPUT.name, [1], "BYTES")
    given.set_data_from_numpy(np.array([b"a clip"], np.object_))

    def cancelled() -> bool:
        return bool(client.infer(SAMPLE_MODEL, [given]).as_numpy(CANCEL_OUTPUT.name)[0])

    eventually(cancelled, "a request with the id is known")
    found = [answers.get(timeout=DEADLINE) for _ in range(20)]
    assert any("cancelled" in str(answer) for answer in found if isinstance(answer, Exception))
    assert server.infer(client, REQUEST)["frames"].shape == (5, 16, 16, 3)


def test_motions_are_still_served(client: Any):
    assert all(client.is_model_ready(model) for model in (CLIP_MODEL, STREAM_MODEL, *MOTION_MODELS))


def test_tritons_own_backends_keep_nothing_on_the_device():
    with pytest.raises(InputError, match="expected 'python' for models that keep clips on a device"):
        model_configs(None, ServingSettings(on_device=True), engines="onnxruntime")
