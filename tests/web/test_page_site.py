"""The page as a web application: what it takes, whom it lets in, and what it makes a browser load."""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import re
import secrets
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.web.store import Store
from lfdm_export.web.turns import Turns
from tests.fake_bundle import write_fake_bundle

uvicorn = pytest.importorskip("uvicorn", reason="the extra `web` is not installed")
pytest.importorskip("gradio", reason="the extra `web` is not installed")

from lfdm_export.web.app import WebOptions, make_app  # noqa: E402
from lfdm_export.web.page.makers import LocalMaker  # noqa: E402
from lfdm_export.web.page.site import make_site  # noqa: E402

PICTURE = str(Path(__file__).resolve().parents[2] / "docs" / "character.png")
FILE = {"_type": "gradio.FileData"}
_LINK = re.compile(r"""(?:src|href)=["']([^"']+)|url\(["']?([^"')]+)|@import\s+["']([^"']+)""")


class Site:
    """A server of this process."""

    def __init__(self, port: int) -> None:
        self.port = port

    def call(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, named)
        try:
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=120) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def announce(self, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
        """The answer to a request whose body does not come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.putrequest("POST", path)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read()

    def upload(self, data: bytes, **headers: str) -> tuple[int, bytes, Any]:
        body = (
            b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n' + data + b"\r\n--x--\r\n"
        )
        return self.call("/gradio_api/upload", body, Content_Type="multipart/form-data; boundary=x", **headers)


@contextmanager
def serving(folder: Path, options: WebOptions) -> Iterator[Site]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", "")  # put back at the end
        pipeline, turns = Pipeline.open(write_fake_bundle(folder / "fake"), threads=1, target="onnxruntime"), Turns()
        api = make_app(pipeline, Store(folder / "state"), options, turns)
        site = make_site(LocalMaker(pipeline, turns, options.queue), options, api=api, here=True)
        server = uvicorn.Server(uvicorn.Config(site, port=0, log_level="warning", timeout_graceful_shutdown=3))
        socket = server.config.bind_socket()
        socket.listen(128)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]})
        thread.start()
        try:
            yield Site(socket.getsockname()[1])
        finally:
            server.should_exit = True
            thread.join()
            socket.close()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with serving(tmp_path_factory.mktemp("site"), WebOptions(body_bytes=5000)) as found:
        yield found


def test_the_page_links_to_nothing_elsewhere(site: Site):
    status, page, headers = site.call("/")
    assert status == 200
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    text = page.decode()
    links = {next(filter(None, found)) for found in _LINK.findall(text)}
    assert links
    styles = [link for link in links if link.endswith(".css")] + ["theme.css"]
    for style in styles:
        links |= {next(filter(None, found)) for found in _LINK.findall(site.call(f"/{style.lstrip('./')}")[1].decode())}
    assert [link for link in links if link.startswith(("http:", "https:", "//"))] == []
    config = json.loads(site.call("/config")[1])
    assert config["analytics_enabled"] is False
    assert config.get("stylesheets") in (None, [])
    assert [part["type"] for part in config["components"]].count("image") == 1


def test_the_api_stands_beside_it(site: Site):
    assert site.call("/health")[0] == 200
    status, answer, headers = site.call("/v1/models")
    assert (status, json.loads(answer)["data"][0]["id"]) == (200, "fake")
    assert "Content-Security-Policy" not in headers
    status, answer, _ = site.call("/v1/nothing")
    assert (status, "message" in json.loads(answer)["error"]) == (404, True)


def test_no_file_of_the_machine_is_served(site: Site):
    for path in ("/etc/passwd", str(Path(__file__).resolve()), "pyproject.toml", "http://localhost/x"):
        status, answer, _ = site.call(f"/gradio_api/file={path}")
        assert status in (403, 404)
        assert b"root:" not in answer
    for path in ("/clips/", "/clips/../uploads", "/clips/%2e%2e/examples/character1.png", "/docs", "/redoc"):
        assert site.call(path)[0] == 404


def test_who_is_not_let_in(site: Site):
    assert site.call("/", Host="localhost:1234")[0] == 200
    assert site.call("/", Host="[::1]:80")[0] == 200
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        assert site.call("/", Host=host)[0] == 421
    assert site.upload(b"a", Sec_Fetch_Site="same-origin")[0] == 200
    for source in ("cross-site", "same-site"):
        assert site.upload(b"a", Sec_Fetch_Site=source)[0] == 403
    assert site.call("/", Sec_Fetch_Site="cross-site")[0] == 200, "a link from elsewhere may lead here"


def test_uploads_have_the_limits_of_the_api(site: Site):
    assert site.upload(b"a" * 4000)[0] == 200
    status, answer, _ = site.upload(b"a" * 5001)
    assert (status, answer) == (413, b"File size exceeded maximum allowed size of 5000 bytes.")
    for headers in ({"Content-Length": "100000"}, {"Transfer-Encoding": "chunked"}):
        status, answer = site.announce("/gradio_api/queue/join", headers)
        assert (status, answer[:30]) == (413, b"a request has at most 70,536 b")


@pytest.mark.parametrize(
    ("photo", "message"),
    [
        ({"path": "http://127.0.0.1:9/x.png", "meta": FILE}, "a file is given as an address"),
        ({"path": "https://127.0.0.1:9/x.png", "meta": FILE}, "a file is given as an address"),
        ({"path": PICTURE, "meta": FILE}, "was not uploaded by a user"),
        ({"path": PICTURE}, "the photo was not uploaded; choose its file"),
        (PICTURE, ""),
    ],
)
def test_a_photograph_is_what_was_uploaded(site: Site, photo: object, message: str):
    """Neither a file of the machine, nor one elsewhere, which Gradio itself would fetch."""
    config = json.loads(site.call("/config")[1])
    (button,) = (part["id"] for part in config["components"] if part["props"].get("elem_id") == "make")
    (make,) = (one["id"] for one in config["dependencies"] if [button, "click"] in one["targets"])
    values = [photo, "whole", "", False, "label", "Anger", "", None, None, "ddim", 2, 1, 0, False]
    request = {"data": values, "fn_index": make, "session_hash": secrets.token_hex(8), "event_data": None}
    site.call("/gradio_api/queue/join", json.dumps(request).encode(), Content_Type="application/json")
    _, events, _ = site.call(f"/gradio_api/queue/data?session_hash={request['session_hash']}")
    assert message in events.decode()
    assert "clips/" not in events.decode()


def test_a_token_is_the_password(tmp_path: Path):
    def basic(words: str) -> str:
        return "Basic " + base64.b64encode(words.encode()).decode()

    with serving(tmp_path, WebOptions(token="secret")) as site:
        for given in ("", basic("secret:wrong"), basic("secret"), "Basic !", "Bearer wrong", "secret"):
            status, _, headers = site.call("/", Authorization=given)
            assert status == 401
            assert headers["WWW-Authenticate"].startswith("Basic ")
        for given in (basic("anybody:secret"), basic(":secret"), "Bearer secret"):
            assert site.call("/", Authorization=given)[0] == 200
        assert site.call("/clips/x/clip.gif")[0] == 401
        assert site.call("/health")[0] == 200
