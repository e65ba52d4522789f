"""Hostile requests for a server, of the kinds that strangers have sent, each made from a seed."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import io
import json
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as messages
from tritonclient.grpc import service_pb2_grpc

from benchmarks.fuzz import damaged, rearranged
from lfdm_export.protocol.contract import CLIP_MODEL, DECODE_MODEL, ENCODE_MODEL, SAMPLE_MODEL, STREAM_MODEL

#: Seconds after which a request without an answer counts as hanging.
TIMEOUT = 90.0
#: Status codes that refuse a request, or that its sender caused; any other than these and OK is a fault of the server.
_REFUSED = {
    "INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "CANCELLED",
}  # fmt: skip
_PATHS = (
    "/v2/repository/index", "/v2/repository/models/evil/load", "/v2/repository/models/lfdm/unload",
    "/v2/systemsharedmemory/region/x/register", "/v2/cudasharedmemory/status", "/v2/trace/setting", "/v2/logging",
    "/v2/models/..%2f..%2fetc/infer", "/v2/models/lfdm/versions/9999999999999999999999/infer",
    "/v2/models/" + "x" * 3000,
)  # fmt: skip
_SIZES = (0, 1, -1, 7, 10**6, 2**31, 2**61, 2**63 - 1)


@dataclass(frozen=True)
class Doors:
    """Where to send.

    Attributes:
        http, grpc: HOST:PORT of each endpoint.
        stub: calls of Triton's protocol.
    """

    http: str
    grpc: str
    stub: Any

    @classmethod
    def at(cls, http_address: str, grpc_address: str) -> Doors:
        """The doors of a server."""
        options = [("grpc.enable_http_proxy", 0), ("grpc.max_send_message_length", -1)]
        channel = grpc.insecure_channel(grpc_address, options)
        return cls(http_address, grpc_address, service_pb2_grpc.GRPCInferenceServiceStub(channel))

    def socket(self) -> socket.socket:
        """A new connection to the HTTP endpoint."""
        host, _, port = self.http.rpartition(":")
        return socket.create_connection((host, int(port)), timeout=TIMEOUT)

    def post(self, body: bytes, path: str = f"/v2/models/{CLIP_MODEL}/infer", **headers: str) -> str:
        """Send a body over HTTP; "refused", "answered", or what was wrong."""
        connection = http.client.HTTPConnection(self.http, timeout=TIMEOUT)
        try:
            connection.request("POST", path, body, {name.replace("_", "-"): value for name, value in headers.items()})
            status = connection.getresponse().status
        except (BrokenPipeError, ConnectionResetError):
            return "refused"  # before all of it was sent
        finally:
            connection.close()
        return _judged(status)

    def call(self, request: Any, method: str = "ModelInfer") -> str:
        """Send a message over gRPC; "refused", "answered", or what was wrong."""
        try:
            getattr(self.stub, method)(request, timeout=TIMEOUT)
        except grpc.RpcError as error:
            code = error.code().name
            return "refused" if code in _REFUSED else f"gRPC {code}: {error.details()}"
        return "answered"


def _judged(status: int) -> str:
    """What an HTTP status says: 503 is for a queue that is full."""
    return "answered" if status == 200 else "refused" if status < 500 else f"HTTP status {status}"


Attack = Callable[[random.Random, Doors], str]


# --- HTTP -----------------------------------------------------------------------------------------


def _json_inputs(rng: random.Random) -> dict[str, Any]:
    pixels = [[[rng.randrange(256) for _ in range(3)] for _ in range(8)] for _ in range(8)]
    return {
        "id": "mine",
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [8, 8, 3], "data": pixels},
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["no such label"]},
            {"name": "steps", "datatype": "INT32", "shape": [1], "data": [2]},
        ],
        "outputs": [{"name": "frames", "parameters": {"binary_data": True}}],
    }


def rearranged_json(rng: random.Random, doors: Doors) -> str:
    """A request in JSON with nodes replaced, removed, or wrapped."""
    value: Any = _json_inputs(rng)
    for _ in range(rng.randint(1, 4)):
        value = rearranged(value, rng)
    return doors.post(json.dumps(value).encode())


def damaged_json(rng: random.Random, doors: Doors) -> str:
    """A damaged body, at times with a wrong length of its JSON part."""
    headers = {"Inference-Header-Content-Length": str(rng.choice(_SIZES))} if rng.random() < 0.3 else {}
    return doors.post(damaged(json.dumps(_json_inputs(rng)).encode(), rng), **headers)


def impossible_shape(rng: random.Random, doors: Doors) -> str:
    """A shape that its content does not have; some end Triton 2.51 with `std::bad_alloc`."""
    name, datatype = rng.choice((("image", "UINT8"), ("seed", "INT64"), ("eta", "FP32"), ("label", "BYTES")))
    shape = [rng.choice(_SIZES) for _ in range(rng.choice((1, 2, 3, 3, 60)))]
    return doors.post(
        json.dumps({"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": [0]}]}).encode()
    )


def nested(rng: random.Random, doors: Doors) -> str:
    """JSON nested deeper than a stack."""
    depth = rng.choice((1000, 100_000, 1_000_000))
    opened, closed = rng.choice((("[", "]"), ('{"a":', "}")))
    inner = opened * depth + "1" + closed * depth
    return doors.post(f'{{"inputs":[{{"name":"seed","datatype":"INT64","shape":[1],"data":{inner}}}]}}'.encode())


def bomb(rng: random.Random, doors: Doors) -> str:
    """A small body that grows when it is decompressed."""
    stream = io.BytesIO()
    with gzip.GzipFile(fileobj=stream, mode="wb") as file:
        for _ in range(rng.choice((20, 200))):
            file.write(b" " * 1_000_000)
    return doors.post(stream.getvalue(), Content_Encoding=rng.choice(("gzip", "deflate", "br")))


def many_chunks(rng: random.Random, doors: Doors) -> str:
    """A body of more chunks than Triton 2.51 survives (CVE-2025-23310)."""
    count = rng.choice((100, 300_000))
    with doors.socket() as connection:
        connection.sendall(b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            for _ in range(count // 100):
                connection.sendall(b"1\r\na\r\n" * 100)
            connection.sendall(b"0\r\n\r\n")
            return _raw_answer(connection)
        except (BrokenPipeError, ConnectionResetError):
            return "refused"


def broken_http(rng: random.Random, doors: Doors) -> str:
    """A damaged head, or one without an end; then the connection is closed."""
    head = b"POST /v2/models/lfdm/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000000\r\n\r\n"
    with doors.socket() as connection, contextlib.suppress(BrokenPipeError, ConnectionResetError):
        connection.sendall(damaged(head, rng) if rng.random() < 0.7 else head + bytes(rng.choice((1, 40 << 20))))
    return "refused"


def foreign_path(rng: random.Random, doors: Doors) -> str:
    """The interfaces of an administrator, and names that are not models."""
    return doors.post(b'{"parameters":{"config":"{}"}}', rng.choice(_PATHS))


def _raw_answer(connection: socket.socket) -> str:
    words = connection.recv(64).split()
    return _judged(int(words[1])) if len(words) > 1 and words[1].isdigit() else "refused"


# --- gRPC -----------------------------------------------------------------------------------------


def _message(model: str, **contents: tuple[str, list[int], bytes]) -> Any:
    found = messages.ModelInferRequest(model_name=model, id="mine")
    for name, (datatype, shape, content) in contents.items():
        found.inputs.add(name=name, datatype=datatype, shape=shape)
        found.raw_input_contents.append(content)
    return found


def _text(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def damaged_message(rng: random.Random, doors: Doors) -> str:
    """A request over gRPC with damaged bytes."""
    good = _message(
        CLIP_MODEL,
        image=("UINT8", [8, 8, 3], rng.randbytes(192)),
        label=("BYTES", [1], _text(b"no such label")),
        steps=("INT32", [1], struct.pack("<i", 2)),
    )
    call = grpc.insecure_channel(doors.grpc, [("grpc.enable_http_proxy", 0)])
    with call as channel:
        send = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        try:
            send(damaged(good.SerializeToString(), rng), timeout=TIMEOUT)
        except grpc.RpcError as error:
            # gRPC itself answers INTERNAL to bytes that are no message.
            code = error.code().name
            return "refused" if code in _REFUSED | {"INTERNAL"} else f"gRPC {code}: {error.details()}"
    return "answered"


def wrong_content(rng: random.Random, doors: Doors) -> str:
    """Contents that are shorter or longer than their shapes, or not numbers."""
    name, datatype, shape, content = rng.choice(
        (
            ("image", "UINT8", [4000, 4000, 3], b""),
            ("image", "UINT8", [1, 1, 3], bytes(1 << 20)),
            ("image", "FP32", [1, 1, 3], bytes(12)),
            ("eta", "FP32", [1], struct.pack("<f", float("nan"))),
            ("guidance_scale", "FP32", [1], struct.pack("<f", float("inf"))),
            ("steps", "INT32", [1], struct.pack("<i", rng.choice((-1, 0, 2**31 - 1)))),
            ("seed", "INT64", [2**40], b""),
            ("label", "BYTES", [1], struct.pack("<I", 2**31) + b"x"),
            ("label", "BYTES", [1], _text(rng.choice((b"\xff\xfe", b"\x1b[2J\x07", b"x" * 100_000, b"\x00")))),
            ("sampler", "BYTES", [1], _text(b"../../etc/passwd")),
        )
    )
    contents = {"image": ("UINT8", [8, 8, 3], bytes(192)), name: (datatype, shape, content)}
    return doors.call(_message(rng.choice((CLIP_MODEL, CLIP_MODEL, STREAM_MODEL)), **contents))


def raw_member(rng: random.Random, doors: Doors) -> str:
    """Requests to a member of the ensemble, which only the ensemble may send."""
    rows = rng.choice((1, 5, 100_000))
    request = _message(
        rng.choice((SAMPLE_MODEL, SAMPLE_MODEL, ENCODE_MODEL, DECODE_MODEL, "lfdm_condition", "evil")),
        timesteps=("FP32", [rows], bytes(4 * rows)),
        coefficients=("FP32", [rng.choice((1, rows)), 9], bytes(36)),
        seed=("INT64", [1], bytes(8)),
    )
    request.parameters["lfdm_priority"].int64_param = 1000
    return doors.call(request)


def administration(rng: random.Random, doors: Doors) -> str:
    """Calls that load code, or that read the server's memory."""
    region = messages.SystemSharedMemoryRegisterRequest(name="x", key="/lfdm_serve", byte_size=64)
    method, request = rng.choice(
        (
            ("RepositoryModelLoad", messages.RepositoryModelLoadRequest(model_name="evil")),
            ("RepositoryModelUnload", messages.RepositoryModelUnloadRequest(model_name=CLIP_MODEL)),
            ("SystemSharedMemoryRegister", region),
            ("TraceSetting", messages.TraceSettingRequest()),
            ("LogSettings", messages.LogSettingsRequest()),
        )
    )
    return doors.call(request, method)


def abandoned(rng: random.Random, doors: Doors) -> str:
    """A call that its sender gives up at once."""
    request = _message(
        CLIP_MODEL, image=("UINT8", [512, 512, 3], rng.randbytes(512 * 512 * 3)), label=("BYTES", [1], _text(b"x"))
    )
    doors.stub.ModelInfer.future(request, timeout=TIMEOUT).cancel()
    return "refused"


# --- Pictures -------------------------------------------------------------------------------------


def picture(rng: random.Random, doors: Doors) -> str:
    """Damaged pictures, and small ones that take much memory or time."""
    content = rng.choice((_damaged_picture, _large_picture, _many_scans, _many_frames))(rng)
    request = _message(
        CLIP_MODEL,
        image_bytes=("BYTES", [1], _text(content)),
        label=("BYTES", [1], _text(b"no such label")),
    )
    return doors.call(request)


def _damaged_picture(rng: random.Random) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.effect_noise((64, 48), 60).convert("RGB").save(stream, rng.choice(("JPEG", "PNG", "GIF", "WebP", "TIFF")))
    return damaged(stream.getvalue(), rng)


def _large_picture(_rng: random.Random) -> bytes:
    """A PNG of 30,000 x 30,000 pixels of one color."""
    from PIL import Image

    small = io.BytesIO()
    Image.new("1", (64, 64)).save(small, "PNG")
    found = bytearray(small.getvalue())
    found[16:24] = struct.pack(">II", 30_000, 30_000)
    return bytes(found)


def _many_scans(_rng: random.Random) -> bytes:
    """A progressive JPEG whose last scan is repeated thousands of times."""
    from PIL import Image

    stream = io.BytesIO()
    Image.effect_noise((512, 512), 60).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    start = data.rfind(b"\xff\xda")
    scan = data[start : start + 10]
    return data[:start] + scan * 20_000 + data[start:]


def _many_frames(_rng: random.Random) -> bytes:
    """A GIF with a large canvas."""
    from PIL import Image

    stream = io.BytesIO()
    Image.new("P", (8, 8)).save(stream, "GIF")
    found = bytearray(stream.getvalue())
    found[6:10] = struct.pack("<HH", 65_535, 65_535)
    return bytes(found)


#: All kinds. Those that take seconds each are drawn less often: see `SHARES`.
KINDS: tuple[Attack, ...] = (
    rearranged_json, damaged_json, impossible_shape, nested, bomb, many_chunks, broken_http, foreign_path,
    damaged_message, wrong_content, raw_member, administration, abandoned, picture,
)  # fmt: skip
_RARE = {nested, bomb, many_chunks, picture}
SHARES = [0.3 if kind in _RARE else 1.0 for kind in KINDS]
