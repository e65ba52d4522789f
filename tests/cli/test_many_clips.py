"""Several clips of one `lfdm-generate`, locally and on a server, and the summary line."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export.bundle.reader import Bundle
from lfdm_export.cli import generate_main
from lfdm_export.cli.generate import batch_size
from lfdm_export.errors import EngineError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures.clip_files import load_clip
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.stages import Geometry
from tests.client.test_client import PHOTO, expected_frames
from tests.fake_bundle import SIZE, fake_manifest, write_fake_bundle
from tests.fake_triton import FakeTriton, Serving

LABELS = ("Anger", "happiness", "turn left")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("many") / "fake")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)
    return str(path)


@pytest.fixture
def fake() -> FakeTriton:
    return FakeTriton()


@pytest.fixture
def address(fake: FakeTriton) -> Iterator[str]:
    with Serving(fake) as serving:
        yield serving.address
        fake.gate.set()


def generate(bundle: Bundle, photo: str, *more: str) -> int:
    return generate_main([str(bundle.path), "--image", photo, *more])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def frames_of(path: Path) -> Any:
    with np.load(path) as archive:
        return archive["frames"]


def summary_of(printed: str) -> dict[str, str]:
    (line,) = [line for line in printed.splitlines() if line.startswith("made  ")]
    return dict(part.split("=") for part in line.removeprefix("made  ").split())


# ------------------------------------------------------------------------------------- on this machine


def test_labels_times_seeds(bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "clip.npz"
    assert generate(bundle, photo, "--label", "anger", "turn left", "--seeds", "3", "5-6", "-o", str(out)) == 0
    expected = [f"clip-{label}-seed{seed}.npz" for label in ("Anger", "turn_left") for seed in (3, 5, 6)]
    assert names(tmp_path) == sorted(expected)
    printed = capsys.readouterr().out
    for name in expected:
        assert f"clip  {tmp_path / name}\n" in printed
    assert summary_of(printed)["clips"] == "6"
    assert summary_of(printed)["seed"] == "3,5,6"
    one = Pipeline(bundle).generate(photo, label="turn left", seed=5)
    assert np.abs(frames_of(tmp_path / "clip-turn_left-seed5.npz").astype(int) - one.frames).max() <= 1


def test_all_labels(bundle: Bundle, photo: str, tmp_path: Path):
    assert (
        generate(bundle, photo, "--labels-all", "--seed", "0", "-o", f"{tmp_path}/new/", "--format", "gif", "-q") == 0
    )
    assert names(tmp_path / "new") == ["Anger-seed0.gif", "happiness-seed0.gif", "turn_left-seed0.gif"]


def test_one_label_is_one_file_of_that_name(bundle: Bundle, photo: str, tmp_path: Path):
    assert generate(bundle, photo, "--label", "anger", "--seeds", "4", "-o", str(tmp_path / "a.npz"), "-q") == 0
    assert (
        generate_main(
            ["--image", photo, "-o", str(tmp_path / "b.npz"), "-q", "--seed", "4", "--label", "anger", str(bundle.path)]
        )
        == 0
    ), "the bundle may come last"
    assert names(tmp_path) == ["a.npz", "b.npz"]
    expected = Pipeline(bundle).generate(photo, label="anger", seed=4).frames
    for name in names(tmp_path):
        np.testing.assert_array_equal(frames_of(tmp_path / name), expected)


def test_seeds_of_a_text(bundle: Bundle, photo: str, tmp_path: Path):
    np.save(tmp_path / "e.npy", np.ones(6))
    out = tmp_path / "clip.npz"
    assert generate(bundle, photo, "--embedding", str(tmp_path / "e.npy"), "--seeds", "1", "2", "-o", str(out)) == 0
    assert names(tmp_path) == ["clip-seed1.npz", "clip-seed2.npz", "e.npy"]
    assert (frames_of(tmp_path / "clip-seed1.npz") != frames_of(tmp_path / "clip-seed2.npz")).any()


def test_folders_of_frames(bundle: Bundle, photo: str, tmp_path: Path):
    assert (
        generate(bundle, photo, "--label", "anger", "happiness", "-o", f"{tmp_path}/clips/", "--seed", "0", "-q") == 0
    )
    assert names(tmp_path / "clips") == ["Anger-seed0", "happiness-seed0"]
    assert names(tmp_path / "clips" / "Anger-seed0")[0] == "frame_000.png"


def test_labels_that_no_file_name_tells_apart_have_files_of_their_own(photo: str, tmp_path: Path):
    manifest = dataclasses.replace(fake_manifest(), labels=("turn: left", "turn left?", "TURN/LEFT"))
    bundle = write_fake_bundle(tmp_path / "bundle", manifest)
    assert generate(bundle, photo, "--labels-all", "--seed", "0", "-o", f"{tmp_path}/clips/", "--format", "npz") == 0
    assert names(tmp_path / "clips") == ["TURN_LEFT-3-seed0.npz", "turn_left-2-seed0.npz", "turn_left-seed0.npz"]


def test_what_fails_leaves_the_others(bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    arguments = ["--label", "anger", "hapiness", "turn left", "--seeds", "1-2", "-o", str(tmp_path / "a.gif")]
    assert generate(bundle, photo, *arguments) == 1
    assert names(tmp_path) == [f"a-{label}-seed{seed}.gif" for label in ("Anger", "turn_left") for seed in (1, 2)]
    printed = capsys.readouterr()
    first, last = printed.err.splitlines()
    assert first.startswith("lfdm-generate: error: unknown label 'hapiness': did you mean 'happiness'?")
    assert first.endswith("(label 'hapiness', seed 1, label 'hapiness', seed 2)")
    assert last == "lfdm-generate: error: 2 of 6 clips failed; the others are kept"
    assert printed.out.count("clip  ") == 4


def test_a_batch_that_fails_is_made_one_by_one(
    bundle: Bundle, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    real = Pipeline.generate

    def fails(self: Pipeline, image: Any, **arguments: Any) -> Any:
        if "happiness" in (arguments["label"], *arguments["label"]):
            raise EngineError("values that are not finite")
        return real(self, image, **arguments)

    monkeypatch.setattr(Pipeline, "generate", fails)
    assert generate(bundle, photo, "--labels-all", "--seed", "0", "-o", str(tmp_path / "a.gif")) == 1
    assert names(tmp_path) == ["a-Anger-seed0.gif", "a-turn_left-seed0.gif"]
    assert "not finite (label 'happiness', seed 0)" in capsys.readouterr().err
    with pytest.raises(EngineError):
        generate(bundle, photo, "--labels-all", "--seed", "0", "-o", str(tmp_path / "a.gif"), "--debug")


def test_a_clip_that_cannot_be_written_leaves_the_others(
    bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "a-happiness-seed0.gif").mkdir()
    (tmp_path / "a-happiness-seed0.gif" / "mine").write_text("kept")
    assert generate(bundle, photo, "--labels-all", "--seed", "0", "-o", str(tmp_path / "a.gif")) == 1
    assert (tmp_path / "a-happiness-seed0.gif" / "mine").is_file()
    assert (tmp_path / "a-turn_left-seed0.gif").is_file()
    assert "1 of 3 clips failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "anger", "Anger "], "the label 'Anger' is given twice"),
        (["--label", "anger", "--seeds", "3", "1-4"], "the seed 3 is given twice"),
        (["--labels-all", "--seeds", "1-999"], "2997 clips, expected at most 1000"),
    ],
)
def test_slips_are_found_before_anything_is_made(
    bundle: Bundle,
    photo: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    assert generate(bundle, photo, *arguments, "-o", str(tmp_path / "a.gif")) == 1
    assert message in capsys.readouterr().err
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "a", "--seeds", "x"], "'x' is neither a seed nor a range such as 1-8"),
        (["--label", "a", "--seeds", "5-3"], "the range 5-3 has -1 seeds"),
        (["--label", "a", "--seeds", "1-99999999999999999999999"], "expected 1 to 1000"),
        (["--label", "a", "--seeds", "1", "--seed", "2"], "not allowed with"),
        (["--label", "a", "--labels-all"], "not allowed with"),
        (["--drive", "c.gif", "--seeds", "1"], "--drive samples nothing"),
    ],
)
def test_wrong_usage(
    bundle: Bundle, photo: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    with pytest.raises(SystemExit):
        generate(bundle, photo, *arguments, "-o", "a.gif")
    assert message in capsys.readouterr().err


def test_a_device_takes_one_clip(bundle: Bundle, photo: str, capsys: pytest.CaptureFixture[str]):
    assert generate(bundle, photo, "--labels-all", "--format", "gif", "-o", "/dev/null") == 1
    assert "/dev/null takes one clip, found 3" in capsys.readouterr().err


def test_memory_bounds_the_batch():
    def geometry(frames: int, latent: int) -> Geometry:
        return Geometry(4 * latent, latent, frames, 8, (16, 32, 64), 16, 768)

    assert [batch_size(geometry(*sizes)) for sizes in ((16, 16), (40, 32), (40, 128), (400, 128))] == [8, 4, 1, 1]


# ----------------------------------------------------------------------------------------- the summary


def test_the_summary_says_how_the_clip_was_made(
    bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    arguments = ["--label", "anger", "-o", str(tmp_path / "a.gif"), "--target", "onnxruntime"]
    assert generate(bundle, photo, *arguments, "--sampler", "unipc", "--steps", "3", "--seed", "9") == 0
    summary = summary_of(capsys.readouterr().out)
    assert re.fullmatch(r"\d+\.\d\d", summary.pop("seconds"))
    expected = {"clips": "1", "sampler": "unipc", "steps": "3", "seed": "9", "target": "onnxruntime"}
    assert summary == expected
    assert generate(bundle, photo, *arguments, "-q") == 0
    assert capsys.readouterr().out == ""


def test_a_seed_that_is_not_given_is_drawn_and_told(
    bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    told = []
    for name in ("a.npz", "b.npz"):
        assert generate(bundle, photo, "--label", "anger", "-o", str(tmp_path / name)) == 0
        told.append(summary_of(capsys.readouterr().out)["seed"])
        assert clip_metadata(tmp_path / name)["seed"] == int(told[-1])
    assert told[0] != told[1]
    again = Pipeline(bundle).generate(photo, label="anger", seed=int(told[0]))
    np.testing.assert_array_equal(frames_of(tmp_path / "a.npz"), again.frames)
    assert generate(bundle, photo, "--labels-all", "-o", f"{tmp_path}/all/", "--format", "gif") == 0
    seed = summary_of(capsys.readouterr().out)["seed"]
    assert names(tmp_path / "all") == [f"{label}-seed{seed}.gif" for label in ("Anger", "happiness", "turn_left")]


def test_the_summary_of_a_motion_transfer_names_no_sampler(
    bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    np.savez(tmp_path / "drive.npz", frames=np.zeros((3, SIZE, SIZE, 3), np.uint8))
    assert generate(bundle, photo, "--drive", str(tmp_path / "drive.npz"), "-o", str(tmp_path / "a.gif")) == 0
    assert set(summary_of(capsys.readouterr().out)) == {"clips", "seconds", "target"}


# ------------------------------------------------------------------------------------------ on a server


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_many_clips_of_a_server(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]):
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    arguments = ["--url", address, "--image", f"{tmp_path}/photo.png", "--label", "anger", "happiness"]
    assert generate_main([*arguments, "--seeds", "1-2", "-o", f"{tmp_path}/clips/", *more]) == 0
    assert names(tmp_path / "clips") == ["Anger-seed1", "Anger-seed2", "happiness-seed1", "happiness-seed2"]
    for seed in (1, 2):
        found = load_clip(tmp_path / "clips" / f"Anger-seed{seed}")
        np.testing.assert_array_equal(found, expected_frames(seed + sum(b"Anger")))
    summary = summary_of(capsys.readouterr().out)
    assert (summary["clips"], summary["server"], summary["seed"]) == ("4", address, "1,2")
    assert int(summary["steps"]) > 0


def test_all_labels_of_a_server(address: str, photo: str, tmp_path: Path):
    assert (
        generate_main(["--url", address, "--image", photo, "--labels-all", "--seed", "0", "-o", f"{tmp_path}/", "-q"])
        == 0
    )
    assert names(tmp_path) == ["Anger-seed0", "happiness-seed0"]


def test_a_request_that_a_server_refuses_leaves_the_others(
    fake: FakeTriton, address: str, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    fake.refusals = [("INVALID_ARGUMENT", "unknown label")]
    arguments = ["--url", address, "--image", photo, "--label", "anger", "--seeds", "1-3", "-o", f"{tmp_path}/"]
    assert generate_main(arguments) == 1
    assert len(names(tmp_path)) == 2
    printed = capsys.readouterr()
    assert "error: unknown label (label 'Anger', seed " in printed.err
    assert printed.err.endswith("error: 1 of 3 clips failed; the others are kept\n")
