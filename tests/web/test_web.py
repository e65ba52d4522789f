"""The video API, as its clients see it."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import json
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export.bundle.reader import Bundle
from lfdm_export.errors import InputError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.clips import load_clip
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.web.store import Store
from tests.fake_bundle import BODIES, FRAMES, SIZE, write_fake_bundle

uvicorn = pytest.importorskip("uvicorn", reason="the extra `web` is not installed")
pytest.importorskip("fastapi", reason="the extra `web` is not installed")

from lfdm_export.web.app import WebOptions, make_app  # noqa: E402
from lfdm_export.web.worker import Worker  # noqa: E402


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("web") / "fake")


def picture(size: int = SIZE, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)).save(stream, kind)
    return stream.getvalue()


class Gate:
    """Holds a pipeline at its first step until it is opened."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.reached, self._open = threading.Event(), threading.Event()
        real = pipeline.stages.run

        def run(stage: str, *tensors: Any) -> Any:
            if stage == "step":
                self.reached.set()
                assert self._open.wait(120)
            return real(stage, *tensors)

        pipeline.stages.run = run  # type: ignore[method-assign]

    def open(self) -> None:
        self._open.set()


class Served:
    """A server of this process."""

    def __init__(self, address: str, pipeline: Pipeline, store: Store) -> None:
        self.address, self.pipeline, self.store = address, pipeline, store

    def call(self, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, Any, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(self.address + path, body or None, named, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as answer:
                status, content, told = answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            status, content, told = error.code, error.read(), error.headers
        plain = json.loads(content) if told["Content-Type"] == "application/json" else content
        return status, plain, told

    def create(self, **fields: Any) -> tuple[int, Any, Any]:
        plain = {"prompt": "happiness", "input_reference": base64.b64encode(picture()).decode(), "steps": 2, **fields}
        body = json.dumps({name: value for name, value in plain.items() if value is not None}).encode()
        return self.call("POST", "/v1/videos", body, Content_Type="application/json")

    def wait_for(self, name: str, *statuses: str) -> Any:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            _, video, _ = self.call("GET", f"/v1/videos/{name}")
            if video["status"] in statuses:
                return video
            time.sleep(0.005)
        raise AssertionError(f"the video never was {statuses}: {video}")


Serve = Callable[..., Any]


@contextmanager
def serving(
    bundle: Bundle, folder: Path, options: WebOptions | None = None, *, gated: bool = False
) -> Iterator[tuple[Served, Gate | None]]:
    pipeline = Pipeline.open(bundle, threads=1, target="onnxruntime")
    gate = Gate(pipeline) if gated else None
    store = Store(folder)
    server = uvicorn.Server(uvicorn.Config(make_app(pipeline, store, options), port=0, log_level="warning"))
    socket = server.config.bind_socket()
    socket.listen(128)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
    thread.start()
    try:
        yield Served(f"http://127.0.0.1:{socket.getsockname()[1]}", pipeline, store), gate
    finally:
        with pytest.MonkeyPatch.context() as patch:
            if gate is not None:
                patch.setattr(Worker, "stop", functools.partialmethod(stop_in_the_middle, gate))
            server.should_exit = True
            thread.join()
        socket.close()


def stop_in_the_middle(worker: Worker, gate: Gate) -> None:
    """`Worker.stop`, but what waits at the gate goes on only once the worker knows that it has to end."""
    with worker._wake:
        worker._stopping = True
        worker._wake.notify()
    gate.open()
    worker._thread.join()


@pytest.fixture
def served(bundle: Bundle, tmp_path: Path) -> Iterator[Served]:
    with serving(bundle, tmp_path / "state") as (server, _):
        yield server


# ------------------------------------------------------------------------------------------- there and back


def test_a_video_is_that_of_generate(served: Served, bundle: Bundle, tmp_path: Path):
    status, video, _ = served.create(seed=7)
    assert status == 200
    assert video["object"] == "video"
    assert (video["size"], video["seconds"], video["model"]) == (f"{SIZE}x{SIZE}", "0.5", "fake")
    done = served.wait_for(video["id"], "completed", "failed")
    assert (done["status"], done["progress"], done["error"]) == ("completed", 100, None)
    expected = Pipeline.open(bundle, threads=1, target="onnxruntime").generate(
        np.asarray(Image.open(io.BytesIO(picture()))), label="happiness", steps=2, seed=7
    )
    status, gif, headers = served.call("GET", f"/v1/videos/{video['id']}/content", Accept="image/gif")
    assert (status, headers["Content-Type"]) == (200, "image/gif")
    (tmp_path / "a.gif").write_bytes(gif)
    (expected_path,) = expected.save(tmp_path / "b.gif")
    assert gif == expected_path.read_bytes()
    _, mp4, headers = served.call("GET", f"/v1/videos/{video['id']}/content")
    assert headers["Content-Type"] == "video/mp4"
    (tmp_path / "a.mp4").write_bytes(mp4)
    assert len(load_clip(tmp_path / "a.mp4")) == FRAMES
    assert clip_metadata(tmp_path / "a.mp4")["seed"] == 7
    assert served.call("GET", f"/v1/videos/{video['id']}/content", Accept="text/html")[0] == 406


@pytest.mark.filterwarnings("ignore:The Sora API")
def test_the_official_client(served: Served, tmp_path: Path):
    openai = pytest.importorskip("openai")
    (tmp_path / "face.jpg").write_bytes(picture(40, "JPEG"))
    client = openai.OpenAI(base_url=f"{served.address}/v1", api_key="none", max_retries=0)
    with (tmp_path / "face.jpg").open("rb") as photo:
        video = client.videos.create(
            model="fake", prompt="turn left", input_reference=photo, extra_body={"steps": 2, "seed": 5, "fps": 5}
        )
    assert video.status == "queued"
    served.wait_for(video.id, "completed")
    found = client.videos.retrieve(video.id)
    assert (found.status, found.progress, found.seconds, found.size) == ("completed", 100, "1", f"{SIZE}x{SIZE}")
    client.videos.download_content(video.id).write_to_file(tmp_path / "a.mp4")
    assert len(load_clip(tmp_path / "a.mp4")) == FRAMES
    assert [one.id for one in client.videos.list().data] == [video.id]
    assert client.videos.delete(video.id).deleted is True
    with pytest.raises(openai.NotFoundError, match="there is no video"):
        client.videos.retrieve(video.id)
    with (
        pytest.raises(openai.BadRequestError, match="unknown label 'nodd'"),
        (tmp_path / "face.jpg").open("rb") as photo,
    ):
        client.videos.create(prompt="nodd", input_reference=photo)
    assert list(served.store.folder.glob("video_*")) == [], "what is deleted leaves no files"


def test_lists_have_pages(served: Served):
    made = [served.create(seed=seed)[1]["id"] for seed in range(5)]

    def page(query: str) -> tuple[list[str], bool]:
        _, found, _ = served.call("GET", f"/v1/videos?{query}")
        return [video["id"] for video in found["data"]], found["has_more"]

    assert page("") == (made[::-1], False)
    assert page("limit=2") == ([made[4], made[3]], True)
    assert page(f"limit=2&after={made[3]}") == ([made[2], made[1]], True)
    assert page(f"order=asc&after={made[3]}") == ([made[4]], False)
    for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=video_x"):
        assert served.call("GET", f"/v1/videos?{query}")[0] == 400


# ------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": None}, "prompt must be text"),
        ({"prompt": 3}, "prompt must be text"),
        ({"prompt": "x" * 5000}, "prompt must be text"),
        ({"prompt": "happines"}, "did you mean 'happiness'"),
        ({"size": "720x1280"}, f"size is '720x1280', this model makes {SIZE}x{SIZE}"),
        ({"seconds": "8"}, "seconds is 8, this model's clips take 0.5 s"),
        ({"seconds": "nan"}, "seconds is 'nan', expected a number"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": "x"}, "seed is 'x', expected a whole number"),
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps is True, expected a whole number"),
        ({"sampler": "euler"}, "sampler"),
        ({"eta": 3}, "eta"),
        ({"fps": 99}, "fps is 99, expected 1 to 50"),
        ({"crop": "1,2"}, "the crop is '1,2'"),
        ({"guidence": 2}, "unknown field 'guidence'"),
        ({"extra": {"guidence": 2}}, "unknown field 'guidence'"),
        ({"extra": 3}, "extra is not an object"),
        ({"input_reference": None}, "input_reference is missing"),
        ({"input_reference": "%%%"}, "is not base64"),
        ({"input_reference": "https://x/y.png"}, "an address, which this server does not fetch"),
        ({"input_reference": base64.b64encode(b"text").decode()}, "input_reference"),
        ({"input_reference": {"image_url": 3}}, "input_reference is missing"),
    ],
)
def test_a_request_that_cannot_be_served(served: Served, fields: dict[str, Any], message: str):
    status, plain, _ = served.create(**fields)
    assert (status, plain["error"]["type"]) == (400, "invalid_request_error")
    assert message in plain["error"]["message"]
    assert list(served.store.folder.glob("video_*")) == []


def test_options_may_stand_in_extra(served: Served):
    data_url = "data:image/png;base64," + base64.b64encode(picture()).decode()
    status, video, _ = served.create(
        steps=None, extra={"steps": 3, "seed": "4"}, size=f"{SIZE}x{SIZE}", seconds="0.5",
        input_reference={"image_url": data_url}, crop="center",
    )  # fmt: skip
    assert status == 200
    assert (video["extra"]["steps"], video["extra"]["seed"]) == (3, 4)


def test_a_seed_that_is_not_given_is_drawn_and_told(served: Served, tmp_path: Path):
    first, second = (served.create()[1] for _ in range(2))
    seed = first["extra"]["seed"]
    assert seed != second["extra"]["seed"]
    assert served.wait_for(first["id"], "completed", "failed")["extra"]["seed"] == seed
    _, mp4, _ = served.call("GET", f"/v1/videos/{first['id']}/content")
    (tmp_path / "a.mp4").write_bytes(mp4)
    assert clip_metadata(tmp_path / "a.mp4")["seed"] == seed


def test_a_face_needs_a_package_of_the_server(served: Served, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    status, plain, _ = served.create(crop="face")
    assert status == 400
    assert "this server cannot find faces, give crop as X,Y,W,H" in plain["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"nonsense", b"[]", b"[" * 100_000, b"\xff", b"null"])
def test_a_body_that_is_no_request(served: Served, body: bytes):
    assert served.call("POST", "/v1/videos", body, Content_Type="application/json")[0] == 400
    assert served.call("POST", "/v1/videos", body, Content_Type="multipart/form-data; boundary=x")[0] == 400
    assert served.call("POST", "/v1/videos", body, Content_Type="multipart/form-data")[0] == 400


def test_no_request_is_a_fault_of_the_server(bundle: Bundle, tmp_path: Path):
    """Hundreds of requests of odd values, odd shapes and odd bytes: each is served or refused, none fails."""
    draw = random.Random(5)
    whole, half = (base64.b64encode(picture()[:size]).decode() for size in (None, 60))
    odd: list[Any] = [
        None, "", " ", "x", "\ud800", "\0", "🙂" * 50, 0, 1, -1, 2.5, 1e308, 10**30, 10**4000, True, [], [[]], {},
        {"a": 1}, "9" * 5000, "nan", "-inf", "1e400", "1,2,3,4", "center", "16x16", "https://x", "data:,",
        "data:image/png;base64,", whole, half, {"image_url": []},
    ]  # fmt: skip
    names = [
        "prompt", "model", "seconds", "size", "input_reference", "extra", "crop", "seed", "steps", "sampler", "eta",
        "guidance_scale", "fps", "\ud800", "odd", "__class__",
    ]  # fmt: skip
    statuses = set()
    with serving(bundle, tmp_path, WebOptions(queue=3)) as (served, _):
        for _ in range(300):
            fields = {draw.choice(names): draw.choice(odd) for _ in range(draw.randint(0, 5))}
            statuses.add(served.create(**fields)[0])
        for _ in range(100):
            body = bytearray(json.dumps({"prompt": "Anger", "input_reference": "AAAA"}).encode())
            for _ in range(draw.randint(1, 6)):
                body[draw.randrange(len(body))] = draw.randrange(256)
            kind = draw.choice(["application/json", "multipart/form-data; boundary=AA", "text/plain", ""])
            statuses.add(served.call("POST", "/v1/videos", bytes(body), Content_Type=kind)[0])
        for path in ("%00", "%ff%fe", "..%2f..%2fvideos.sqlite3", "a" * 4000, "%F0%9F%99%82", "video_'--"):
            for tail in ("", "/content", "/cancel"):
                statuses.add(served.call("POST" if tail == "/cancel" else "GET", f"/v1/videos/{path}{tail}")[0])
    assert statuses <= {200, 400, 404, 405, 429}
    assert {400, 404} <= statuses


def test_large_requests_are_refused_before_they_are_decoded(bundle: Bundle, tmp_path: Path):
    with serving(bundle, tmp_path, WebOptions(body_bytes=5000, image_pixels=30 * 30)) as (served, _):
        status, plain, _ = served.create(input_reference="A" * 6000)
        assert (status, plain["error"]["message"][:37]) == (413, "the request has more than 5,000 bytes")
        status, plain, _ = served.create(input_reference=base64.b64encode(picture(31)).decode())
        assert status == 400
        assert "900" in plain["error"]["message"]


def test_a_token_lets_in(bundle: Bundle, tmp_path: Path):
    with serving(bundle, tmp_path, WebOptions(token="secret")) as (served, _):
        for given in ("", "Bearer wrong", "secret", "Bearer secret2"):
            status, plain, _ = served.call("GET", "/v1/videos", Authorization=given)
            assert (status, plain["error"]["message"][:26]) == (401, "the token is missing or wr")
        assert served.call("GET", "/v1/models", Authorization="Bearer secret")[1]["data"][0]["labels"] == [
            "Anger", "happiness", "turn left",
        ]  # fmt: skip
        assert served.call("GET", "/health")[0] == 200


def test_what_there_is_not(served: Served):
    for method, path, status in (
        ("GET", "/v1/videos/video_x", 404), ("DELETE", "/v1/videos/video_x", 404), ("GET", "/v1/nothing", 404),
        ("GET", "/v1/videos/video_x/content", 404), ("POST", "/v1/videos/video_x/cancel", 404),
        ("PUT", "/v1/videos", 405),
    ):  # fmt: skip
        found, plain, _ = served.call(method, path)
        assert (found, "message" in plain["error"]) == (status, True)
    assert served.call("GET", "/openapi.json")[1]["paths"].keys() >= {"/v1/videos", "/v1/videos/{name}/content"}


# --------------------------------------------------------------------------------------- queue and restart


def test_a_full_queue_a_cancelled_and_a_deleted_video(bundle: Bundle, tmp_path: Path):
    with serving(bundle, tmp_path, WebOptions(queue=3), gated=True) as (served, gate):
        assert gate is not None
        running, waiting, other = (served.create(seed=seed)[1]["id"] for seed in range(3))
        assert gate.reached.wait(120)
        assert served.wait_for(running, "in_progress")["progress"] == 0
        status, plain, headers = served.create()
        assert (status, plain["error"]["type"], headers["Retry-After"]) == (429, "rate_limit_exceeded", "10")
        assert served.call("GET", f"/v1/videos/{waiting}/content")[0] == 409
        assert served.call("POST", f"/v1/videos/{waiting}/cancel")[1]["status"] == "cancelled"
        assert served.call("POST", f"/v1/videos/{waiting}/cancel")[0] == 409
        assert served.call("POST", f"/v1/videos/{running}/cancel")[1]["status"] == "cancelled"
        assert served.call("DELETE", f"/v1/videos/{running}")[1]["deleted"] is True
        gate.open()
        assert served.wait_for(other, "completed", "failed")["status"] == "completed"
        assert served.call("GET", f"/v1/videos/{running}")[0] == 404
    files = sorted(path.name for path in tmp_path.glob("video_*"))
    assert files == [f"{other}.gif", f"{other}.mp4"]


def test_a_video_that_fails_says_why(bundle: Bundle, tmp_path: Path):
    with serving(bundle, tmp_path) as (served, _):

        def fail(*_: Any, **__: Any) -> None:
            raise InputError("values that are not finite")

        served.pipeline.generate = fail  # type: ignore[method-assign, assignment]
        name = served.create()[1]["id"]
        video = served.wait_for(name, "completed", "failed")
        assert (video["status"], video["error"]["message"]) == ("failed", "values that are not finite")
        _, plain, _ = served.call("GET", f"/v1/videos/{name}/content")
        assert plain["error"]["message"] == "the video is failed, not completed: values that are not finite"


def test_a_restart_forgets_nothing(bundle: Bundle, tmp_path: Path):
    with serving(bundle, tmp_path) as (served, _):
        before = served.create(seed=1)[1]["id"]
        served.wait_for(before, "completed")
    with serving(bundle, tmp_path, gated=True) as (served, gate):
        assert gate is not None
        halfway, waiting = (served.create(seed=seed)[1]["id"] for seed in (2, 3))
        assert gate.reached.wait(120)
    with serving(bundle, tmp_path) as (served, _):
        for name in (halfway, waiting):
            assert served.wait_for(name, "completed", "failed")["status"] == "completed"
        assert served.call("GET", f"/v1/videos/{before}/content")[0] == 200


def test_another_bundle_makes_nothing_that_was_asked_of_this_one(bundle: Bundle, tmp_path: Path):
    with serving(bundle, tmp_path / "state", gated=True) as (served, gate):
        assert gate is not None
        name = served.create()[1]["id"]
        assert gate.reached.wait(120)
    other = write_fake_bundle(tmp_path / "other", decode=BODIES["decode"].replace("half = Mul", "half = Add"))
    with serving(other, tmp_path / "state") as (served, _):
        video = served.wait_for(name, "completed", "failed")
    assert (video["model"], video["error"]["message"]) == (
        "fake", "it was requested from the bundle fake, which is no longer served; request it again",
    )  # fmt: skip


def test_two_servers_do_not_share_a_folder(bundle: Bundle, tmp_path: Path):
    with serving(bundle, tmp_path):
        code = "import sys; from pathlib import Path; from lfdm_export.web.store import Store; Store(Path(sys.argv[1]))"
        done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=False)
        assert "another server uses the folder of videos" in done.stderr
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="cannot be used"):
        Store(tmp_path / "file")


#: The command; while the file named first is there, it waits at the fifth clip.
HELD_COMMAND = """
import sys, threading
from pathlib import Path
from lfdm_export.cli import web_main
from lfdm_export.generate.pipeline import Pipeline

held, real, begun = Path(sys.argv.pop(1)), Pipeline.generate, []

def generate(pipeline, *arguments, **options):
    begun.append(1)
    if held.exists() and len(begun) == 5:
        threading.Event().wait()
    return real(pipeline, *arguments, **options)

Pipeline.generate = generate
sys.exit(web_main())
"""


def test_the_command_survives_a_kill(bundle: Bundle, tmp_path: Path):
    (held := tmp_path / "held").touch()
    words = [str(held), str(bundle.path), "--no-page", "--port", "0", "--state", str(tmp_path), "--threads", "1"]
    words += ["--target", "onnxruntime"]

    @contextmanager
    def started() -> Iterator[tuple[subprocess.Popen[str], Served]]:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", HELD_COMMAND, *words], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        line = next(line for line in process.stdout if line.startswith("videos"))
        try:
            yield process, Served(line.split()[1].removesuffix("/v1/videos"), None, None)  # type: ignore[arg-type]
        finally:
            process.kill()
            process.wait()
            process.stdout.close()

    with started() as (process, served):
        wanted = [served.create(steps=10, seed=seed)[1]["id"] for seed in range(12)]
        process.kill()
        process.wait()
    with contextlib.closing(sqlite3.connect(tmp_path / "videos.sqlite3")) as database:
        (left,) = database.execute("SELECT count(*) FROM videos WHERE status != 'completed'").fetchone()
    assert left >= 8, "it was killed in the middle"
    held.unlink()
    with started() as (process, served):
        for name in wanted:
            assert served.wait_for(name, "completed", "failed")["status"] == "completed"
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM
