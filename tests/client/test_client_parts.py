"""Parts of the clients, without a network."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.client.faults import Attempts, Fault, plain_sentence, read_fault, stream_status
from lfdm_export.client.settings import Retry, Settings, Tls, token_from_environment, uses_proxy
from lfdm_export.client.wire import decode, encode
from lfdm_export.errors import InputError, LfdmExportError, ServerError
from lfdm_export.pictures.clip import Clip
from lfdm_export.protocol.contract import STREAM_OUTPUTS, WireTensor
from tests.fake_triton import answer, text

# ---------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://localhost:8000", r"begins with http://.*try localhost:8001"),
        ("grpc://[::1]:8001/x", "begins with grpc://"),
        ("localhost", "'localhost' is not HOST:PORT"),
        ("", "is not HOST:PORT"),
        (":8001", "is not HOST:PORT"),
        ("localhost:http", "is not HOST:PORT"),
        ("localhost:0", "is not HOST:PORT"),
        ("localhost:65536", "is not HOST:PORT"),
        ("localhost/x:8001", "is not HOST:PORT"),
    ],
)
def test_wrong_addresses(address: str, message: str):
    with pytest.raises(InputError, match=message):
        Settings().check_address(address)


@pytest.mark.parametrize("address", ["localhost:8001", "127.0.0.1:1", "[::1]:65535", "clips.example.org:443"])
def test_addresses(address: str):
    assert Settings().check_address(address) == address


@pytest.mark.parametrize("secret", [{"token": "x"}, {"headers": {"x-api-key": "x"}}])
def test_a_token_does_not_leave_the_machine_in_plain_text(secret: Any):
    for address in ("localhost:8001", "127.0.0.1:8001", "[::1]:8001"):
        assert Settings(**secret).check_address(address) == address
    for address in ("clips.example.org:8001", "10.0.0.1:8001"):
        with pytest.raises(InputError, match=r"would travel to .* in plain text; use TLS"):
            Settings(**secret).check_address(address)
        assert Settings(**secret, tls=Tls()).check_address(address) == address
        assert Settings(**secret, plain_token=True).check_address(address) == address


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"token": ""}, "the token is empty or holds"),
        ({"token": "se cret\n"}, "the token is empty or holds"),
        ({"headers": {"X-Big": "a"}}, "header 'X-Big' cannot be sent"),
        ({"headers": {"x": "se\ncret"}}, "header 'x' cannot be sent"),
        ({"headers": {"grpc-timeout": "1"}}, "header 'grpc-timeout' cannot be sent"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"compression": "zip"}, "compression is 'zip'"),
        ({"max_message_bytes": 1}, "max_message_bytes is 1"),
        ({"keepalive": 0.1}, "keepalive is 0.1"),
        ({"concurrency": 0}, "concurrency is 0"),
    ],
)
def test_wrong_settings(arguments: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message) as caught:
        Settings(**arguments)
    assert "cret" not in str(caught.value)


def test_wrong_retries_and_certificates(tmp_path: Path):
    with pytest.raises(InputError, match="attempts is 0"):
        Retry(attempts=0)
    with pytest.raises(InputError, match="first_pause is 3"):
        Retry(first_pause=3, longest_pause=2)
    with pytest.raises(InputError, match="belong together"):
        Tls(private_key="x.key")
    with pytest.raises(InputError, match=r"no\.pem cannot be read: No such file"):
        Tls(tmp_path / "no.pem").credentials()
    (tmp_path / "a.pem").write_text("hello")
    with pytest.raises(InputError, match=r"a\.pem is not a PEM file"):
        Tls(tmp_path / "a.pem").credentials()


def test_channels_take_large_messages_and_find_servers_that_come_back():
    options = dict(Settings(keepalive=30, tls=Tls(server_name="clips.example.org")).channel_options("10.0.0.7:8001"))
    assert options["grpc.max_receive_message_length"] == options["grpc.max_send_message_length"] == 256 << 20
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert options["grpc.ssl_target_name_override"] == "clips.example.org"
    assert options["grpc.max_reconnect_backoff_ms"] <= 1000 * Retry().longest_pause
    assert "grpc.keepalive_time_ms" not in dict(Settings().channel_options("10.0.0.7:8001"))


@pytest.mark.parametrize(
    "host",
    ["localhost", "LOCALHOST", "localhost.", "a.localhost", "127.0.0.1", "127.9.8.7", "[::1]", "[::ffff:127.0.0.1]"],
)
def test_this_machine_is_never_reached_through_a_proxy(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "http://proxy.example.org:3128")
    assert not uses_proxy(f"{host}:8001")
    assert dict(Settings().channel_options(f"{host}:8001"))["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize("name", ["NO_PROXY", "no_proxy"])
def test_others_are_reached_as_the_environment_says(name: str, monkeypatch: pytest.MonkeyPatch):
    for other in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(other, raising=False)
    assert "grpc.enable_http_proxy" not in dict(Settings().channel_options("clips.example.org:8001"))
    monkeypatch.setenv(name, "intranet.example.org, .lab.example.org,10.0.0.7,clips.example.org:8001")
    for direct in ("intranet.example.org:1", "a.lab.example.org:1", "10.0.0.7:8001", "clips.example.org:8001"):
        assert not uses_proxy(direct), direct
    for through in ("clips.example.org:443", "10.0.0.8:8001", "example.org:8001"):
        assert uses_proxy(through), through


def test_a_token_from_the_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CLIP_TOKEN", " top-secret\n")
    assert token_from_environment("CLIP_TOKEN") == "top-secret"
    for value in ("", "  "):
        monkeypatch.setenv("CLIP_TOKEN", value)
        with pytest.raises(InputError, match="CLIP_TOKEN is not set or empty"):
            token_from_environment("CLIP_TOKEN")


# ------------------------------------------------------------------------------------------ retries


def test_pauses_double_up_to_a_bound_and_are_drawn_from_half_to_whole():
    retry = Retry(attempts=9, first_pause=0.5, longest_pause=3.0)
    assert [retry.pause(attempt, 1.0) for attempt in (1, 2, 3, 4, 5)] == [0.5, 1.0, 2.0, 3.0, 3.0]
    assert [retry.pause(attempt, 0.0) for attempt in (1, 2, 3)] == [0.25, 0.5, 1.0]


def unavailable(*, again: bool = True) -> Fault:
    return Fault("UNAVAILABLE", "", again, ServerError("it was the last"))


def test_attempts_count_and_watch_the_clock():
    now = [100.0]
    attempts = Attempts(Retry(attempts=3, first_pause=2, longest_pause=8), 10, clock=lambda: now[0], draw=lambda: 1.0)
    assert attempts.begin() == 10
    now[0] += 1
    assert attempts.pause_after(unavailable()) == 2
    now[0] += 2
    assert attempts.begin() == 7
    assert attempts.pause_after(unavailable()) == 4
    now[0] += 4
    assert attempts.begin() == 3
    with pytest.raises(ServerError, match="it was the last"):
        attempts.pause_after(unavailable())


def test_no_attempt_where_it_would_not_help_or_come_too_late():
    clock = [0.0]
    attempts = Attempts(Retry(attempts=9, first_pause=4, longest_pause=4), 3, clock=lambda: clock[0], draw=lambda: 1.0)
    attempts.begin()
    with pytest.raises(ServerError):
        attempts.pause_after(unavailable())
    patient = Attempts(Retry(), 1000)
    patient.begin()
    with pytest.raises(ServerError):
        patient.pause_after(unavailable(again=False))
    clock[0] = 5
    assert attempts.begin() > 0, "gRPC takes no negative time-out"


@pytest.mark.parametrize(
    ("code", "details", "answered", "again"),
    [
        ("UNAVAILABLE", "queue full", False, True),
        ("UNAVAILABLE", "queue full", True, False),
        ("UNAVAILABLE", "server is stopping", False, True),
        ("UNAVAILABLE", "failed to connect to all addresses; last error: Connection refused", False, True),
        ("UNAVAILABLE", "Socket closed", False, True),
        ("UNAVAILABLE", "DNS resolution failed for x", False, True),
        ("NOT_FOUND", "Request for unknown model: 'lfdm' has no available versions", False, True),
        ("NOT_FOUND", "Request for unknown model: 'lfdm' is not found", False, False),
        ("UNAVAILABLE", "Too many pings", False, False),
        ("UNAVAILABLE", "deadline exceeded", False, False),
        ("UNAVAILABLE", "Ssl handshake failed: CERTIFICATE_VERIFY_FAILED", False, False),
        ("UNAVAILABLE", "Ssl handshake failed: WRONG_VERSION_NUMBER", False, False),
        ("INVALID_ARGUMENT", "", False, False),
        ("DEADLINE_EXCEEDED", "", False, False),
        ("CANCELLED", "", False, False),
        ("INTERNAL", "", False, False),
        ("RESOURCE_EXHAUSTED", "", False, False),
        ("UNAUTHENTICATED", "", False, False),
    ],
)
def test_what_may_be_sent_again(code: str, details: str, answered: bool, again: bool):
    fault = read_fault(code, details, address="a:1", tls=True, request_id="", answered=answered)
    assert fault.again == again
    assert isinstance(fault.error, LfdmExportError)
    assert str(fault.error)


def test_the_status_of_an_error_in_a_stream_stands_in_its_message():
    assert stream_status("[INVALID_ARGUMENT] steps is 0") == ("INVALID_ARGUMENT", "steps is 0")
    assert stream_status("[request id: 7] [UNAVAILABLE] queue full: 64") == ("UNAVAILABLE", "queue full: 64")
    for sentence in ("queue full: 64", "server is stopping", "deadline exceeded"):
        assert stream_status(sentence) == ("UNAVAILABLE", sentence)
    assert stream_status("Stub process is not healthy.") == ("UNKNOWN", "Stub process is not healthy.")


def test_sentences_are_freed_of_tritons_wrapping():
    for details in (
        "unknown label 'x'",
        "in ensemble 'lfdm', unknown label 'x'",
        "[request id: 4-2] unknown label 'x'",
        "[request id: a] in ensemble 'lfdm', [request id: a] unknown\n label 'x'",
    ):
        assert plain_sentence(details) == "unknown label 'x'"
    assert plain_sentence("text [request id: 3]") == "text [request id: 3]"


# --------------------------------------------------------------------------------------------- wire


@pytest.mark.parametrize("name", ["kind", "steps", "frames", "timings"])
def test_tensors_survive_the_wire(name: str):
    spec = next(spec for spec in STREAM_OUTPUTS if spec.name == name)
    shape = [axis if isinstance(axis, int) else 3 for axis in spec.shape]
    tensor = text("Gruß\0") if spec.datatype == "BYTES" else np.arange(np.prod(shape)).reshape(shape).astype(spec.dtype)
    found = decode(answer("m", "1", {name: tensor}, STREAM_OUTPUTS), STREAM_OUTPUTS)[name]
    assert found.dtype == tensor.dtype
    np.testing.assert_array_equal(found, tensor)
    found.flags.writeable = True  # raises unless it owns its memory


def test_big_endian_and_strided_arrays_travel_as_they_are():
    array = np.arange(6, dtype=">i4").reshape(2, 3).T
    assert encode(array) == np.array([0, 3, 1, 4, 2, 5], "<i4").tobytes()


@pytest.mark.parametrize("content", [b"\1", b"\5\0\0\0abc", b"", b"\1\0\0\0a\1\0\0\0b"])
def test_strings_of_another_length(content: bytes):
    spec = (WireTensor("kind", "BYTES", (1,)),)
    response = answer("m", "1", {"kind": text("x")}, spec)
    response.raw_output_contents[0] = content
    with pytest.raises(ServerError, match=f"with {len(content)} bytes of content"):
        decode(response, spec)


# ------------------------------------------------------------------------------------------- others


def test_a_clip_of_frames_alone(tmp_path: Path):
    clip = Clip(
        frames=np.zeros((1, 2, 16, 16, 3), np.uint8),
        warped=np.zeros((1, 0, 16, 16, 3), np.uint8),
        latent=np.zeros((1, 3, 0, 4, 4), np.float32),
        source=np.zeros((1, 16, 16, 3), np.uint8),
        residual_flow=False,
    )
    clip.save(tmp_path / "clip.gif")
    with pytest.raises(InputError, match="panels need the warped images and the latent"):
        clip.save(tmp_path / "panels.gif", panels=True)
    clip.save(tmp_path / "clip.npz")
    with np.load(tmp_path / "clip.npz") as archive:
        assert archive.files == ["frames", "metadata"]


def test_the_client_needs_neither_torch_nor_onnx():
    code = (
        "import sys\nfrom lfdm_export.client import AsyncClient, Client\n"
        "Client('localhost:1').close()\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'av', 'openvino'} & set(sys.modules)\n"
        "assert not heavy, heavy\nassert 'grpc' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", ["grpc", "tritonclient"])
def test_what_is_missing_is_told(missing: str):
    code = (
        f"import sys\nsys.modules[{missing!r}] = None\nfrom lfdm_export.client import Client\n"
        "try:\n    Client('localhost:1')\nexcept ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "pip install 'lfdm-export[client]'" in done.stdout, done.stderr
