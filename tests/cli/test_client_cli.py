"""Tests of ``lfdm-generate --url``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import trustme
from PIL import Image

from lfdm_export.cli import generate_main
from lfdm_export.client import Retry
from lfdm_export.pictures.clip_files import load_clip
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.pictures.preprocess import prepare_image
from lfdm_export.protocol.contract import CLIP_MODEL, PRIORITY_PARAMETER, STREAM_MODEL
from tests.client.test_client import PATIENCE, expected_frames, until
from tests.fake_triton import FACTS, FakeTriton, Port, Serving

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
ANGER = sum(b"Anger")


@pytest.fixture
def fake() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def address(fake: FakeTriton) -> Iterator[str]:
    with Serving(fake) as serving:
        yield serving.address
        fake.gate.set()


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(PIXELS).save(path)
    return str(path)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1, printed.err
    assert "Traceback" not in printed.err
    return printed.err.strip()


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_a_clip(
    fake: FakeTriton, address: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
):
    folder = f"{tmp_path}/frames/"
    arguments = ["--url", address, "--image", photo, "--label", "anger", "-o", folder, "--seed", "3", "--priority", "5"]
    assert generate_main([*arguments, *more, "--timeout", "900"]) == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == f"clip  {tmp_path}/frames"
    assert "untrained" in printed.out
    assert printed.err == ""
    np.testing.assert_array_equal(load_clip(folder), expected_frames(3 + ANGER))
    (seen,) = fake.seen
    assert seen.model == (STREAM_MODEL if more else CLIP_MODEL)
    assert seen.parameters[PRIORITY_PARAMETER] == 5
    assert 800 < seen.seconds < 901


def test_what_is_left_out_is_as_without_a_server(fake: FakeTriton, address: str, photo: str, tmp_path: Path):
    arguments = ["--url", address, "--image", photo, "--label", "anger", "-o", str(tmp_path / "a.gif"), "-q"]
    assert generate_main(arguments) == 0
    (seen,) = fake.seen
    assert set(seen.tensors) == {"image", "label", "seed"}
    assert seen.outputs == ("frames", "timings")


@pytest.mark.parametrize("way", [[], ["--stream"]])
def test_a_seed_that_is_not_given_is_drawn_and_told(
    fake: FakeTriton, address: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], way: list[str]
):
    arguments = ["--url", address, "--image", photo, "--label", "anger", "-o", str(tmp_path / "a.gif"), *way]
    for _ in range(2):
        assert generate_main(arguments) == 0
        seed = int(fake.seen[-1].tensors["seed"][0])
        assert clip_metadata(tmp_path / "a.gif")["seed"] == seed
        assert f" seed={seed}" in capsys.readouterr().out
    first, second = fake.seen
    assert first.tensors["seed"] != second.tensors["seed"]


def test_options_reach_the_server(fake: FakeTriton, address: str, photo: str, tmp_path: Path):
    np.save(tmp_path / "embedding.npy", np.arange(6.0))
    out = tmp_path / "clip.npz"
    arguments = ["--url", address, "--image", photo, "--embedding", str(tmp_path / "embedding.npy"), "-o", str(out)]
    more = ["--sampler", "unipc", "--steps", "7", "--guidance", "1.5", "--compression", "gzip", "-q"]
    assert generate_main([*arguments, *more]) == 0
    (seen,) = fake.seen
    assert seen.tensors["text_embedding"].tolist() == [0, 1, 2, 3, 4, 5]
    assert (seen.tensors["sampler"][0], seen.tensors["steps"][0]) == (b"unipc", 7)
    assert seen.tensors["guidance_scale"][0] == 1.5
    with np.load(out) as archive:
        assert set(archive.files) == {"frames", "latent", "warped", "metadata"}


def test_a_crop_and_metadata(fake: FakeTriton, address: str, photo: str, tmp_path: Path):
    out = tmp_path / "clip.gif"
    more = ["--crop", "center", "--seed", "3", "-q"]
    for way in ([], ["--stream"]):
        assert generate_main(["--url", address, "--image", photo, "--label", "anger", "-o", str(out), *more, *way]) == 0
        np.testing.assert_array_equal(fake.seen[-1].tensors["image"], prepare_image(PIXELS, 16, crop="center"))
        found = clip_metadata(out)
        assert (found["label"], found["seed"], found["sampler"], found["steps"]) == ("Anger", 3, "ddim", 4)


def test_panels(address: str, photo: str, tmp_path: Path):
    out = tmp_path / "clip.gif"
    assert generate_main(["--url", address, "--image", photo, "--text", "wave", "-o", str(out), "--panels", "-q"]) == 0
    clip = load_clip(out)
    assert clip.shape == (5, 32, 80, 3)  # includes titles above the frames
    source = prepare_image(PIXELS, FACTS.image_size).astype(int)
    assert np.abs(clip[0, 16:, :16] - source).mean() < 12, "the prepared photograph comes first, in the GIF's palette"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["b", "--url", "localhost:1", "--label", "a"], "give either BUNDLE"),
        (["--label", "a"], "give either BUNDLE"),
        (["b", "--stream", "--label", "a"], "--stream is for --url"),
        (["b", "--tls-ca", "x", "--label", "a"], "--tls-ca is for --url"),
        (["b", "--allow-plain-token", "--label", "a"], "--allow-plain-token is for --url"),
        (["b", "--priority", "0", "--label", "a"], "--priority is for --url"),
        (["--url", "localhost:1", "--drive", "c.gif"], "--drive is for a BUNDLE that runs here"),
        (["--url", "localhost:1", "--threads", "2", "--label", "a"], "--threads is for a BUNDLE"),
        (["--url", "localhost:1", "--stream", "--panels", "--label", "a"], "leave out --stream"),
        (["--url", "localhost:1", "--stream", "--format", "npz", "--label", "a"], "leave out --stream"),
        (["--url", "localhost:1", "--stride", "2", "--format", "npz", "--label", "a"], "leave out --stream, --frames"),
        (["--url", "localhost:1", "--stride", "2", "--motion", "a.motion"], "are for a BUNDLE that runs here"),
        (["--url", "localhost:1", "--tls-key", "k", "--label", "a"], "--tls-key and --tls-cert belong together"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        generate_main([*arguments, "--image", "i.png", "-o", "o.gif"])
    assert done.value.code == 2
    assert message in capsys.readouterr().err


def test_some_frames_and_an_interval(fake: FakeTriton, address: str, photo: str, tmp_path: Path):
    out, interval = tmp_path / "clip.webp", ["--guidance", "2", "--guidance-interval", "0.25", "0.5"]
    arguments = ["--url", address, "--image", photo, "--label", "anger", "--stride", "2", *interval, "-q"]
    assert generate_main([*arguments, "-o", str(out)]) == 0
    assert load_clip(out).shape[0] == 3
    assert fake.seen[0].tensors["only_frames"].tolist() == [0, 2, 4]
    assert fake.seen[0].tensors["guidance_interval"].tolist() == [0.25, 0.5]


def generate(address: str, photo: str, tmp_path: Path, *more: str) -> int:
    return generate_main(["--url", address, "--image", photo, "-o", str(tmp_path / "a.gif"), *more])


def test_errors_are_one_line(
    fake: FakeTriton, address: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake.refusals = [("INVALID_ARGUMENT", "in ensemble 'lfdm', unknown label 'angr': did you mean 'Anger'?")]
    assert generate(address, photo, tmp_path, "--label", "angr") == 1
    assert one_line(capsys) == "lfdm-generate: error: unknown label 'angr': did you mean 'Anger'?"
    assert generate(address, photo, tmp_path, "--label", "a", "--tls") == 1
    assert "does not speak TLS; leave TLS out" in one_line(capsys)
    assert generate("http://" + address, photo, tmp_path, "--label", "a") == 1
    assert "expected the server's gRPC port as HOST:PORT" in one_line(capsys)
    assert generate(address, str(tmp_path / "no.png"), tmp_path, "--label", "a") == 1
    assert "no.png does not exist" in one_line(capsys)
    fake.gate.clear()
    assert generate(address, photo, tmp_path, "--label", "a", "--timeout", "0.3") == 1
    assert "did not answer in time" in one_line(capsys)
    assert not (tmp_path / "a.gif").exists()


def test_no_server(photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr(Retry, "pause", lambda self, attempt, draw: 0.01)
    with Port() as port:
        assert generate(port.address, photo, tmp_path, "--label", "a") == 1
    assert f"no server answers at {port.address}; start one with lfdm-serve" in one_line(capsys)


def test_a_token_over_tls(
    fake: FakeTriton,
    photo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "ca.pem"))
    certificate = authority.issue_cert("clips.example.org")
    pair = (certificate.private_key_pem.bytes(), certificate.cert_chain_pems[0].bytes())
    fake.token = "top-secret"
    monkeypatch.setenv("CLIP_TOKEN", "top-secret")
    tls = ["--tls-ca", str(tmp_path / "ca.pem"), "--tls-name", "clips.example.org", "--label", "anger"]
    with Serving(fake, grpc.ssl_server_credentials([pair])) as serving:
        assert generate(serving.address, photo, tmp_path, *tls, "--token-env", "CLIP_TOKEN", "-q") == 0
        assert generate(serving.address, photo, tmp_path, *tls) == 1
        assert "refused access (Jwt is missing)" in one_line(capsys)
        assert generate(serving.address, photo, tmp_path, *tls, "--token-env", "NO_SUCH_TOKEN") == 1
        assert "NO_SUCH_TOKEN is not set or empty" in one_line(capsys)
    assert generate("clips.example.org:8001", photo, tmp_path, "--label", "a", "--token-env", "CLIP_TOKEN") == 1
    assert "in plain text" in one_line(capsys)


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_ctrl_c_gives_the_request_up(fake: FakeTriton, address: str, photo: str, tmp_path: Path, more: list[str]):
    fake.gate.clear()
    arguments = ["--url", address, "--image", photo, "--label", "anger", "-o", str(tmp_path / "a.gif"), *more]
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            # A test run in the background inherits that the signal is ignored.
            "import signal, sys\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            "from lfdm_export.cli import generate_main\n"
            f"sys.exit(generate_main({arguments}))",
        ],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        until(lambda: len(fake.seen) == 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == "lfdm-generate: interrupted\n"
    if not more:
        assert fake.cancelled == [fake.seen[0].request_id]
    until(lambda: fake.cut_off == 1)
