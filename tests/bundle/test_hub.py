"""Bundles by their names on the hub, with a fake hub on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export import Bundle, Pipeline
from lfdm_export.bundle.hub import HubName
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.errors import BundleError, InputError, MissingDependencyError
from tests.fake_bundle import EMBEDDINGS, NULL, SIZE, fake_manifest, write_fake_bundle, write_graphs
from tests.fake_hub import FakeHub, Repository
from tests.fake_triton import Port

huggingface_hub = pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")
NAME = "people/mug"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("hub") / "fake")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub, an empty cache, and no login."""
    monkeypatch.chdir(tmp_path)
    with FakeHub() as fake:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", fake.address)
        template = f"{fake.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield fake


def files_of(bundle: Bundle) -> dict[str, bytes]:
    return {name: (bundle.path / name).read_bytes() for name in ("manifest.json", *bundle.manifest.files)}


def photo() -> Any:
    return np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


# ---------------------------------------------------------------------------------------------- fetching


def test_a_bundle_by_name_is_the_bundle(hub: FakeHub, bundle: Bundle):
    extra = {"README.md": b"card", "huge.bin": b"x", "onnx/other.onnx": b"x"}
    hub.repositories[NAME] = Repository()
    oid = hub.repositories[NAME].commit({**files_of(bundle), **extra})
    pipe = Pipeline.from_pretrained(NAME, threads=1, target="onnxruntime")
    assert pipe.bundle.manifest.bundle_id == bundle.manifest.bundle_id
    assert pipe.bundle.path.name == oid
    expected = Pipeline.open(bundle, threads=1, target="onnxruntime").generate(photo(), label="Anger", steps=2, seed=0)
    np.testing.assert_array_equal(pipe.generate(photo(), label="Anger", steps=2, seed=0).frames, expected.frames)
    assert pipe.generate(photo(), label="Anger", steps=2, seed=0).metadata(0)["bundle"] == NAME
    assert sorted(hub.fetched()) == sorted(files_of(bundle)), "only the files that the manifest lists"
    before = len(hub.fetched())
    assert Bundle.open(NAME).manifest.bundle_id == bundle.manifest.bundle_id
    assert len(hub.fetched()) == before, "nothing twice"


def test_revisions(hub: FakeHub, bundle: Bundle, tmp_path: Path):
    with BundleWriter(tmp_path / "second") as writer:
        write_graphs(writer.folder, fake_manifest())
        writer.write_embeddings(EMBEDDINGS + 1, NULL)
        second = writer.finish(fake_manifest())
    repository = hub.repositories[NAME] = Repository()
    first_oid = repository.commit(files_of(bundle))
    repository.refs["v1.0"] = first_oid
    repository.commit(files_of(second))
    ids = {
        revision: Bundle.from_pretrained(NAME, revision=revision).manifest.bundle_id
        for revision in (None, "main", "v1.0", first_oid)
    }
    new, old = second.manifest.bundle_id, bundle.manifest.bundle_id
    assert ids == {None: new, "main": new, "v1.0": old, first_oid: old}
    assert Bundle.open(f"{NAME}@v1.0").manifest.bundle_id == old
    with pytest.raises(BundleError, match=r"people/mug@v9 cannot be fetched: the repository has no such revision"):
        Bundle.from_pretrained(NAME, revision="v9")


def test_without_a_connection_the_copy_is_used(
    hub: FakeHub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(files_of(bundle))
    Bundle.from_pretrained(NAME)
    with Port() as nobody:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://{nobody.address}")
        assert Bundle.from_pretrained(NAME).manifest.bundle_id == bundle.manifest.bundle_id
        assert "no answer from the Hugging Face hub about people/mug" in caplog.text
        with pytest.raises(BundleError, match="neither a folder nor in the hub's cache"):
            Bundle.from_pretrained("people/other")


def test_offline_no_request_is_sent(hub: FakeHub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    hub.repositories[NAME] = Repository()
    oid = hub.repositories[NAME].commit(files_of(bundle))
    Bundle.from_pretrained(NAME)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    for revision in (None, "main", oid):
        assert Bundle.from_pretrained(NAME, revision=revision).manifest.bundle_id == bundle.manifest.bundle_id
    with pytest.raises(BundleError, match="HF_HUB_OFFLINE is set"):
        Bundle.from_pretrained("people/other")
    assert len(hub.requests) == asked


def test_a_hub_that_does_not_answer(hub: FakeHub, monkeypatch: pytest.MonkeyPatch):
    import socket

    monkeypatch.setattr("lfdm_export.bundle.hub._PATIENCE", 0.05)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(BundleError, match="neither a folder nor in the hub's cache"):
            Bundle.from_pretrained(NAME)


@pytest.mark.parametrize("name", ["onnx/decode.onnx", "embeddings.npz", "manifest.json"])
def test_an_altered_file_is_refused(hub: FakeHub, bundle: Bundle, name: str):
    files = files_of(bundle)
    files[name] = files[name][:-7] + b"altered"
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(files)
    with pytest.raises(BundleError) as caught:
        Pipeline.from_pretrained(NAME)
    assert name in str(caught.value)
    assert "was altered" in str(caught.value) or name == "manifest.json"


def test_a_copy_that_is_damaged_is_refused(hub: FakeHub, bundle: Bundle):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(files_of(bundle))
    folder = Bundle.from_pretrained(NAME).path
    target = (folder / "embeddings.npz").resolve()
    target.write_bytes(target.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"embeddings.npz was altered.*only this machine's copy is damaged, remove "):
        Bundle.from_pretrained(NAME)


def test_missing_and_foreign_repositories(hub: FakeHub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(BundleError, match="no such folder here, and no such repository on the Hugging Face hub"):
        Bundle.open("people/nothing")
    hub.repositories["people/model"] = Repository()
    hub.repositories["people/model"].commit({"config.json": b"{}"})
    with pytest.raises(BundleError, match=r"people/model is not a bundle: the repository has no manifest.json"):
        Bundle.open("people/model")
    hub.repositories["people/secret"] = Repository(private=True)
    hub.repositories["people/secret"].commit(files_of(bundle))
    with pytest.raises(BundleError, match="or a private one; check the name, or log in"):
        Bundle.open("people/secret")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert Bundle.open("people/secret").labels == bundle.labels


@pytest.mark.parametrize("name", ["mug", "a/b/c", "../x/y", "people/", "/abs/x", "people/..", "", "a b/c"])
def test_invalid_names(name: str):
    with pytest.raises(InputError, match="is not a name on the Hugging Face hub, expected org/name"):
        Bundle.from_pretrained(name)
    with pytest.raises(InputError, match="the revision is 'a b'"):
        Pipeline.from_pretrained(NAME, revision="a b")


def test_a_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert HubName.find("people/mug@v1") == HubName("people/mug", "v1")
    assert HubName.find(Path("people/mug")) is None
    assert HubName.find("./people/mug") is None
    (tmp_path / "people").mkdir()
    assert HubName.find("people/mug") is None, "a misspelled folder name sends no request"
    with pytest.raises(BundleError, match="there is no bundle at people/mug: no such folder"):
        Bundle.open("people/mug")


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"there is no folder 'people/mug', .*lfdm-export\[hub\]"):
        Bundle.open("people/mug")


def test_the_commands_take_names(hub: FakeHub, bundle: Bundle, tmp_path: Path):
    hub.repositories[NAME] = Repository()
    hub.repositories[NAME].commit(files_of(bundle))
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "other")}
    code = "import sys; from lfdm_export.cli import generate_main; sys.exit(generate_main())"
    words = [NAME, "--image", "photo.png", "--label", "anger", "-o", "a.gif", "--target", "onnxruntime", "-q"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert (tmp_path / "a.gif").is_file()


# -------------------------------------------------------------------------------------------- publishing


def test_what_is_published_can_be_fetched(hub: FakeHub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    clip = Pipeline.open(bundle, threads=1, target="onnxruntime").generate(photo(), label="happiness", steps=2)
    address = bundle.push_to_hub(NAME, clip=clip, private=True)
    repository = hub.repositories[NAME]
    assert repository.private
    oid = repository.refs["main"]
    assert address == f"{hub.address}/{NAME}/commit/{oid}"
    there = repository.commits[oid]
    assert there.keys() == {*files_of(bundle), "README.md", "clip.gif", ".gitattributes"}
    assert there["clip.gif"].startswith(b"GIF89a")
    assert Bundle.from_pretrained(NAME).manifest.bundle_id == bundle.manifest.bundle_id


def test_the_card_says_what_is_known(hub: FakeHub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    yaml = pytest.importorskip("yaml")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    (bundle.path / "parity").mkdir()
    report = '{"verdict": "all 55 checks passed", "engine": "ONNX|Runtime", "date": "2026-11-27T06:48:11"}'
    (bundle.path / "parity" / "report.json").write_text(report)
    bundle.push_to_hub(NAME)
    card = hub.repositories[NAME].commits[hub.repositories[NAME].refs["main"]]["README.md"].decode()
    _, head, text = card.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "image-to-video"
    for words in (
        "# mug\n", "Anger, happiness, turn left", "| precision | fp32 |", "5 frames of 16×16 pixels",
        f"`{bundle.manifest.bundle_id}`", 'Pipeline.from_pretrained("people/mug")', "| weights | untrained |",
        "all 55 checks passed (ONNX\\|Runtime, 2026-11-27)", "ddim, 4 steps, guidance 1",
    ):  # fmt: skip
        assert words in text
    assert "clip.gif)" not in text
    assert "parity/report.json" not in hub.repositories[NAME].commits[hub.repositories[NAME].refs["main"]]


def test_files_of_an_earlier_bundle_are_deleted(hub: FakeHub, bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    repository = hub.repositories[NAME] = Repository()
    mine = {"LICENSE": b"mine", "notes/onnx.md": b"mine"}
    repository.commit({**mine, "onnx/old.onnx": b"", "tokenizer/vocab": b"", "reference.npz": b"", "clip.gif": b""})
    bundle.push_to_hub(NAME, revision="next", message="anew")
    there = repository.commits[repository.refs["next"]]
    assert there.keys() == {*files_of(bundle), *mine, "README.md"}
    assert "LICENSE" in repository.commits[repository.refs["main"]]
    assert "onnx/old.onnx" in repository.commits[repository.refs["main"]], "the other branch is unchanged"


def test_a_damaged_bundle_is_not_published(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", hub.token)
    bundle = write_fake_bundle(tmp_path / "fake")
    (bundle.path / "embeddings.npz").write_bytes(b"other")
    with pytest.raises(BundleError, match=r"embeddings.npz was altered"):
        bundle.push_to_hub(NAME)
    assert hub.requests == []


def test_missing_permission_is_reported(hub: FakeHub, bundle: Bundle):
    with pytest.raises(BundleError, match="people/mug cannot be published: "):
        bundle.push_to_hub(NAME)
    assert hub.repositories == {}
