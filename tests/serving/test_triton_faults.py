"""Faults that a server survives: full queues, killed processes, a stop. It runs the committed repository."""

from __future__ import annotations

import os
import queue
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2
from tritonclient.utils import InferenceServerException

from lfdm_export import Pipeline
from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import ServerError
from lfdm_export.protocol.contract import CLIP_MODEL, DECODE_MODEL, ENCODE_MODEL, SAMPLE_MODEL, STREAM_MODEL
from lfdm_export.serving.server import supervisor
from lfdm_export.serving.server.files import install_server
from lfdm_export.serving.server.options import ServerOptions
from lfdm_export.serving.server.supervisor import TritonServer
from lfdm_export.serving.server.watchdog import live_stubs
from lfdm_export.serving.triton.config import DECODE_MODEL_PARAMETER
from lfdm_export.serving.triton.interfaces import DECODE_CHUNK_MODEL
from lfdm_export.serving.triton.settings import BUNDLE_VARIABLE
from tests.running_server import DEADLINE, RunningServer, eventually, inputs_of

ROOT = Path(__file__).resolve().parents[2]
PIXELS = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)
REQUEST = {"image": PIXELS, "label": "fear", "seed": 5, "steps": 2}
#: Takes many times longer than an update of the metrics page, on any machine: a guided step counts twice.
LONG = {**REQUEST, "steps": 900, "guidance_scale": 2.0}

#: Replaces Triton's own engine, which decodes a chunk in NVIDIA's container.
CHUNK_MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils
from lfdm_export.serving.models.stub import load

class TritonPythonModel:
    def initialize(self, args):
        self.pipeline = load(args | {"model_name": "lfdm_decode"}).pipeline

    def execute(self, requests):
        answers = []
        for request in requests:
            spec = self.pipeline.bundle.stages["decode"]
            tensors = [pb_utils.get_input_tensor_by_name(request, t.name).as_numpy() for t in spec.inputs]
            outputs = self.pipeline.stages.run("decode", *tensors)
            answers.append(pb_utils.InferenceResponse(
                [pb_utils.Tensor(t.name, array) for t, array in zip(spec.outputs, outputs)]
            ))
        return answers
"""


def set_parameters(folder: Path, model: str, **values: str) -> Any:
    """Change parameters of a model's configuration, as a user of the repository does."""
    path = folder / model / "config.pbtxt"
    config = text_format.Parse(path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    for name, value in values.items():
        config.parameters[name].string_value = value
    path.write_text(text_format.MessageToString(config))
    return config


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed repository, with a short queue, and with decode through another model."""
    folder = tmp_path_factory.mktemp("triton") / "repository"
    shutil.copytree(ROOT / "triton_repo", folder)
    for model in folder.iterdir():
        if (model / "1" / "model.py").is_file():
            set_parameters(folder, model.name, threads="1", queue_limit="1")
    config = set_parameters(folder, DECODE_MODEL, **{DECODE_MODEL_PARAMETER: DECODE_CHUNK_MODEL})
    chunk = model_config_pb2.ModelConfig(name=DECODE_CHUNK_MODEL, backend="python", max_batch_size=8)
    for tensor in config.input:
        if tensor.name != "sample_timings":
            chunk.input.add(
                name=tensor.name, data_type=tensor.data_type, dims=[-1] * (4 if tensor.name == "latent" else 3)
            )
    for name in ("frames", "warped"):
        chunk.output.add(name=name, data_type=model_config_pb2.TYPE_FP32, dims=[-1] * 4)
    chunk.dynamic_batching.SetInParent()
    (folder / DECODE_CHUNK_MODEL / "1").mkdir(parents=True)
    (folder / DECODE_CHUNK_MODEL / "config.pbtxt").write_text(text_format.MessageToString(chunk))
    (folder / DECODE_CHUNK_MODEL / "1" / "model.py").write_text(CHUNK_MODEL)
    return folder


class Servers:
    """One server for all tests of this file, and a new one after a test that stopped it."""

    def __init__(self, repository: Path, bundle: Bundle) -> None:
        self._repository, self._bundle = repository, bundle
        self._server: TritonServer | None = None

    def running(self) -> TritonServer:
        if self._server is None or not self._server.running:
            options = ServerOptions(
                http_port=0, grpc_port=0, metrics_port=0, arguments=(f"--load-model={DECODE_CHUNK_MODEL}",)
            )
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv(BUNDLE_VARIABLE, str(self._bundle.path))
                self._server = TritonServer(install_server(), self._repository, options)
        return self._server

    def stop(self) -> None:
        if self._server is not None:
            self._server.stop()


@pytest.fixture(scope="module")
def servers(repository: Path, small_bundle: Bundle) -> Iterator[Servers]:
    found = Servers(repository, small_bundle)
    yield found
    found.stop()


@pytest.fixture
def triton_process(servers: Servers) -> TritonServer:
    return servers.running()


@pytest.fixture
def server(triton_process: TritonServer) -> RunningServer:
    options = triton_process.options
    metrics = f"http://{options.host}:{options.metrics_port}/metrics"
    return RunningServer(f"{options.host}:{options.grpc_port}", f"http://{options.host}:{options.http_port}", metrics)


@pytest.fixture
def client(server: RunningServer) -> Iterator[triton.InferenceServerClient]:
    with server.client() as client:
        yield client


def sampling(server: RunningServer, what: str = "lfdm_slots_busy") -> float:
    """The sampler's state on the metrics page."""
    return server.metric(what, model=SAMPLE_MODEL)


def kill(triton_process: TritonServer, model: str, number: int = signal.SIGKILL) -> int:
    """Kill a model's process, as the kernel does when memory is exhausted, or send it another signal."""
    (stub,) = [stub for stub in live_stubs(triton_process.region_prefix) if stub.model == model]
    os.kill(stub.pid, number)
    return stub.pid


def wait_until_replaced(triton_process: TritonServer, model: str, killed: int) -> None:
    """Wait until a model has one process, and another one than the killed."""

    def replaced() -> bool:
        stubs = [stub.pid for stub in live_stubs(triton_process.region_prefix) if stub.model == model]
        return len(stubs) == 1 and killed not in stubs

    eventually(replaced, f"{model} has a new process")


def wait_until_served(server: RunningServer, client: Any) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}

    def served() -> bool:
        try:
            found.update(server.infer(client, REQUEST, client_timeout=10.0))
        except InferenceServerException:
            return False
        return True

    eventually(served, "the server serves")
    return found


def assert_same_pictures(found: np.ndarray, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_the_committed_repository_serves_any_bundle(server: RunningServer, client: Any, small_bundle: Bundle):
    frames = server.infer(client, REQUEST)["frames"]
    expected = Pipeline.open(small_bundle, threads=1).generate(PIXELS, label="fear", seed=5, steps=2)
    assert_same_pictures(frames, expected.frames[0])


def test_a_full_queue_refuses_with_a_reason(server: RunningServer):
    eventually(lambda: sampling(server) == 0, "no slot is busy")
    with ThreadPoolExecutor(2) as pool, server.client() as client:
        pool.submit(server.infer, client, LONG, request_id="long 0")  # the one slot
        eventually(lambda: sampling(server) == 1, "the slot is busy")
        pool.submit(server.infer, client, LONG, request_id="long 1")  # the one place in the queue
        eventually(lambda: sampling(server, "lfdm_waiting") == 1, "one is waiting")
        with pytest.raises(InferenceServerException, match="queue full") as refused:
            server.infer(client, LONG)
        assert refused.value.status() == "StatusCode.UNAVAILABLE"
        for index in range(2):
            given = triton.InferInput("cancel_request_id", [1], "BYTES")
            given.set_data_from_numpy(np.array([f"long {index}".encode()], np.object_))
            client.infer(SAMPLE_MODEL, [given])
        assert wait_until_served(server, client)["frames"].shape == (10, 64, 64, 3)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_killed_or_stopped_encoder_is_replaced(
    server: RunningServer, client: Any, triton_process: TritonServer, number: int
):
    expected = server.infer(client, REQUEST)["frames"]
    killed = kill(triton_process, ENCODE_MODEL, number)
    wait_until_replaced(triton_process, ENCODE_MODEL, killed)
    assert_same_pictures(wait_until_served(server, client)["frames"], expected)


def test_requests_in_a_killed_sampler_get_an_error_at_once(
    server: RunningServer, client: Any, triton_process: TritonServer
):
    expected = server.infer(client, REQUEST)["frames"]
    eventually(lambda: sampling(server) == 0, "no slot is busy")
    ends: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with server.client() as other:
        other.async_infer(CLIP_MODEL, inputs_of(LONG), lambda result, error: ends.put(error))
        eventually(lambda: sampling(server) == 1, "the slot is busy")
        kill(triton_process, SAMPLE_MODEL)
        lost = ends.get(timeout=DEADLINE)
        assert lost.status() == "StatusCode.UNAVAILABLE"
        assert "the process of lfdm_sample has died" in lost.message()
        assert_same_pictures(wait_until_served(server, client)["frames"], expected)


def test_streams_in_a_killed_process_get_an_error_at_once(
    server: RunningServer, client: Any, triton_process: TritonServer
):
    expected = server.infer(client, REQUEST)["frames"]
    streamed: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with server.client() as streaming:
        streaming.start_stream(lambda result, error: streamed.put(error or result.as_numpy("kind")[0]))
        streaming.async_stream_infer(STREAM_MODEL, inputs_of({**LONG, "progress_every": 1}))
        found = streamed.get(timeout=DEADLINE)
        assert found == b"progress"
        killed = kill(triton_process, STREAM_MODEL)
        while found == b"progress":
            found = streamed.get(timeout=DEADLINE)
        assert "[UNAVAILABLE] the process of lfdm_stream has died" in str(found)
    # At times Triton itself aborts here, and is started again (docs/serving.md).
    wait_until_replaced(triton_process, STREAM_MODEL, killed)
    assert_same_pictures(wait_until_served(server, client)["frames"], expected)
    eventually(lambda: client.is_model_ready(STREAM_MODEL), "the stream is served again")


def test_a_killed_server_is_restarted(server: RunningServer, client: Any, triton_process: TritonServer):
    expected = server.infer(client, REQUEST)["frames"]
    eventually(lambda: sampling(server) == 0, "no slot is busy")
    ends: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with server.client() as other:
        other.async_infer(CLIP_MODEL, inputs_of(LONG), lambda result, error: ends.put(error))
        eventually(lambda: sampling(server) == 1, "the slot is busy")
        os.kill(triton_process.process_id, signal.SIGKILL)
        lost = ends.get(timeout=DEADLINE)
        assert lost.status() == "StatusCode.UNAVAILABLE"
        assert "the server's process has ended and is started again" in lost.message()
        assert client.is_server_live()
    assert_same_pictures(wait_until_served(server, client)["frames"], expected)
    assert triton_process.running


def test_a_missing_bundle_prevents_the_start(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(BUNDLE_VARIABLE, str(tmp_path / "nowhere"))
    options = ServerOptions(http_port=0, grpc_port=0, metrics_port=0)
    with pytest.raises(ServerError, match="there is no bundle at"):
        TritonServer(install_server(), repository, options)


@pytest.mark.parametrize(("aborts", "succeeds"), [(0, True), (2, True), (3, False)])
def test_an_abort_of_triton_while_it_starts_is_not_the_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, aborts: int, succeeds: bool
):
    started: list[Path] = []

    def start(_recipe: object, sockets: Any, _stopping: object) -> str:
        started.append(sockets.folder)
        if len(started) <= aborts:
            raise ServerError("tritonserver did not start: what(): boost::interprocess::lock_exception", "UNAVAILABLE")
        return "running"

    monkeypatch.setattr(supervisor, "TritonProcess", start)
    server: Any = object.__new__(TritonServer)
    server._starts, server._folder, server._recipe, server._stopping = 0, tmp_path, None, None
    server.options = ServerOptions()
    if succeeds:
        assert server._start() == "running"
        assert len(set(started)) == aborts + 1
    else:
        with pytest.raises(ServerError, match="lock_exception"):
            server._start()


def test_a_numpy_that_the_server_does_not_support_is_refused(
    repository: Path, small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
):
    """With the project's own NumPy 2 instead of the models' NumPy."""
    monkeypatch.setenv(BUNDLE_VARIABLE, str(small_bundle.path))
    files = replace(install_server(), python_bin=Path(sys.executable).parent)
    with pytest.raises(ServerError, match=r"Triton's Python backend does not work with NumPy 2"):
        TritonServer(files, repository, ServerOptions(http_port=0, grpc_port=0, metrics_port=0))


def test_stopping_finishes_requests_in_flight(server: RunningServer, triton_process: TritonServer):
    some = {**REQUEST, "steps": 100, "guidance_scale": 2.0}
    streamed: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with ThreadPoolExecutor(1) as pool, server.client() as client, server.client() as streaming:
        encoded = server.answered(client, ENCODE_MODEL)
        running = pool.submit(server.infer, client, some, ("frames", "timings"))
        streaming.start_stream(lambda result, error: streamed.put(error or result.as_numpy("kind")[0]))
        streaming.async_stream_infer(STREAM_MODEL, inputs_of({**some, "progress_every": 1}))
        assert streamed.get(timeout=DEADLINE) == b"progress"
        eventually(lambda: server.answered(client, ENCODE_MODEL) > encoded, "the clip is on its way to the sampler")
        triton_process.stop()
        assert running.result(DEADLINE)["timings"][2] == 100
        kinds = [streamed.get(timeout=DEADLINE)]
        while kinds[-1] == b"progress":
            kinds.append(streamed.get(timeout=DEADLINE))
        assert [*kinds[-1:], streamed.get(timeout=DEADLINE), streamed.get(timeout=DEADLINE)] == [
            b"frames",
            b"frames",
            b"done",
        ]
        with pytest.raises(InferenceServerException):
            server.infer(client, REQUEST, client_timeout=2.0)
    assert not triton_process.running
    assert live_stubs(triton_process.region_prefix) == []
    assert list(Path("/dev/shm").glob(f"{triton_process.region_prefix}*")) == []
