"""The front with a fake server: accepted and refused requests, and the fate of requests in flight."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import http.client
import json
import queue
import socket
import ssl
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import trustme
from cryptography.hazmat.primitives import serialization
from tritonclient.grpc import service_pb2 as messages

from lfdm_export.client import Client, Settings, Tls
from lfdm_export.client.wire import infer_request
from lfdm_export.errors import AuthenticationError, InputError
from lfdm_export.protocol.contract import CLIP_MODEL, STREAM_INPUTS, STREAM_MODEL
from lfdm_export.protocol.requests import Limits
from lfdm_export.serving.front import http_server, waiting
from lfdm_export.serving.front.access import read_access
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.refusal import RefusedError
from tests.fake_triton import FakeTriton
from tests.running_server import DEADLINE, DIRECT, eventually
from tests.security.doors import PIXELS, Doors, clip_request, json_request

LIMITS = FrontLimits(Limits())
#: Timeout of deliberately slow connections.
QUICK = replace(LIMITS, header_seconds=0.2, body_seconds=0.2, idle_seconds=0.2)


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    found = FakeTriton()
    yield found
    found.gate.set()


@pytest.fixture
def doors(fake: FakeTriton) -> Iterator[Doors]:
    with Doors(fake) as found:
        yield found


def in_flight(fake: FakeTriton, count: int = 1) -> None:
    eventually(lambda: len(fake.seen) >= count, "the server has the request")


def until_closed(connection: socket.socket) -> bytes:
    """All bytes until the other side closes the connection."""
    found = b""
    while piece := connection.recv(1 << 16):
        found += piece
    return found


def noisy_picture(size: int) -> Any:
    """A request with `size` bytes that are not a picture."""
    found = clip_request()
    del found.inputs[0], found.raw_input_contents[0]
    found.inputs.add(name="image_bytes", datatype="BYTES", shape=[1])
    found.raw_input_contents.append(size.to_bytes(4, "little") + bytes(size))
    return found


# --- As before ------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_the_client_works_as_before(doors: Doors, fake: FakeTriton, compression: Any):
    with Client(doors.grpc, Settings(compression=compression)) as client:
        clip = client.generate(PIXELS, label="Anger", seed=7, steps=3)
        with client.stream(PIXELS, label="Anger", seed=7, steps=3, progress_every=1) as stream:
            assert [type(event).__name__ for event in stream][-2:] == ["Frames", "Done"]
        np.testing.assert_array_equal(stream.clip().frames, clip.frames)
        fake.refusals.append(("INVALID_ARGUMENT", "in ensemble 'lfdm', steps is too much of it"))
        with pytest.raises(InputError, match=r"^steps is too much of it"):
            client.generate(PIXELS, label="Anger")
    assert [seen.model for seen in fake.seen] == [CLIP_MODEL, STREAM_MODEL, CLIP_MODEL]
    assert fake.seen[0].metadata.keys().isdisjoint({"authorization"})


def test_both_endpoints_give_the_same(doors: Doors):
    answer = doors.stub().ModelInfer(clip_request(), timeout=DEADLINE)
    status, found = doors.infer(json_request())
    assert status == 200
    (output,) = found["outputs"]
    assert bytes(output["data"]) == answer.raw_output_contents[0]
    assert answer.id == ""
    assert "id" not in found
    status, packed = doors.infer(gzip.compress(json_request()), Content_Encoding="gzip", Accept_Encoding="gzip")
    assert status == 200
    assert b'"outputs"' in gzip.decompress(packed)


@pytest.mark.parametrize(
    "refusal",
    [
        ("NOT_FOUND", "Request for unknown model: 'lfdm' has no available versions"),
        ("INTERNAL", "in ensemble 'lfdm', Stub process 'lfdm_preprocess_0_0' is not healthy."),
    ],
)
def test_a_model_that_is_loaded_again_is_unavailable(doors: Doors, fake: FakeTriton, refusal: tuple[str, str]):
    fake.refusals += [refusal, refusal]
    with pytest.raises(grpc.RpcError, match="the process of a model has died and is started again") as refused:
        doors.stub().ModelInfer(clip_request(), timeout=DEADLINE)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert doors.infer(json_request())[0] == 503
    assert doors.infer(json_request())[0] == 200


def test_a_request_without_an_id_gets_one_from_the_front(doors: Doors, fake: FakeTriton):
    doors.stub().ModelInfer(clip_request("mine"), timeout=DEADLINE)
    doors.stub().ModelInfer(clip_request(), timeout=DEADLINE)
    named, unnamed = (seen.request_id for seen in fake.seen)
    assert named == "mine"
    assert unnamed


# --- Access ---------------------------------------------------------------------------------------


def test_without_the_token_only_probes_are_answered(fake: FakeTriton):
    with Doors(fake, token=b"the token") as doors:
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "the token"}):
            status, answer = doors.infer(json_request(), **headers)
            assert (status, "requires a token" in answer["error"]) == (401, True)
        assert doors.infer(json_request(), Authorization="Bearer the token")[0] == 200
        assert doors.ask("GET", "/v2")[0] == 401
        assert doors.ask("GET", "/v2/health/live")[0] == 200
        assert doors.ask("GET", f"/v2/models/{CLIP_MODEL}/ready")[0] == 200
        for metadata in ((), (("authorization", "Bearer another"),)):
            with pytest.raises(grpc.RpcError) as refused:
                doors.stub().ModelInfer(clip_request(), timeout=DEADLINE, metadata=metadata)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
        token = (("authorization", "Bearer the token"),)
        assert doors.stub().ModelInfer(clip_request(), timeout=DEADLINE, metadata=token).model_name == CLIP_MODEL
    assert len(fake.seen) == 2


def test_the_client_sends_the_token(fake: FakeTriton):
    with Doors(fake, token=b"the-token") as doors:
        with Client(doors.grpc, Settings(token="the-token")) as client:
            assert client.facts().frames == 5
        with Client(doors.grpc) as client, pytest.raises(AuthenticationError, match="requires a token"):
            client.facts()


def test_both_endpoints_support_tls(fake: FakeTriton, tmp_path: Path):
    authority = trustme.CA()
    issued, paths = (
        authority.issue_cert("127.0.0.1", "localhost"),
        [str(tmp_path / name) for name in ("ca", "cert", "key")],
    )
    authority.cert_pem.write_to_path(paths[0])
    issued.cert_chain_pems[0].write_to_path(paths[1])
    issued.private_key_pem.write_to_path(paths[2])
    with Doors(fake, access=read_access(None, paths[1], paths[2])) as doors:
        with Client(doors.grpc, Settings(tls=Tls(paths[0]))) as client:
            assert client.facts().frames == 5
        context = ssl.create_default_context(cafile=paths[0])
        connection = http.client.HTTPSConnection("127.0.0.1", doors.http, timeout=DEADLINE, context=context)
        connection.request("GET", "/v2/health/live")
        assert connection.getresponse().status == 200
        connection.close()
        with doors.connect() as plain:
            plain.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
            try:
                answer = until_closed(plain)
            except ConnectionError:
                answer = b""
            assert b"200" not in answer


@pytest.mark.parametrize("content", [b"", b"  \n", b"two words", "größer".encode(), b"x" * 5000])
def test_a_file_without_a_token_is_refused(tmp_path: Path, content: bytes):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(InputError, match="holds no token, expected one line"):
        read_access(str(path), None, None)
    path.write_bytes(b" abc\n")
    assert read_access(str(path), None, None).token == b"abc"
    with pytest.raises(InputError, match="cannot be read"):
        read_access(str(tmp_path / "nowhere"), None, None)
    with pytest.raises(InputError, match="not a certificate with its key"):
        read_access(None, str(path), str(path))
    assert "abc" not in repr(read_access(str(path), None, None))


def test_a_key_with_a_passphrase_is_refused_without_a_question(tmp_path: Path):
    issued = trustme.CA().issue_cert("localhost")
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    encrypted = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"nobody knows"),
    )
    (tmp_path / "key").write_bytes(encrypted)
    issued.cert_chain_pems[0].write_to_path(str(tmp_path / "certificate"))
    with pytest.raises(InputError, match="the private key is encrypted"):
        read_access(None, str(tmp_path / "certificate"), str(tmp_path / "key"))


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v2/repository/index"),
        ("POST", "/v2/repository/models/evil/load"),
        ("POST", "/v2/repository/models/lfdm/unload"),
        ("GET", "/v2/systemsharedmemory/status"),
        ("POST", "/v2/systemsharedmemory/region/x/register"),
        ("POST", "/v2/cudasharedmemory/region/x/register"),
        ("POST", "/v2/logging"),
        ("GET", "/v2/trace/setting"),
        ("POST", "/v2/models/lfdm/trace/setting"),
        ("POST", "/v2/%72epository/models/evil/load"),
    ],
)
def test_restricted_methods_are_refused(doors: Doors, method: str, path: str):
    status, answer = doors.ask(method, path, b"{}" if method == "POST" else None)
    assert status in (403, 404)
    assert "restricted" in answer["error"] or answer["error"] == "Not Found"


@pytest.mark.parametrize(
    "name",
    [
        "RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload", "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister", "TraceSetting", "LogSettings",
    ],
)  # fmt: skip
def test_restricted_methods_are_refused_over_grpc(doors: Doors, name: str):
    with pytest.raises(grpc.RpcError) as refused:
        getattr(doors.stub(), name)(getattr(messages, f"{name}Request")(), timeout=DEADLINE)
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert "restricted" in refused.value.details()


# --- Too much, too slow ---------------------------------------------------------------------------


def test_a_body_in_too_many_chunks_is_not_read_completely(doors: Doors):
    with doors.connect() as connection:
        connection.sendall(b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"1\r\na\r\n" * (LIMITS.chunks + 1000))
        found = connection.recv(1 << 16)
    assert found.startswith(b"HTTP/1.1 413")


def test_a_body_is_refused_by_its_announced_length(doors: Doors):
    with doors.connect() as connection:
        connection.sendall(
            b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n" + bytes(1000)
        )
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
        (b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n" + b"".join(b"H%d: x\r\n" % n for n in range(1000)) + b"\r\n", b"400"),
        (b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100), b"400"),
    ],
    ids=["chunk without a size", "negative length", "a thousand headers", "a long path", "TLS"],
)
def test_invalid_http_ends_only_its_connection(doors: Doors, sent: bytes, status: bytes):
    with doors.connect() as connection:
        connection.sendall(sent)
        assert until_closed(connection).partition(b" ")[2].startswith(status)
    assert doors.infer(json_request())[0] == 200


@pytest.mark.parametrize("sent", [b"", b"GET /v2 HT", b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_ends_the_connection(fake: FakeTriton, sent: bytes):
    with Doors(fake, QUICK) as doors, doors.connect() as connection:
        connection.sendall(sent)
        assert until_closed(connection) == b""


def test_a_body_that_does_not_come_ends_the_request(fake: FakeTriton):
    with Doors(fake, QUICK) as doors, doors.connect() as connection:
        connection.sendall(b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")


HEAD = b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


def test_a_connection_over_the_maximum_is_refused(fake: FakeTriton):
    fake.gate.clear()
    request = HEAD % len(json_request()) + json_request()
    with Doors(fake, replace(LIMITS, connections=2)) as doors, doors.connect() as one, doors.connect() as two:
        one.sendall(request)
        two.sendall(request)
        in_flight(fake, 2)
        with doors.connect() as third:
            assert until_closed(third).startswith(b"HTTP/1.1 503")
        fake.gate.set()
        for connection in (one, two):
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("sent", [b"", b"GET /v2 HT", b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_the_longest_silent_connection_makes_room(fake: FakeTriton, sent: bytes):
    with Doors(fake, replace(LIMITS, connections=2)) as doors, doors.connect() as silent, doors.connect() as other:
        silent.sendall(sent)
        if sent.endswith(b"\r\n\r\n"):
            assert silent.recv(1 << 16).startswith(b"HTTP/1.1 200")
        else:
            eventually(lambda: len(doors.http_server._silent_since) == 2, "both are open")
        other.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert other.recv(1 << 16).startswith(b"HTTP/1.1 200")
        assert doors.infer(json_request())[0] == 200
        assert until_closed(silent) == b""


def test_a_body_that_does_not_come_makes_room(fake: FakeTriton, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(http_server, "_PATIENCE", 0.0)
    with Doors(fake, replace(LIMITS, connections=1)) as doors, doors.connect() as slow:
        slow.sendall(HEAD % 100 + b"{")
        eventually(lambda: len(doors.http_server._answered_since) == 1, "its head has come")
        assert doors.infer(json_request())[0] == 200
        assert until_closed(slow) == b""


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"GET /\x1b[31m HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://x:999999/v2 HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["two lengths", "a length of chunks", "control characters", "a port that is none"],
)
def test_invalid_http_gets_one_sentence_and_is_not_logged(doors: Doors, sent: bytes, caplog: pytest.LogCaptureFixture):
    with doors.connect() as connection:
        connection.sendall(sent)
        head, _, body = until_closed(connection).partition(b"\r\n\r\n")
    assert b" 400 " in head
    assert b"aiohttp" not in head
    sentence = json.loads(body)["error"]
    assert sentence.startswith("the request is not valid HTTP (")
    assert sentence.isprintable()
    assert not caplog.records


def test_a_client_that_asks_before_it_sends_is_answered(doors: Doors):
    head = HEAD % len(json_request())
    with doors.connect() as connection:
        connection.sendall(head[:-2] + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(1 << 16) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(json_request())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
    with doors.connect() as connection:
        connection.sendall(HEAD[:-2] % 10**12 + b"Expect: 100-continue\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")
    assert doors.infer(json_request(), Expect="a teapot")[0] == 417


# --- Calls of gRPC that wait ----------------------------------------------------------------------


class Call:
    """A call whose messages are sent one by one."""

    def __init__(self, doors: Doors, method: str) -> None:
        self.sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.channel = doors.channel([*DIRECT, ("grpc.use_local_subchannel_pool", 1)])
        method = f"/inference.GRPCInferenceService/{method}"
        self.answers = self.channel.stream_stream(method)(iter(self.sent.get, None), timeout=DEADLINE)

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self.sent.put(None)
        self.channel.close()

    def end(self) -> grpc.StatusCode:
        """The status with which it ends."""
        with pytest.raises(grpc.RpcError) as refused:
            next(self.answers)
        return refused.value.code()


def stream_request(request_id: str) -> bytes:
    tensors = {"image": PIXELS, "label": np.array([b"Anger"], np.object_)}
    message: bytes = infer_request(STREAM_MODEL, STREAM_INPUTS, tensors, request_id=request_id).SerializeToString()
    return message


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer", "ModelMetadata"])
def test_a_call_that_waits_makes_room(fake: FakeTriton, method: str):
    with contextlib.ExitStack() as stack:
        doors = stack.enter_context(Doors(fake, replace(LIMITS, connections=2)))
        calls = [stack.enter_context(Call(doors, method)) for _ in range(3)]
        eventually(lambda: any(call.answers.done() for call in calls), "one has ended")
        (ended,) = (call for call in calls if call.answers.done())
        assert ended.end() == grpc.StatusCode.RESOURCE_EXHAUSTED
        assert doors.stub().ModelInfer(clip_request(), timeout=DEADLINE).model_name == CLIP_MODEL


class Silent:
    """A call that never sends."""

    async def read(self) -> Any:
        await asyncio.Event().wait()


def test_the_longest_wait_ends_first():
    async def ends() -> list[int]:
        calls, ended = waiting.Waiting(2, 1 << 60), []

        async def wait(number: int) -> None:
            with contextlib.suppress(RefusedError):
                await calls.message(Silent(), DEADLINE, "late", lambda: number == 0)
                return
            ended.append(number)

        tasks = [asyncio.ensure_future(wait(number)) for number in range(5)]
        while len(ended) < 3:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return ended

    assert asyncio.run(ends()) == [1, 2, 3], "0 has requests in flight"


def test_a_stream_with_requests_in_flight_does_not_make_room(fake: FakeTriton):
    fake.gate.clear()
    with Doors(fake, replace(LIMITS, connections=2)) as doors, Call(doors, "ModelStreamInfer") as working:
        working.sent.put(stream_request("mine"))
        in_flight(fake)
        with Call(doors, "ModelInfer") as one, Call(doors, "ModelInfer") as other:
            eventually(lambda: one.answers.done() != other.answers.done(), "one of them has ended")
        fake.gate.set()
        answer = messages.ModelStreamInferResponse.FromString(next(working.answers))
        assert answer.infer_response.id == "mine"


def test_waiting_calls_end_when_memory_is_short(doors: Doors, monkeypatch: pytest.MonkeyPatch):
    """What gRPC has received of their messages is theirs."""
    with Call(doors, "ModelStreamInfer") as call:
        call.sent.put(b"")
        answer = messages.ModelStreamInferResponse.FromString(next(call.answers))
        assert answer.error_message.startswith("[NOT_FOUND]")
        monkeypatch.setattr(waiting, "resident_bytes", lambda: 1 << 60)
        assert call.end() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
def test_a_grpc_message_that_does_not_come_ends_its_call(fake: FakeTriton, method: str):
    sent: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    with Doors(fake, QUICK) as doors, doors.channel() as channel:
        call = channel.stream_stream(f"/inference.GRPCInferenceService/{method}")
        with pytest.raises(grpc.RpcError) as refused:
            next(call(iter(sent.get, None), timeout=DEADLINE))
        sent.put(None)
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "no whole request came" in refused.value.details()


def test_a_call_whose_answer_is_not_read_gives_its_place_back(fake: FakeTriton, caplog: pytest.LogCaptureFixture):
    def large(response: Any) -> None:
        response.raw_output_contents[0] = bytes(8 << 20)
        fake.change = None  # later answers are small

    def served(doors: Doors) -> bool:
        with contextlib.suppress(grpc.RpcError):  # the only place is taken
            return bool(doors.stub().ModelInfer(clip_request(), timeout=DEADLINE).model_name)
        return False

    fake.change = large
    with Doors(fake, replace(LIMITS, write_seconds=0.2, calls=1)) as doors, Call(doors, "ModelInfer") as unread:
        unread.sent.put(clip_request().SerializeToString())
        eventually(lambda: fake.change is None, "its clip is made")
        eventually(lambda: served(doors), "its place is free")
        assert not unread.answers.done()
    assert not caplog.records


def test_a_silent_stream_ends_unless_it_waits_for_an_answer(fake: FakeTriton):
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
    seed, label = np.zeros(1, np.int64), np.array([b"Anger"], np.object_)
    sent.put(infer_request(STREAM_MODEL, STREAM_INPUTS, {"image": PIXELS, "label": label, "seed": seed}))
    fake.gate.clear()
    with Doors(fake, QUICK) as doors:
        answers = doors.stub().ModelStreamInfer(iter(sent.get, None), timeout=DEADLINE)
        in_flight(fake)
        doors.do(asyncio.sleep(3 * QUICK.idle_seconds))
        fake.gate.set()
        assert next(answers).infer_response.model_name == STREAM_MODEL
        with pytest.raises(grpc.RpcError) as refused:
            list(answers)
        sent.put(None)
    assert refused.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert "silent for too long" in refused.value.details()


@pytest.mark.parametrize("compression", [None, grpc.Compression.Gzip])
def test_a_grpc_message_too_large_is_refused(doors: Doors, compression: Any):
    bomb = clip_request(image=np.zeros((4000, 4000, 3), np.uint8))
    with pytest.raises(grpc.RpcError) as refused:
        doors.stub().ModelInfer(bomb, timeout=DEADLINE, compression=compression)
    assert refused.value.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("method", ["ModelInfer", "ModelMetadata", "ModelReady"])
def test_an_invalid_message_is_refused(doors: Doors, method: str):
    with doors.channel() as channel, pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary(f"/inference.GRPCInferenceService/{method}")(b"\xff" * 100, timeout=DEADLINE)
    assert refused.value.code() not in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED)
    assert doors.stub().ModelInfer(clip_request(), timeout=DEADLINE).model_name == CLIP_MODEL


def test_a_refused_request_does_not_affect_others_of_its_stream(doors: Doors):
    good = infer_request(
        STREAM_MODEL, STREAM_INPUTS, {"image": PIXELS, "label": np.array([b"Anger"], np.object_)}, request_id="good"
    )
    bad = infer_request(STREAM_MODEL, STREAM_INPUTS, {"seed": np.zeros(1, np.int64)}, request_id="bad")
    bad.inputs[0].shape[0] = 2**61
    answers = list(doors.stub().ModelStreamInfer(iter((bad, good)), timeout=DEADLINE))
    assert answers[0].error_message.startswith("[INVALID_ARGUMENT] the input seed has the shape")
    assert answers[0].infer_response.id == "bad"
    assert {answer.infer_response.id for answer in answers[1:]} == {"good"}


def test_a_picture_that_cannot_be_decoded_is_not_forwarded(doors: Doors, fake: FakeTriton):
    noise = noisy_picture(2 << 20)
    with pytest.raises(grpc.RpcError, match="cannot be read as an image"):
        doors.stub().ModelInfer(noise, timeout=DEADLINE)
    assert not fake.seen


@pytest.mark.parametrize("door", ["http", "grpc", "stream"])
def test_a_refused_request_leaves_no_memory(doors: Doors, door: str):
    """Not even until Python's garbage collector runs, which bytes do not trigger."""
    size, count = 8 << 20, 4
    bomb = gzip.compress(bytes(5 * size))
    request = noisy_picture(size)
    serialized = request.SerializeToString()
    with contextlib.ExitStack() as stack:
        streams = [stack.enter_context(Call(doors, "ModelStreamInfer")) for _ in range(count)]
        gc.collect()
        gc.disable()
        stack.callback(gc.enable)
        tracemalloc.start()
        stack.callback(tracemalloc.stop)
        for stream in streams:
            if door == "http":
                assert doors.infer(bomb, Content_Encoding="gzip")[0] == 413
            elif door == "stream":  # which stays open
                stream.sent.put(serialized)
                assert b"cannot be read as an image" in next(stream.answers)
            else:
                with pytest.raises(grpc.RpcError, match="cannot be read as an image"):
                    doors.stub().ModelInfer(request, timeout=DEADLINE)
        eventually(lambda: tracemalloc.get_traced_memory()[0] < size, "less than one of them is left")


# --- In flight ------------------------------------------------------------------------------------


def test_requests_of_a_process_that_dies_get_an_error_at_once(doors: Doors, fake: FakeTriton):
    fake.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        over_grpc = pool.submit(doors.stub().ModelInfer, clip_request("a"), timeout=DEADLINE)
        over_http = pool.submit(doors.infer, json_request())
        stream = infer_request(
            STREAM_MODEL, STREAM_INPUTS, {"image": PIXELS, "label": np.array([b"Anger"], np.object_)}, request_id="c"
        )
        streamed = pool.submit(lambda: list(doors.stub().ModelStreamInfer(iter((stream,)), timeout=DEADLINE)))
        in_flight(fake, 3)

        async def lose() -> list[int]:
            return [doors.service.lose(model) for model in ("lfdm_sample", "lfdm_stream")]

        assert doors.do(lose()) == [2, 1]
        error = over_grpc.exception(DEADLINE)
        assert isinstance(error, grpc.RpcError)
        assert error.code() == grpc.StatusCode.UNAVAILABLE
        assert error.details().startswith("the process of lfdm_sample has died")
        status, answer = over_http.result(DEADLINE)
        assert status == 503
        assert answer["error"].startswith("the process of lfdm_sample has died")
        (told,) = streamed.result(DEADLINE)
        assert told.error_message.startswith("[UNAVAILABLE] the process of lfdm_stream has died")


def test_an_ended_server_is_reported_as_restarting(doors: Doors, fake: FakeTriton):
    fake.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(doors.infer, json_request())
        in_flight(fake)
        assert doors.do(doors.service.detach()) == 1
        assert lost.result(DEADLINE)[0] == 503
    status, answer = doors.infer(json_request())
    assert status == 503
    assert "is started again" in answer["error"]
    assert doors.ask("GET", "/v2/health/live")[0] == 200
    assert doors.ask("GET", "/v2/health/ready")[0] == 400
    assert not doors.stub().ModelReady(messages.ModelReadyRequest(name=CLIP_MODEL), timeout=DEADLINE).ready


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_disconnected_clients_request_is_cancelled(doors: Doors, fake: FakeTriton, door: str):
    fake.gate.clear()
    if door == "grpc":
        call = doors.stub().ModelInfer.future(clip_request(), timeout=DEADLINE)
        in_flight(fake)
        call.cancel()
    else:
        with doors.connect() as connection:
            head = b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
            connection.sendall(head % len(json_request()) + json_request())
            in_flight(fake)
    eventually(lambda: fake.cancelled == [fake.seen[0].request_id], "the sampler is told")
    eventually(lambda: fake.cut_off == 1, "the call has ended")


def test_requests_over_the_maximum_in_flight_are_refused_at_once(fake: FakeTriton):
    fake.gate.clear()
    with Doors(fake, replace(LIMITS, in_flight=1)) as doors, ThreadPoolExecutor(1) as pool:
        first = pool.submit(doors.infer, json_request())
        in_flight(fake)
        status, answer = doors.infer(json_request())
        assert (status, "queue full" in answer["error"]) == (503, True)
        fake.gate.set()
        assert first.result(DEADLINE)[0] == 200
        assert doors.infer(json_request())[0] == 200


def test_bytes_over_the_maximum_are_refused_at_once(fake: FakeTriton):
    with Doors(fake, replace(LIMITS, held_bytes=1000)) as doors:
        status, answer = doors.infer(json_request())
        assert (status, "queue full: requests hold" in answer["error"]) == (503, True)
        assert doors.service.flights._held == 0


def test_draining_waits_only_for_requests_in_flight(doors: Doors, fake: FakeTriton):
    fake.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(doors.infer, json_request())
        in_flight(fake)
        draining = pool.submit(doors.do, doors.service.flights.drain(DEADLINE))
        eventually(lambda: doors.service.flights.draining, "it is draining")
        status, answer = doors.infer(json_request())
        assert (status, "server is stopping" in answer["error"]) == (503, True)
        assert doors.ask("GET", "/v2/health/ready")[0] == 400
        fake.gate.set()
        assert running.result(DEADLINE)[0] == 200
        assert draining.result(DEADLINE)


def test_a_silent_stream_does_not_delay_draining(doors: Doors, fake: FakeTriton):
    """A client that keeps a stream open, or has cancelled its requests."""
    sent: queue.SimpleQueue[Any] = queue.SimpleQueue()
    fake.gate.clear()
    sent.put(infer_request(STREAM_MODEL, STREAM_INPUTS, {"image": PIXELS, "label": np.array([b"Anger"], np.object_)}))
    sent.put(None)
    call = doors.stub().ModelStreamInfer(iter(sent.get, None), timeout=DEADLINE)
    in_flight(fake)
    call.cancel()
    eventually(lambda: not doors.service.flights._flying, "nothing is in flight")
    assert doors.do(doors.service.flights.drain(DEADLINE))
