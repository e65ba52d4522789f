from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import shutil
import stat
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lfdm_export.bundle.manifest import FORMAT_VERSION, Manifest
from lfdm_export.bundle.reader import Bundle
from lfdm_export.bundle.writer import BundleWriter
from lfdm_export.errors import BundleError, InputError
from lfdm_export.files import folders
from lfdm_export.pictures.preprocess import Preprocessing
from tests.fake_bundle import EMBEDDINGS, GEOMETRY, LABELS, NULL, WIDTH, fake_manifest, write_fake_bundle


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fake_bundle(tmp_path_factory.mktemp("bundles") / "fake").path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(original, tmp_path / "fake"))


def leftovers(parent: Path) -> list[str]:
    return [path.name for path in parent.iterdir() if path.name.startswith(".")]


def edit_manifest(folder: Path, edit: Callable[[Any], None]) -> None:
    path = folder / "manifest.json"
    plain = json.loads(path.read_text(encoding="utf-8"))
    edit(plain)
    path.write_text(json.dumps(plain), encoding="utf-8")


# ------------------------------------------------------------------------------------------ reading


def test_round_trip(original: Path):
    bundle = Bundle.open(original)
    expected = dataclasses.replace(fake_manifest(), files=bundle.manifest.files)
    assert bundle.manifest == expected
    assert Manifest.from_json(bundle.manifest.to_json()) == expected
    np.testing.assert_array_equal(bundle.embeddings, EMBEDDINGS)
    np.testing.assert_array_equal(bundle.null_embedding, NULL)
    assert set(bundle.manifest.files) == {
        *(path.relative_to(original).as_posix() for path in (original / "onnx").iterdir()),
        "embeddings.npz",
    }
    assert bundle.stage_path("encode").is_file()
    with pytest.raises(BundleError, match="no stage 'text'"):
        bundle.stage_path("text")


def test_dataset_preprocessing_survives():
    manifest = dataclasses.replace(fake_manifest(), preprocessing=Preprocessing.for_dataset("natops"))
    assert Manifest.from_json(manifest.to_json()).preprocessing == Preprocessing.for_dataset("natops")


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(BundleError, match="no such folder; make one with lfdm-export"):
        Bundle.open(tmp_path / "nothing")


def test_a_file_is_no_bundle(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="is a file, expected the folder"):
        Bundle.open(tmp_path / "file")


def test_an_empty_folder_is_no_bundle(tmp_path: Path):
    with pytest.raises(BundleError, match=r"not a bundle: it has no manifest\.json"):
        Bundle.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"format": "lfdm-bundle", "format_ver', "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("\xff\xfe", "not valid JSON"),
        ("[]", "not one of a bundle"),
        ('{"name": "web-app"}', "not one of a bundle"),
        ('{"format": "lfdm-bundle", "format_version": 99}', "format version 99, this program reads version 1"),
        ('{"format": "lfdm-bundle"}', "format version None"),
        (f'{{"format": "lfdm-bundle", "format_version": {FORMAT_VERSION}}}', "manifest lacks config, geometry"),
    ],
)
def test_damaged_manifest(folder: Path, text: str, message: str):
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_a_huge_manifest_is_not_read(folder: Path):
    with (folder / "manifest.json").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(BundleError, match="larger than any manifest"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.pop("labels"), "manifest lacks labels"),
        (lambda m: m.update(extra=1), "has the unknown extra"),
        (lambda m: m["config"]["dm"].pop("width"), r"manifest\.config\.dm lacks width"),
        (lambda m: m["config"]["dm"].update(width="8"), r"config\.dm\.width is '8', expected int"),
        (lambda m: m["config"]["dm"].update(learned_null=1), r"learned_null is 1, expected bool"),
        (lambda m: m["config"]["dm"].update(upsample="magic"), "'deconv' or 'upconv'"),
        (lambda m: m["config"]["dm"].update(width=7), "multiple of 8"),
        (lambda m: m["config"]["dm"].update(multipliers=8), "multipliers is 8, expected a list"),
        (lambda m: m["geometry"].update(latent_size=5), "latent_size is 5, the configuration gives 4"),
        (lambda m: m["geometry"].update(image_size=17), "image_size must be a multiple"),
        (lambda m: m["geometry"].update(chunk_frames=99), "chunk_frames is 99, expected at most frames"),
        (lambda m: m["geometry"].update(chunk_frames=0), "size below 1"),
        (lambda m: m["geometry"].update(skip_channels=[4, 8, 17]), "skip_channels"),
        (lambda m: m["geometry"].update(text_width=7), "text_width is 7"),
        (lambda m: m["stages"].pop(1), "stages are encode"),
        (lambda m: m["stages"][0].update(inputs=[]), "inputs of stage 'encode'"),
        (lambda m: m["stages"][0]["inputs"][0].update(dtype="float16"), "dtype is 'float16'"),
        (lambda m: m["stages"][0].update(batch=[4, 2, 1]), "rising sizes"),
        (lambda m: m["stages"][0].update(batch=[1, 2]), "2 entries, expected 3"),
        (lambda m: m.update(precision="int4"), "no tolerance for precision 'int4'"),
        (lambda m: m.update(labels=["a", "A "]), "'a' is there twice"),
        (lambda m: m.update(labels=["a", " "]), "label is empty"),
        (lambda m: m.update(labels=["a", 3]), r"labels\[1\] is 3, expected str"),
        (lambda m: m["files"].pop("onnx/encode.onnx"), r"does not list onnx/encode\.onnx"),
        (lambda m: m["files"].pop("embeddings.npz"), r"does not list embeddings\.npz"),
        (lambda m: m["files"]["embeddings.npz"].update(sha256="0"), "no valid SHA-256"),
        (lambda m: m["files"]["embeddings.npz"].update(bytes=True), "expected int"),
        (lambda m: m["preprocessing"].update(resize_first=[0, 1]), "resize_first must be positive"),
    ],
)
def test_inconsistent_manifest(folder: Path, edit: Callable[[Any], None], message: str):
    edit_manifest(folder, edit)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "name",
    [
        "../secret",
        "onnx/../../secret",
        "/etc/passwd",
        "C:/secret",
        "C:secret",
        "..\\secret",
        "\\\\host\\share",
        "",
        "./a",
        "onnx//a",
        "a\0b",
    ],
)
def test_file_names_outside_the_bundle_are_refused(folder: Path, name: str):
    (folder.parent / "secret").write_bytes(b"")
    entry = {"sha256": "0" * 64, "bytes": 0}
    edit_manifest(folder, lambda m: m["files"].update({name: entry}))
    with pytest.raises(BundleError, match="not a plain path inside the bundle"):
        Bundle.open(folder, check_hashes=False)


@pytest.mark.parametrize("name", ["onnx/encode.onnx", "onnx", "manifest.json", "embeddings.npz"])
def test_links_out_of_the_bundle_are_refused(folder: Path, tmp_path: Path, name: str):
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="leads out of the bundle"):
        Bundle.open(folder)


def test_links_within_and_to_the_bundle_are_allowed(folder: Path, tmp_path: Path):
    (folder / "onnx" / "encode.onnx").rename(folder / "onnx" / "real")
    (folder / "onnx" / "encode.onnx").symlink_to("real")
    (tmp_path / "link").symlink_to(folder)
    assert Bundle.open(tmp_path / "link").labels == LABELS


@pytest.mark.parametrize("name", ["manifest.json", "onnx/encode.onnx", "embeddings.npz"])
def test_a_clone_without_git_lfs_is_said(folder: Path, name: str):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", encoding="utf-8")
    with pytest.raises(
        BundleError, match=f"{name} is a Git LFS pointer; fetch the files themselves with: git lfs pull"
    ):
        Bundle.open(folder)


def test_missing_file(folder: Path):
    (folder / "onnx" / "decode.onnx").unlink()
    with pytest.raises(BundleError, match=r"onnx/decode\.onnx is missing; export again"):
        Bundle.open(folder)


def test_altered_file_is_named_with_both_hashes(folder: Path):
    path = folder / "onnx" / "step.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"onnx/step\.onnx was altered: found SHA-256 \w{64}, expected \w{64};"):
        Bundle.open(folder)
    assert Bundle.open(folder, check_hashes=False).labels == LABELS


@pytest.mark.parametrize("check_hashes", [True, False])
def test_truncated_file(folder: Path, check_hashes: bool):
    path = folder / "onnx" / "step.onnx"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(BundleError, match=r"onnx/step\.onnx was altered: found \d+ bytes, expected \d+"):
        Bundle.open(folder, check_hashes=check_hashes)


def replace_embeddings(folder: Path, data: bytes) -> None:
    """Write other bytes and a manifest with their hash: the file itself must be checked."""
    import hashlib

    (folder / "embeddings.npz").write_bytes(data)
    entry = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    edit_manifest(folder, lambda m: m["files"].update({"embeddings.npz": entry}))


def npz(**arrays: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


class Planted:
    """Unpickling it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickles_are_not_run(folder: Path, tmp_path: Path):
    planted = np.array([Planted(tmp_path / "planted")], dtype=object)
    replace_embeddings(folder, npz(embeddings=planted, null=NULL))
    with pytest.raises(BundleError, match="not a table of label embeddings"):
        Bundle.open(folder)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not a table of label embeddings"),
        (b"PK\x03\x04 garbage", "not a table of label embeddings"),
        (npy(EMBEDDINGS), "not a table of label embeddings"),
        (npz(embeddings=EMBEDDINGS), "not a table of label embeddings"),
        (npz(embeddings=EMBEDDINGS[:2], null=NULL), r"embeddings is float32 \(2, 6\), expected float32 \(3, 6\)"),
        (npz(embeddings=EMBEDDINGS, null=NULL[:3]), r"null is float32 \(3,\)"),
        (npz(embeddings=EMBEDDINGS.astype(np.float16), null=NULL), "embeddings is float16"),
        (npz(embeddings=EMBEDDINGS * np.float32(np.nan), null=NULL), "not finite"),
    ],
)
def test_damaged_embeddings(folder: Path, data: bytes, message: str):
    replace_embeddings(folder, data)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_embeddings_that_unpack_to_gigabytes_are_refused(folder: Path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("embeddings.npy", npy(np.zeros((3000, WIDTH), np.float32)))
        archive.writestr("null.npy", npy(NULL))
    replace_embeddings(folder, buffer.getvalue())
    with pytest.raises(BundleError, match="larger than a table of label embeddings needs"):
        Bundle.open(folder)


# ------------------------------------------------------------------------------------------- labels


def test_embedding_by_label(original: Path):
    bundle = Bundle.open(original)
    for index, label in enumerate(LABELS):
        for spelling in (label, label.upper(), f" {label.lower()} "):
            np.testing.assert_array_equal(bundle.embedding(spelling), EMBEDDINGS[index])


def test_unknown_label_names_the_nearest(original: Path):
    bundle = Bundle.open(original)
    with pytest.raises(InputError, match=r"'hapiness': did you mean 'happiness'\? known are Anger, happiness"):
        bundle.embedding("hapiness")
    with pytest.raises(InputError, match="unknown label 'xyz': known are Anger, happiness, turn left"):
        bundle.embedding("xyz")


def test_a_bundle_without_labels(tmp_path: Path):
    manifest = dataclasses.replace(fake_manifest(), labels=())
    with BundleWriter(tmp_path / "bare") as writer:
        for spec in manifest.stages:
            (writer.folder / "onnx" / f"{spec.name}.onnx").touch()
        writer.write_embeddings(EMBEDDINGS[:0], NULL)
        bundle = writer.finish(manifest)
    with pytest.raises(InputError, match="exported without labels; export it"):
        bundle.embedding("anger")


# ------------------------------------------------------------------------------------------ writing


def test_the_target_does_not_exist_until_the_bundle_is_complete(tmp_path: Path):
    target = tmp_path / "deep" / "target"
    with BundleWriter(target) as writer:
        assert writer.folder.parent == target.parent, "another file system would make the rename a copy"
        assert not target.exists()
        with pytest.raises(BundleError):
            Bundle.open(writer.folder)
    assert not target.exists()
    assert list(target.parent.iterdir()) == [], "left without finish"


def write_half(target: Path, error: BaseException) -> None:
    with BundleWriter(target) as writer:
        (writer.folder / "onnx" / "encode.onnx").write_bytes(b"half")
        raise error


@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left")])
def test_an_interrupted_export_leaves_no_trace(tmp_path: Path, error: BaseException):
    with pytest.raises(type(error)):
        write_half(tmp_path / "target", error)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_keeps_the_old_bundle(folder: Path):
    with pytest.raises(KeyboardInterrupt), BundleWriter(folder):
        raise KeyboardInterrupt
    assert Bundle.open(folder).labels == LABELS
    assert leftovers(folder.parent) == []


def test_a_full_disk_while_finishing(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(BundleError, match=r"cannot write the bundle .*No space left on device"):
        write_fake_bundle(folder)
    monkeypatch.undo()
    assert Bundle.open(folder).labels == LABELS
    assert leftovers(folder.parent) == []


def test_an_incomplete_bundle_is_not_published(tmp_path: Path):
    with BundleWriter(tmp_path / "x") as writer:
        writer.write_embeddings(EMBEDDINGS, NULL)
        with pytest.raises(BundleError, match=r"does not list onnx/encode\.onnx"):
            writer.finish(fake_manifest())
    assert list(tmp_path.iterdir()) == []


def test_an_older_bundle_is_replaced_completely(folder: Path):
    (folder / "parity").mkdir()
    (folder / "parity" / "report.html").touch()
    newer = dataclasses.replace(fake_manifest(), provenance={"made": "later"})
    bundle = write_fake_bundle(folder, newer)
    assert bundle.manifest.provenance == {"made": "later"}
    assert not (folder / "parity").exists(), "the report was the older bundle's"
    assert leftovers(folder.parent) == []


def test_a_link_to_a_bundle_stays_a_link(folder: Path, tmp_path: Path):
    (tmp_path / "link").symlink_to(folder)
    bundle = write_fake_bundle(tmp_path / "link", dataclasses.replace(fake_manifest(), provenance={"made": "later"}))
    assert (tmp_path / "link").is_symlink()
    assert Bundle.open(folder).manifest.provenance == bundle.manifest.provenance == {"made": "later"}


def test_the_old_bundle_is_restored_if_the_new_one_cannot_be_moved(folder: Path, monkeypatch: pytest.MonkeyPatch):
    real = folders._rename

    def denied(source: Path, target: Path) -> None:
        if source.suffix == ".part" and target == folder:
            assert not target.exists(), "the old one has been moved aside"
            raise OSError(errno.EACCES, "Permission denied")
        real(source, target)

    monkeypatch.setattr(folders, "_exchange", lambda *_: False)
    monkeypatch.setattr(folders, "_rename", denied)
    with pytest.raises(BundleError, match="Permission denied"):
        write_fake_bundle(folder, dataclasses.replace(fake_manifest(), provenance={"made": "later"}))
    assert Bundle.open(folder).manifest.provenance == {"trained": False}
    assert leftovers(folder.parent) == []


def test_an_empty_folder_is_a_target(tmp_path: Path):
    (tmp_path / "target").mkdir()
    assert write_fake_bundle(tmp_path / "target").labels == LABELS


def test_a_folder_of_other_files_is_refused_unchanged(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(BundleError, match=r"exists and is not a bundle .*choose another place"), BundleWriter(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_bundle_with_other_files_is_refused_unchanged(folder: Path):
    (folder / "clips").mkdir()
    (folder / "clips" / "best.gif").touch()
    with pytest.raises(BundleError, match=r"not part of the bundle, such as clips/best\.gif"), BundleWriter(folder):
        pass
    assert (folder / "clips" / "best.gif").exists()


def test_other_files_that_appear_during_the_export_are_not_deleted(tmp_path: Path):
    target = tmp_path / "target"
    with BundleWriter(target) as writer:
        for spec in fake_manifest().stages:
            (writer.folder / "onnx" / f"{spec.name}.onnx").touch()
        writer.write_embeddings(EMBEDDINGS, NULL)
        target.mkdir()
        (target / "thesis.tex").touch()
        with pytest.raises(BundleError, match="not a bundle"):
            writer.finish(fake_manifest())
    assert [path.name for path in target.iterdir()] == ["thesis.tex"]
    assert leftovers(tmp_path) == []


def test_a_file_at_the_target_is_refused(tmp_path: Path):
    (tmp_path / "target").write_text("mine", encoding="utf-8")
    with pytest.raises(BundleError, match="is a file; choose another place"), BundleWriter(tmp_path / "target"):
        pass
    assert (tmp_path / "target").read_text(encoding="utf-8") == "mine"


def test_a_parent_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(BundleError, match="cannot write to"), BundleWriter(tmp_path / "file" / "target"):
        pass


def test_exporters_to_one_target_do_not_mix(tmp_path: Path):
    target = tmp_path / "target"

    def export(number: int) -> None:
        for _ in range(5):
            write_fake_bundle(target, dataclasses.replace(fake_manifest(), provenance={"exporter": number}))

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(export, number) for number in range(4)]:
            done.result()
    assert Bundle.open(target).manifest.provenance["exporter"] in range(4)
    assert leftovers(tmp_path) == []


def test_the_folder_has_ordinary_permissions(tmp_path: Path):
    (tmp_path / "ordinary").mkdir()
    bundle = write_fake_bundle(tmp_path / "target")
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ordinary", bundle.path)}
    assert len(modes) == 1, "servers may run as other users"


@pytest.mark.parametrize(
    ("embeddings", "null", "message"),
    [
        (EMBEDDINGS, NULL[:2], "have shapes"),
        (EMBEDDINGS[0], NULL, "have shapes"),
        (EMBEDDINGS, NULL * np.float32(np.inf), "not finite"),
    ],
)
def test_wrong_embeddings_are_not_written(tmp_path: Path, embeddings: Any, null: Any, message: str):
    with pytest.raises(InputError, match=message), BundleWriter(tmp_path / "target") as writer:
        writer.write_embeddings(embeddings, null)


def test_provenance_that_json_cannot_hold(tmp_path: Path):
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        write_fake_bundle(tmp_path / "x", dataclasses.replace(fake_manifest(), provenance={"weights": tmp_path}))
    with pytest.raises(BundleError, match="cannot be written as JSON"):
        write_fake_bundle(tmp_path / "x", dataclasses.replace(fake_manifest(), provenance={"loss": float("nan")}))
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_manifest_cannot_be_made():
    with pytest.raises(ValueError, match="frames"):
        dataclasses.replace(fake_manifest(), geometry=dataclasses.replace(GEOMETRY, frames=1))
