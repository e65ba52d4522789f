"""The front's checks of hostile requests, without a server or a socket."""

from __future__ import annotations

import base64
import gzip
import json
import random
import struct
import zlib
from typing import Any

import pytest
from tritonclient.grpc import service_pb2 as messages

from lfdm_export.protocol.contract import CLIP_MODEL, CLIP_OUTPUTS, STREAM_INPUTS, STREAM_MODEL
from lfdm_export.protocol.requests import Limits
from lfdm_export.serving.front.checks import check_request, models_of
from lfdm_export.serving.front.inflate import Inflater, inflated_message
from lfdm_export.serving.front.json_answers import infer_answer, plain
from lfdm_export.serving.front.json_requests import HttpRequest, read_request
from lfdm_export.serving.front.limits import FrontLimits
from lfdm_export.serving.front.refusal import RefusedError

LIMITS = FrontLimits(
    Limits(image_bytes=1 << 20),
    json_values=50_000,
    json_lists=22_000,
    json_fractions=1_000,
    json_strings=2_000,
    json_objects=500,
)


def metadata(name: str) -> Any:
    sizes = {"text_width": 768}
    found = messages.ModelMetadataResponse(name=name)
    for spec in STREAM_INPUTS:
        shape = [sizes.get(axis, -1) if isinstance(axis, str) else axis for axis in spec.shape]
        found.inputs.add(name=spec.name, datatype=spec.datatype, shape=shape)
    for spec in CLIP_OUTPUTS:
        found.outputs.add(name=spec.name, datatype=spec.datatype)
    return found


MODELS = models_of([metadata(CLIP_MODEL), metadata(STREAM_MODEL)], LIMITS.requests)


def text(value: bytes) -> bytes:
    return struct.pack("<I", len(value)) + value


def request(*tensors: tuple[str, str, list[int], bytes], model: str = CLIP_MODEL, **fields: Any) -> Any:
    found = messages.ModelInferRequest(model_name=model, **fields)
    for name, datatype, shape, content in tensors:
        found.inputs.add(name=name, datatype=datatype, shape=shape)
        found.raw_input_contents.append(content)
    return found


IMAGE = ("image", "UINT8", [2, 2, 3], bytes(12))
LABEL = ("label", "BYTES", [1], text(b"fear"))
CANCEL = ("cancel_request_id", "BYTES", [1], text(b"mine"))


def with_parameter(field: str, value: Any, name: str = "lfdm_priority") -> Any:
    found = request(IMAGE, LABEL)
    setattr(found.parameters[name], field, value)
    return found


def in_shared_memory() -> Any:
    found = request(IMAGE, LABEL)
    found.inputs[0].parameters["shared_memory_region"].string_param = "theirs"
    return found


def with_output(name: str) -> Any:
    found = request(IMAGE, LABEL)
    found.outputs.add(name=name)
    return found


def typed(**contents: list[Any]) -> Any:
    found = messages.ModelInferRequest(model_name=CLIP_MODEL)
    tensor = found.inputs.add(name="steps", datatype="INT32", shape=[1])
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    return found


def test_requests_of_clients_are_accepted():
    for good in (
        request(IMAGE, LABEL),
        request(IMAGE, LABEL, model=STREAM_MODEL, id="mine", model_version="1"),
        request(CANCEL, model="lfdm_sample"),
        with_parameter("int64_param", 1000),
        with_parameter("int64_param", 10**6, "timeout"),
        with_output("frames"),
        typed(int_contents=[3]),
    ):
        check_request(MODELS, good)


HOSTILE: dict[str, tuple[Any, str]] = {
    "10^12 pixels": (request(("image", "UINT8", [10**6, 10**6, 3], b"")), "image has 3,000,000,000,000 bytes"),
    "2^61 seeds": (request(("seed", "INT64", [2**61], b"")), "the input seed has the shape [2305843009213693952]"),
    "a product beyond 64 bits": (request(("image", "UINT8", [2**62, 2**62, 3], b"")), "expected at most 1,048,576"),
    "a negative axis": (request(("image", "UINT8", [-1, 2, 3], b"")), "has the shape [-1,2,3]"),
    "no axis": (request(("image", "UINT8", [], b"")), "has the shape []"),
    "a thousand axes": (request(("image", "UINT8", [1] * 1000, b"")), "[1,1,1,1,1,1,1,1,…]"),
    "an empty picture": (request(("image", "UINT8", [0, 2, 3], b"")), "has the shape [0,2,3]"),
    "less content than its shape": (request(("image", "UINT8", [2, 2, 3], bytes(11))), "has 11 bytes, expected 12"),
    "more content than its shape": (request(("image", "UINT8", [2, 2, 3], bytes(13))), "has 13 bytes, expected 12"),
    "another type": (request(("seed", "INT32", [1], bytes(4))), "has the type 'INT32', expected INT64"),
    "a string beyond its content": (
        request(("label", "BYTES", [1], struct.pack("<I", 2**32 - 1) + b"x")), "does not hold 1 string"
    ),
    "two strings for one": (request(("label", "BYTES", [1], 2 * text(b"x"))), "does not hold 1 string"),
    "a million empty strings": (request(("label", "BYTES", [1], bytes(4 << 20))), "does not hold 1 string"),
    "half a length": (request(("label", "BYTES", [1], b"\1\0")), "does not hold 1 string"),
    "a huge label": (request(("label", "BYTES", [1], text(bytes(5000)))), "label has 5,000 bytes, expected at most"),
    "an unknown input": (request(("pixels", "UINT8", [1], b"x")), "unknown input 'pixels'"),
    "an input twice": (request(LABEL, LABEL), "given twice"),
    "no input": (request(), "has no inputs"),
    "contents that are not there": (
        messages.ModelInferRequest(
            model_name=CLIP_MODEL,
            inputs=[messages.ModelInferRequest.InferInputTensor(name="steps", datatype="INT32", shape=[1])],
        ),
        "steps has no content",
    ),
    "contents for another input": (request(IMAGE, LABEL, raw_input_contents=[b"one too many"]), "3 raw contents for 2"),
    "contents of another type": (typed(int64_contents=[3]), "has int64_contents, expected int_contents"),
    "too many typed contents": (typed(int_contents=[3] * 1000), "has 1000 values, expected 1"),
    "an unknown output": (with_output("weights"), "unknown output 'weights'"),
    "a member of the ensemble": (request(IMAGE, model="lfdm_encode"), "takes no requests from outside"),
    "a sample": (request(CANCEL, ("seed", "INT64", [1], bytes(8)), model="lfdm_sample"), "unknown input 'seed'"),
    "a huge id to cancel": (
        request(("cancel_request_id", "BYTES", [1], text(bytes(257))), model="lfdm_sample"), "expected at most 256"
    ),
    "another model": (request(IMAGE, model="evil"), "unknown model: 'evil'"),
    "another version": (request(IMAGE, model_version="7"), "no version '7'"),
    "a huge id": (request(IMAGE, LABEL, id="x" * 257), "id has 257 characters"),
    "a priority beyond": (with_parameter("int64_param", 1001), "lfdm_priority is 1001"),
    "a priority that is none": (with_parameter("string_param", "high"), "lfdm_priority is 'high'"),
    "a negative timeout": (with_parameter("int64_param", -1, "timeout"), "timeout is -1"),
    "a huge parameter": (with_parameter("string_param", "x" * 2000, "note"), "longer than 1024"),
    "a sequence": (with_parameter("int64_param", 1, "sequence_id"), "'sequence_id' is not served"),
    "shared memory": (in_shared_memory(), "is in shared memory"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_harmful_requests_are_refused_in_one_sentence(what: str):
    hostile, sentence = HOSTILE[what]
    with pytest.raises(RefusedError) as refused:
        check_request(MODELS, hostile)
    assert sentence in str(refused.value)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


# --- JSON -----------------------------------------------------------------------------------------


def read(body: Any, head_length: int | None = None) -> HttpRequest:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return read_request(MODELS, CLIP_MODEL, "", content, head_length, LIMITS)


def tensor(name: str, datatype: str, shape: Any, data: Any, **fields: Any) -> dict[str, Any]:
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data, **fields}]}


def test_a_picture_in_base64_is_no_list_of_exponents():
    picture = base64.b64encode(random.Random(0).randbytes(1 << 20)).decode()
    assert read(tensor("image_bytes", "BYTES", [1], [picture])).message.inputs[0].name == "image_bytes"


def test_json_becomes_the_same_message():
    body = {
        "id": "mine",
        "parameters": {"timeout": 5, "lfdm_priority": 1, "note": "x", "share": 0.5, "flag": True},
        "inputs": [
            {"name": "image", "datatype": "UINT8", "shape": [1, 2, 3], "data": [[[1, 2, 3], [4, 5, 6]]]},
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": ["Frühling"]},
            {"name": "seed", "datatype": "INT64", "shape": [1], "parameters": {"binary_data_size": 8}},
            {"name": "eta", "datatype": "FP32", "shape": [1], "data": [1]},
        ],
        "outputs": [{"name": "frames", "parameters": {"binary_data": True}}, {"name": "timings"}],
    }
    head = json.dumps(body).encode()
    found = read(head + struct.pack("<q", 2**40), len(head))
    check_request(MODELS, found.message)
    raw = found.message.raw_input_contents
    assert raw == [bytes(range(1, 7)), text("Frühling".encode()), struct.pack("<q", 2**40), struct.pack("<f", 1)]
    assert [list(one.shape) for one in found.message.inputs] == [[1, 2, 3], [1], [1], [1]]
    assert found.binary == {"frames": True, "timings": False}
    parameters = found.message.parameters
    assert (parameters["timeout"].int64_param, parameters["note"].string_param) == (5, "x")
    assert (parameters["share"].double_param, parameters["flag"].bool_param) == (0.5, True)


DEEP = 100_000
BAD_JSON: dict[str, tuple[Any, str]] = {
    "deep data": (b'{"inputs":[{"data":' + b"[" * DEEP + b"]" * DEEP + b"}]}", "more than 50,000 values"),
    "deep data of few values": (b'{"a":' + b"[" * 20_000 + b"]" * 20_000 + b"}", "nested too deep"),
    "many values": (tensor("image", "UINT8", [1, 1, 3], [0] * 60_000), "more than 50,000 values"),
    "many lists": (b'{"inputs":[' + b"[]," * 23_000 + b"1]}", "more than 22,000 lists"),
    "many objects": (b'{"inputs":[' + b'{"a":1},' * 1000 + b"1]}", "more than 500 objects"),
    "many names": (json.dumps({str(number): 1 for number in range(3000)}).encode(), "more than 2,000 strings"),
    "many exponents": (b'{"inputs":[' + b"1e308," * 3000 + b"1]}", "more than 1,000 numbers with a point or an"),
    "nested deeper than its shape": (tensor("seed", "INT64", [1], [[[7]]]), "nested deeper than its shape"),
    "10^12 pixels": (tensor("image", "UINT8", [10**6, 10**6, 3], [0]), "image has 3,000,000,000,000 bytes"),
    "an axis beyond 64 bits": (tensor("image", "UINT8", [2**64, 1, 3], [0]), "beyond 64 bits"),
    "axes that are not numbers": (tensor("seed", "INT64", ["1"], [7]), "expected a list of a few whole numbers"),
    "axes that are true": (tensor("seed", "INT64", [True], [7]), "expected a list of a few whole numbers"),
    "too few values": (tensor("image", "UINT8", [1, 1, 3], [0, 1]), "has 2 values, expected 3"),
    "too many values": (tensor("image", "UINT8", [1, 1, 3], [0] * 9), "has more than 3 values"),
    "a number beyond its type": (tensor("image", "UINT8", [1, 1, 3], [0, 1, 256]), "beyond UINT8, expected 0 to 255"),
    "a huge number": (tensor("seed", "INT64", [1], [10**4000]), "beyond INT64"),
    "a float beyond FP32": (tensor("eta", "FP32", [1], [10**400]), "beyond FP32"),
    "a float for a whole number": (tensor("seed", "INT64", [1], [1.5]), "a value that is not of type INT64"),
    "a string for a number": (tensor("seed", "INT64", [1], ["7"]), "a value that is not of type INT64"),
    "an object for a number": (tensor("seed", "INT64", [1], [{}]), "a value that is not of type INT64"),
    "a number for a string": (tensor("label", "BYTES", [1], [7]), "not a string"),
    "half a letter": (b'{"inputs":[{"name":"label","datatype":"BYTES","shape":[1],"data":["\\ud800"]}]}', "not text"),
    "a name of half a character": (b'{"inputs":[{"name":"\\ud800","datatype":"BYTES","shape":[1]}]}', "not text"),
    "a parameter of half a character": (b'{"inputs":[],"parameters":{"\\ud800":1}}', "not text"),
    "no data": ({"inputs": [{"name": "seed", "datatype": "INT64", "shape": [1]}]}, "has no list of data"),
    "no object": (b"[]", "not a JSON object"),
    "no JSON": (b"\xff\xfe", "not JSON"),
    "nothing": (b"", "not JSON"),
    "inputs that are not a list": ({"inputs": {"seed": 7}}, "expected a list of at most"),
    "hundreds of inputs": ({"inputs": [{}] * 400}, "inputs is a list of 400"),
    "a parameter that is a list": ({"inputs": [], "parameters": {"a": [[[]]]}}, "expected a number, a string"),
    "a huge timeout": ({"inputs": [], "parameters": {"timeout": 10**30}}, "expected a number, a string"),
    "shared memory": (
        tensor("seed", "INT64", [1], [7], parameters={"shared_memory_region": "x"}), "is in shared memory"
    ),
    "more binary data than there is": (
        tensor("seed", "INT64", [1], [7], parameters={"binary_data_size": 8}), "of 0 bytes that are there"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD_JSON)
def test_harmful_json_is_refused_in_one_sentence(what: str):
    body, sentence = BAD_JSON[what]
    with pytest.raises(RefusedError) as refused:
        read(body)
    assert sentence in str(refused.value)
    assert len(str(refused.value)) < 400
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("length", [-1, 10**9])
def test_a_json_length_beyond_the_body_is_refused(length: int):
    with pytest.raises(RefusedError, match="of a body of 2"):
        read(b"{}", length)


def test_answers_become_the_json_of_triton():
    response = messages.ModelInferResponse(model_name=CLIP_MODEL, model_version="1", id="mine")
    for name, datatype, shape, content in (
        ("frames", "UINT8", [2, 3], bytes(range(6))),
        ("timings", "FP32", [2], struct.pack("<2f", 0.5, 2)),
        ("kind", "BYTES", [1], text(b"done")),
    ):
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(content)
    pieces, length = infer_answer(response, HttpRequest(None, {}, all_binary=False))
    assert length is None
    found = json.loads(b"".join(pieces))
    assert (found["id"], found["model_name"], found["model_version"]) == ("mine", CLIP_MODEL, "1")
    assert [output["data"] for output in found["outputs"]] == [[0, 1, 2, 3, 4, 5], [0.5, 2.0], ["done"]]
    pieces, length = infer_answer(response, HttpRequest(None, {"frames": True}, all_binary=False))
    body = b"".join(pieces)
    assert body[length:] == bytes(range(6))
    first = json.loads(body[:length])["outputs"][0]
    assert first == {"name": "frames", "datatype": "UINT8", "shape": [2, 3], "parameters": {"binary_data_size": 6}}


def test_messages_become_plain_objects_with_numbers():
    found = plain(metadata(CLIP_MODEL))
    assert found["name"] == CLIP_MODEL
    assert found["inputs"][1] == {"name": "image", "datatype": "UINT8", "shape": [-1, -1, 3]}


# --- Compressed -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("coding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_compressed_bodies_are_decompressed_up_to_a_limit(coding: str, pack: Any):
    content, bomb = b"some JSON" * 100, pack(bytes(50 << 20))
    inflater = Inflater(coding, 1 << 20)
    assert b"".join(piece for byte in pack(content) for piece in inflater.feed(bytes([byte]))) == content
    inflater.finish()
    pieces: list[bytes] = []
    with pytest.raises(RefusedError, match="more than 1,048,576 bytes"):
        pieces.extend(Inflater(coding, 1 << 20).feed(bomb))
    assert sum(map(len, pieces)) <= 1 << 20
    assert inflated_message(pack(content), 1 << 20) == content
    with pytest.raises(RefusedError, match="more than 1,048,576 bytes"):
        inflated_message(bomb, 1 << 20)
    cut = Inflater(coding, 1 << 20)
    list(cut.feed(pack(content)[:-5]))
    with pytest.raises(RefusedError, match="cut off"):
        cut.finish()
    with pytest.raises(RefusedError, match="damaged"):
        list(Inflater(coding, 1 << 20).feed(b"no such thing at all"))
    with pytest.raises(RefusedError, match="something follows"):
        list(Inflater(coding, 1 << 20).feed(pack(content) + b"more"))


def test_an_unknown_coding_is_refused():
    with pytest.raises(RefusedError, match="the coding 'br' of the body is unknown"):
        Inflater("br", 1)


def test_an_uncompressed_message_stays_unchanged():
    message = request(IMAGE, LABEL).SerializeToString()
    assert inflated_message(message, 10) is message
