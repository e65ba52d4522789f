"""The real server under attack: it survives, other clients are not affected, and a kill leaves nothing behind."""

from __future__ import annotations

import http.client
import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from benchmarks.processes import descendants
from lfdm_export.bundle.reader import Bundle
from lfdm_export.protocol.contract import CLIP_MODEL, CONDITION_MODEL, ENCODE_MODEL, SAMPLE_MODEL, STREAM_MODEL
from lfdm_export.serving.server.files import install_server
from tests.running_server import DEADLINE, RunningServer, ServeCommand, eventually, inputs_of, json_input

PIXELS = np.arange(64 * 64 * 3, dtype=np.uint32).reshape(64, 64, 3).astype(np.uint8)
REQUEST = {"image": PIXELS, "label": "fear", "seed": 5, "steps": 2}


def arguments(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return []


def listening(pid: int) -> int:
    """Number of TCP sockets on which a process listens. Source: proc(5)."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text(encoding="utf-8").splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                inodes.add(f"socket:[{fields[9]}]")
    return sum(str(one.readlink()) in inodes for one in Path(f"/proc/{pid}/fd").iterdir() if one.is_symlink())


def regions(pid: int) -> dict[str, int]:
    """Shared memory regions of an lfdm-serve's server, with their sizes."""
    return {path.name: path.stat().st_size for path in Path("/dev/shm").glob(f"lfdm_serve_{pid}_*")}


def post(server: RunningServer, body: bytes, **headers: str) -> int:
    """Status of an HTTP request with any body."""
    connection = http.client.HTTPConnection(server.http.removeprefix("http://"), timeout=DEADLINE)
    try:
        connection.request("POST", f"/v2/models/{CLIP_MODEL}/infer", body, headers)
        return connection.getresponse().status
    except (BrokenPipeError, ConnectionResetError):
        return 413  # answered before the whole body was sent
    finally:
        connection.close()


def shaped(name: str, datatype: str, shape: list[int]) -> bytes:
    return json.dumps({"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": [0]}]}).encode()


def raw(name: str, shape: list[int], content: bytes, model: str = CLIP_MODEL) -> Any:
    found = triton.service_pb2.ModelInferRequest(model_name=model)
    found.inputs.add(name=name, datatype="UINT8", shape=shape)
    found.raw_input_contents.append(content)
    return found


def attacks(server: RunningServer, client: triton.InferenceServerClient) -> Iterator[str]:
    """Send hostile requests one after the other; yields each one's name when it has been refused."""
    for name, body in {
        "10^12 pixels": shaped("image", "UINT8", [10**6, 10**6, 3]),
        "2^61 seeds": shaped("seed", "INT64", [2**61]),
        "nested 100,000 deep": b'{"inputs":[{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}]}",
        "inputs nested 100,000 deep": b'{"inputs":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "40 MB": bytes(40 << 20),
    }.items():
        assert post(server, body) in (400, 413), name
        yield name
    stub = client._client_stub
    for name, request in {
        "a picture without content": raw("image", [4000, 4000, 3], b""),
        "a picture larger than its shape": raw("image", [1, 1, 3], bytes(1 << 20)),
        "half a sample": raw("seed", [1], b"", SAMPLE_MODEL),
        "another member": raw("image", [1], b"", ENCODE_MODEL),
        "a model of their own": raw("image", [1], b"", "evil"),
    }.items():
        with pytest.raises(triton.grpc.RpcError) as refused:
            stub.ModelInfer(request, timeout=DEADLINE)
        assert refused.value.code().name in ("INVALID_ARGUMENT", "PERMISSION_DENIED", "NOT_FOUND"), name
        yield name


def test_attacks_do_not_affect_clips_and_processes(triton_server: RunningServer):
    with triton_server.client() as client:
        expected = triton_server.infer(client, REQUEST)["frames"]
        names = []
        for name in attacks(triton_server, client):
            names.append(name)
            assert client.is_model_ready(CLIP_MODEL), name
        np.testing.assert_array_equal(triton_server.infer(client, REQUEST)["frames"], expected)
    assert len(names) == 10


@pytest.fixture
def command(small_bundle: Bundle) -> Iterator[ServeCommand]:
    install_server()
    found = ServeCommand(small_bundle.path, "--threads=1", "--drain-timeout=0")
    yield found
    if found.process.poll() is None:
        found.stop()


def test_what_a_local_user_sees_and_what_remains_after_a_kill(command: ServeCommand):
    """One server for both tests: its start takes longer than either."""
    pid = command.process.pid
    processes = {child: arguments(child) for child in descendants(pid)}
    stubs = {child for child, words in processes.items() if "triton_python_backend_stub" in words[0]}
    (server,) = (child for child, words in processes.items() if words[0].endswith("tritonserver"))
    assert len(stubs) == 6
    # Only the front can be reached, and no key can be read.
    assert listening(pid) == 3
    assert all(listening(child) == 0 for child in processes)
    assert not any("restricted" in word or "key" in word.lower() for words in processes.values() for word in words)
    found = regions(pid)
    assert len(found) == 7, "the models' and the lock"
    assert all((Path("/dev/shm") / name).stat().st_mode & 0o777 == 0o600 for name in found)
    # A refused picture of the largest forwarded size takes no shared memory.
    label, noise = struct.pack("<I", 4) + b"fear", struct.pack("<I", 15 << 20) + bytes(15 << 20)
    request = triton.service_pb2.ModelInferRequest(model_name=CLIP_MODEL)
    for name, content in (("image_bytes", noise), ("label", label)):
        request.inputs.add(name=name, datatype="BYTES", shape=[1])
        request.raw_input_contents.append(content)
    with command.server.client() as client:
        with pytest.raises(triton.grpc.RpcError, match="cannot be read as an image"):
            client._client_stub.ModelInfer(request, timeout=DEADLINE)
        assert regions(pid) == found
        # Killed with work in flight, the server leaves no process.
        client.start_stream(lambda result, error: None)
        client.async_stream_infer(STREAM_MODEL, inputs_of({**REQUEST, "steps": 900}))
        eventually(lambda: command.server.metric("lfdm_in_flight", model=STREAM_MODEL) == 1, "it is in flight")
        os.kill(pid, signal.SIGKILL)
        command.process.wait(DEADLINE)
        eventually(lambda: not any(map(alive, (server, *stubs))), "all processes are gone")
    for name in found:  # as the next start does
        (Path("/dev/shm") / name).unlink()


def alive(pid: int) -> bool:
    """Whether a process is running and not a zombie."""
    return arguments(pid) not in ([], [""])


def test_clients_may_only_cancel_in_the_sampler(triton_server: RunningServer):
    with triton_server.client() as client:
        given = triton.InferInput("cancel_request_id", [1], "BYTES")
        given.set_data_from_numpy(np.array([b"nobody's"], np.object_))
        assert not client.infer(SAMPLE_MODEL, [given]).as_numpy("cancelled")[0]
        for model in (SAMPLE_MODEL, CONDITION_MODEL, ENCODE_MODEL):
            with pytest.raises(InferenceServerException):
                client.infer(model, inputs_of({"seed": 1}))
    body = {"inputs": [json_input("seed", 1)]}
    assert triton_server.post(CONDITION_MODEL, body)[0] == 403
    assert triton_server.post(ENCODE_MODEL, body)[0] == 400  # open to requests of a motion, but this one is invalid
