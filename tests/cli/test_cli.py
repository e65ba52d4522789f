from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lfdm_export import __version__
from lfdm_export.bundle.reader import Bundle
from lfdm_export.bundle.ready import MODEL
from lfdm_export.cli import export_main, generate_main, info_main, serve_main, train_main, verify_main
from lfdm_export.cli.console import Bars, OneBar, input_file, output_file
from lfdm_export.cli.export import read_labels
from lfdm_export.errors import InputError, ParityError
from lfdm_export.generate.pipeline import Pipeline
from lfdm_export.pictures import faces
from lfdm_export.pictures.clip_files import load_clip, save_clip
from lfdm_export.pictures.clips import read_footage
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.pictures.paste import paste_back, read_surroundings
from lfdm_export.sampling.tuned import TunedSampler
from lfdm_models import text_files
from lfdm_models.labels import DATASETS
from tests.closeness import assert_same_floats
from tests.fake_bundle import EMBEDDINGS, FRAMES, SIZE, write_fake_bundle

COMMANDS = {
    "lfdm-export": export_main,
    "lfdm-generate": generate_main,
    "lfdm-info": info_main,
    "lfdm-serve": serve_main,
    "lfdm-train": train_main,
    "lfdm-verify": verify_main,
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("cli") / "fake")


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), np.uint8)).save(path)
    return str(path)


def bundle_id(folder: Path) -> str:
    """Compute the ID like `sha256sum` over the files of the manifest."""
    names = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    lines = (f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    assert "Traceback" not in text
    return text.rstrip("\n")


# ------------------------------------------------------------------------------------ every command


@pytest.mark.parametrize("program", COMMANDS)
def test_help_has_examples_and_needs_nothing_heavy(program: str):
    code = (
        "import sys\nfrom lfdm_export import cli\n"
        f"try:\n    cli.{COMMANDS[program].__name__}(['--help'])\n"
        "except SystemExit as done:\n    assert done.code == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'transformers', 'av', 'safetensors'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"usage: {program}" in done.stdout
    assert "examples:" in done.stdout


def test_a_terminal_without_check_marks_gets_its_result():
    code = (
        "import argparse\nfrom lfdm_export.cli import console\n"
        "args = argparse.Namespace(quiet=False, debug=False)\n"
        "raise SystemExit(console.run('lfdm-verify', args, lambda: console.say(args, '\\u2713 passed') or 0))\n"
    )
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "? passed\n", "")


@pytest.mark.parametrize("program", COMMANDS)
def test_version(program: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as done:
        COMMANDS[program](["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"{program} {__version__}\n"


@pytest.mark.parametrize(
    ("program", "arguments", "message"),
    [
        ("lfdm-export", ["--lfae", "a.pth"], "--lfae and --dm belong together"),
        ("lfdm-export", ["--lfae", "a", "--dm", "b", "--model", "c"], "either --model, or"),
        ("lfdm-export", ["--model", "c", "--residual-flow"], "a model folder knows its own"),
        ("lfdm-export", ["--region-pad", "3"], "a model folder knows its own"),
        ("lfdm-export", ["--dataset", "imagenet"], "invalid choice"),
        ("lfdm-export", ["--frames", "many"], "invalid int value"),
        ("lfdm-export", ["--datset", "mug"], "unknown option --datset (did you mean --dataset?); see"),
        ("lfdm-export", ["--datset=mug"], "unknown option --datset (did you mean --dataset?); see"),
        (
            "lfdm-export",
            ["--dataset", "MUG"],
            "invalid choice 'MUG' (did you mean mug?), expected one of mug, mhad, natops",
        ),
        ("lfdm-export", ["some", "words"], "unrecognized arguments: some words"),
        ("lfdm-export", ["--out"], "expected one argument"),
        ("lfdm-generate", ["b", "--image", "i", "-o", "o.gif", "--lable", "nod"], "did you mean --label?"),
        ("lfdm-generate", ["b", "--xyzzy"], "unknown option --xyzzy; see lfdm-generate --help"),
        ("lfdm-serve", ["--polcy", "step"], "did you mean --policy?"),
        ("lfdm-serve", [], "give a bundle to serve"),
        ("lfdm-info", ["b", "--jsn"], "did you mean --json?"),
        ("lfdm-train lfae", ["--out", "o", "--step", "3"], "did you mean --steps?"),
        ("lfdm-train lfae", ["--out", "o"], "required: --steps"),
        ("lfdm-train", ["lfea"], "invalid choice 'lfea' (did you mean lfae?)"),
        ("lfdm-train evaluate", ["b", "--sampler", "ddim"], "did you mean --samplers?"),
        ("lfdm-generate", [], "required: --image, -o/--out"),
        (
            "lfdm-generate",
            ["b", "--image", "i", "-o", "o.gif"],
            "one of the arguments --label --text --embedding --drive",
        ),
        ("lfdm-generate", ["b", "--image", "i", "-o", "o.gif", "--label", "a", "--text", "b"], "not allowed with"),
        (
            "lfdm-generate",
            ["b", "--image", "i", "-o", "o.gif", "--drive", "c", "--steps", "3"],
            "--drive samples nothing",
        ),
        ("lfdm-generate", ["b", "--image", "i", "-o", "o.gif", "--label", "a", "--sampler", "euler"], "invalid choice"),
        ("lfdm-verify", [], "required: BUNDLE"),
        ("lfdm-verify", ["b", "--dm", "x"], "--lfae and --dm belong together"),
    ],
)
def test_wrong_usage(program: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    name, *stage = program.split()
    with pytest.raises(SystemExit) as done:
        COMMANDS[name]([*stage, *arguments])
    assert done.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line = one_line(printed.err)
    assert message in line
    assert line.startswith(f"{program}: error: ")
    assert line.endswith(f"; see {program} --help")


# ---------------------------------------------------------------------------------------- generate


def generate(bundle: Bundle, photo: str, *more: str) -> int:
    return generate_main([str(bundle.path), "--image", photo, *more])


def test_generate_writes_the_clip_and_says_where(
    bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "clip.npz"
    assert generate(bundle, photo, "--label", "happiness", "--out", str(out), "--seed", "3") == 0
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0] == f"clip  {out}"
    assert "untrained" in printed.out
    assert printed.err == "", "no progress bars where nobody sees them"
    expected = Pipeline.open(bundle).generate(photo, label="happiness", seed=3)
    with np.load(out) as archive:
        assert_same_floats(archive["latent"], expected.latent)
        assert np.abs(archive["frames"].astype(int) - expected.frames).max() <= 1


def test_quiet_prints_nothing(bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert generate(bundle, photo, "--label", "Anger", "-o", str(tmp_path / "a.gif"), "-q") == 0
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "")
    assert (tmp_path / "a.gif").is_file()


def test_options_reach_the_pipeline(bundle: Bundle, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}
    real = Pipeline.generate

    def recording(self: Pipeline, image: Any, **arguments: Any) -> Any:
        seen.update(arguments, image=image)
        return real(self, image, **arguments)

    monkeypatch.setattr(Pipeline, "generate", recording)
    options = [
        "--seed",
        "5",
        "--steps",
        "3",
        "--sampler",
        "ddim",
        "--eta",
        "0.5",
        "--guidance",
        "2",
        "--guidance-interval",
        "0.2",
        "0.8",
        "--threads",
        "1",
        "--fps",
        "5",
        "--panels",
        "--format",
        "gif",
    ]
    assert generate(bundle, photo, "--label", "anger", "-o", str(tmp_path / "clip"), *options) == 0
    seen.pop("progress")
    assert seen == {
        "image": photo,
        "crop": None,
        "label": "anger",
        "text": None,
        "text_embedding": None,
        "sampler": "ddim",
        "steps": 3,
        "eta": 0.5,
        "guidance_scale": 2.0,
        "guidance_interval": (0.2, 0.8),
        "seed": 5,
        "frames": None,
    }
    with Image.open(tmp_path / "clip") as image:
        assert (image.format, image.width, image.info["duration"]) == ("GIF", 5 * SIZE, 200)


def test_generate_finds_the_face_once_and_puts_the_clips_back(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """OpenCV is not needed for this test: two faces are found where there are none."""
    found: list[str] = []

    def detect(pixels: np.ndarray) -> list[tuple[int, int, int, int]]:
        found.append("asked")
        return [(0, 0, 10, 10), (20, 14, 40, 34)]

    monkeypatch.setattr(faces, "_detect", detect)
    drawn = np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)
    Image.fromarray(drawn).save(tmp_path / "party.png")
    photo = str(tmp_path / "party.png")
    more = ["--crop", "face", "--paste-back", "--label", "anger", "happiness", "--seed", "3", "--steps", "2"]
    assert generate(bundle, photo, *more, "-o", f"{tmp_path}/out/") == 0
    assert "face  2 faces, the largest is used: --crop 12,5,36,36\n" in capsys.readouterr().out
    assert found == ["asked"]
    pipeline = Pipeline.open(bundle)
    for label in ("Anger", "happiness"):
        clip = pipeline.generate(photo, crop=(12, 5, 36, 36), label=label, seed=3, steps=2)
        shown = load_clip(tmp_path / "out" / f"{label}-seed3")
        np.testing.assert_array_equal(shown, paste_back(clip.frames[0], read_surroundings(drawn, (12, 5, 36, 36))))
        np.testing.assert_array_equal(shown[:, :, 48:], np.repeat(drawn[None, :, 48:], FRAMES, axis=0))
    monkeypatch.setattr(faces, "_detect", lambda pixels: [])
    assert generate(bundle, photo, *more, "-o", f"{tmp_path}/none/") == 1
    assert "no face was found" in capsys.readouterr().err


def test_generate_crops_scales_and_says_how(bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wide = np.full((20, 50, 3), 255, np.uint8)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    photo, out = str(tmp_path / "wide.png"), str(tmp_path / "a.npz")
    assert generate(bundle, photo, "--label", "anger", "-o", out) == 0
    assert "has 50x20 pixels: black bars make it square; --crop center avoids them" in capsys.readouterr().out
    for crop in ("center", "30,0,20,20"):
        assert generate(bundle, photo, "--label", "anger", "-o", out, "--crop", crop, "--seed", "0") == 0
        assert "bars" not in capsys.readouterr().out
    cropped = Pipeline.open(bundle).generate(np.full((SIZE, SIZE, 3), 255, np.uint8), label="anger", seed=0)
    with np.load(out) as archive:
        np.testing.assert_array_equal(archive["frames"], cropped.frames)
    assert generate(bundle, photo, "--label", "anger", "-o", f"{tmp_path}/f/", "--scale", "2", "--seed", "4") == 0
    assert load_clip(tmp_path / "f").shape[1:3] == (2 * SIZE, 2 * SIZE)
    found = clip_metadata(tmp_path / "f")
    assert (found["seed"], found["label"], found["bundle"]) == (4, "Anger", bundle.path.name)
    assert found["bundle_id"] == bundle_id(bundle.path)
    with pytest.raises(SystemExit):
        generate(bundle, photo, "--label", "anger", "-o", out, "--paste-back")
    assert "--paste-back needs --crop" in capsys.readouterr().err
    assert generate(bundle, photo, "--label", "anger", "-o", out, "--paste-back", "--crop", "center") == 1
    assert "own frames, not pasted back" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        generate(bundle, photo, "--label", "anger", "-o", out, "--crop", "middle")
    assert "expected center, face, or X,Y,W,H" in capsys.readouterr().err


def test_a_driven_clip_plays_as_the_driving_clip_does(bundle: Bundle, photo: str, tmp_path: Path):
    driving = np.random.default_rng(1).integers(0, 256, (12, SIZE, SIZE, 3), np.uint8)
    drive = str(save_clip(tmp_path / "drive.webp", driving, fps=24))
    for more, count in (([], 12), (["--fps", "8"], 4)):
        assert generate(bundle, photo, "--drive", drive, "-o", str(tmp_path / "a.gif"), *more) == 0
        made = read_footage(tmp_path / "a.gif")
        assert len(made.frames) == count
        assert made.fps is not None
        assert len(made.frames) / made.fps == pytest.approx(0.5, abs=0.02)


def test_generate_from_an_embedding(bundle: Bundle, photo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    np.save(tmp_path / "e.npy", EMBEDDINGS[1])
    arguments = ["--embedding", str(tmp_path / "e.npy"), "-o", str(tmp_path / "a.npz"), "-q", "--seed", "0"]
    assert generate(bundle, photo, *arguments) == 0
    expected = Pipeline.open(bundle).generate(photo, label="happiness", seed=0)
    with np.load(tmp_path / "a.npz") as archive:
        assert_same_floats(archive["latent"], expected.latent)
    np.save(tmp_path / "e.npy", np.array([object()]), allow_pickle=True)
    assert generate(bundle, photo, *arguments) == 1
    assert "e.npy cannot be read: it is not an .npy array" in one_line(capsys.readouterr().err)


def test_generate_by_motion_transfer(bundle: Bundle, photo: str, tmp_path: Path):
    driving = np.random.default_rng(1).integers(0, 256, (FRAMES + 2, SIZE, SIZE, 3), np.uint8)
    np.savez(tmp_path / "drive.npz", frames=driving)
    assert generate(bundle, photo, "--drive", str(tmp_path / "drive.npz"), "-o", str(tmp_path / "a.npz")) == 0
    expected = Pipeline.open(bundle).transfer_motion(photo, driving)
    with np.load(tmp_path / "a.npz") as archive:
        assert np.abs(archive["frames"].astype(int) - expected.frames).max() <= 1


@pytest.mark.parametrize("more", [["--seeds", "1-9"], ["--crop", "center", "--paste-back", "--seed", "1"]])
def test_a_photograph_from_a_pipe_serves_all_clips(bundle: Bundle, photo: str, tmp_path: Path, more: list[str]):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = ["--label", "Anger", "--steps", "1", *more]
    threading.Thread(target=lambda: pipe.write_bytes(Path(photo).read_bytes())).start()
    assert generate(bundle, str(pipe), *arguments, "-o", f"{tmp_path}/piped.gif") == 0
    assert generate(bundle, photo, *arguments, "-o", f"{tmp_path}/filed.gif") == 0
    for path in tmp_path.glob("piped*.gif"):
        with Image.open(path) as piped, Image.open(path.with_name(path.name.replace("piped", "filed"))) as filed:
            np.testing.assert_array_equal(np.asarray(piped), np.asarray(filed))


def test_a_wrong_number_of_threads_is_no_difference_to_the_model(bundle: Bundle, capsys: pytest.CaptureFixture[str]):
    assert verify_main([str(bundle.path), "--threads", "0"]) == 1
    assert "threads is 0, expected 1 or more" in one_line(capsys.readouterr().err)


def test_a_dash_is_stdin_and_stdout():
    assert (input_file("-"), output_file("-")) == ("/dev/stdin", "/dev/stdout")
    assert (input_file("-a.png"), output_file("a-b.gif")) == ("-a.png", "a-b.gif")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--label", "hapiness", "-o", "a.gif"], "unknown label 'hapiness': did you mean 'happiness'?"),
        (["--text", "jump", "-o", "a.gif"], "this bundle has no text encoder"),
        (["--embedding", "none.npy", "-o", "a.gif"], "none.npy cannot be read: No such file"),
        (["--drive", "none.gif", "-o", "a.gif"], "none.gif does not exist"),
        (["--label", "Anger", "-o", "a.gif", "--steps", "0"], "steps: found 0"),
        (["--label", "Anger", "-o", "a.gif", "--threads", "0"], "threads is 0"),
        (["--label", "Anger", "-o", "a.gif", "--threads", "100000"], "threads is 100000, expected 1 or more (at most"),
        (["--label", "Anger", "-o", "a.gif", "--guidance", "1e39"], "guidance_scale is 1e+39, expected -1000 to 1000"),
        (["--label", "x" * 9999, "-o", "a.gif"], "x…x"),
        (["--label", "Anger", "-o", "s3://bucket/a.gif"], "s3://bucket/a.gif is an address, expected a file"),
        (["--label", "Anger", "-o", ""], "a path is empty"),
        (["--label", "Anger", "-o", "a.txt"], "the ending of a.txt is not a clip format"),
        (["--label", "Anger", "-o", "clip"], "the ending of clip is not a clip format"),
        (["--label", "Anger", "-o", "a.gif", "--fps", "0"], "fps is 0"),
        (["--label", "Anger", "-o", "a.npz", "--panels"], "npz and motion files hold neither panels"),
        (["--label", "Anger", "-o", "frames/", "--format", "gif"], "frames/ names a folder"),
    ],
)
def test_errors_are_one_line(
    bundle: Bundle,
    photo: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    assert generate(bundle, photo, *arguments) == 1
    line = one_line(capsys.readouterr().err)
    assert line.startswith("lfdm-generate: error: ")
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_a_clip_that_cannot_be_written_shows_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    arguments = [str(tmp_path / "no bundle"), "--image", "none.png", "--label", "x", "-o"]
    assert generate_main([*arguments, "a.txt"]) == 1
    assert "the ending of a.txt" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "av", None)
    assert generate_main([*arguments, "a.mp4"]) == 1
    assert "pip install 'lfdm-export[video]'" in capsys.readouterr().err
    assert generate_main([*arguments, "a.gif"]) == 1
    assert "there is no bundle at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "lfdm-generate: interrupted"),
        (InputError("two\nlines [red]"), 1, "lfdm-generate: error: two lines [red]"),
        (ParityError("differs"), 3, "lfdm-generate: error: differs"),
        (OSError(28, "No space left on device", "a.gif"), 1, "lfdm-generate: error: a.gif: No space left on device"),
        (MemoryError(), 1, "lfdm-generate: error: out of memory; use fewer frames"),
        (TypeError("bad"), 1, "lfdm-generate: error: TypeError: bad (a fault of this program"),
    ],
)
def test_every_error_has_its_status(
    bundle: Bundle,
    photo: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    status: int,
    message: str,
):
    def fails(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(Pipeline, "generate", fails)
    assert generate(bundle, photo, "--label", "Anger", "-o", "a.gif", "-q") == status
    assert one_line(capsys.readouterr().err).startswith(message)
    with pytest.raises(type(error)):
        generate(bundle, photo, "--label", "Anger", "-o", "a.gif", "--debug")


def test_progress_bars_on_a_terminal(
    bundle: Bundle, photo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert generate(bundle, photo, "--label", "Anger", "-o", str(tmp_path / "a.gif")) == 0
    assert "denoise" in capsys.readouterr().err
    assert generate(bundle, photo, "--label", "Anger", "-o", str(tmp_path / "a.gif"), "--quiet") == 0
    assert capsys.readouterr().err == ""


def test_bars_count(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with Bars(quiet=False, names={"a": "first"}) as bars:
        bars("a", 0, 2)
        bars("b", 3, 4)
        bars("a", 2, 2)
        found = {task.description: (task.completed, task.total) for task in bars._progress.tasks}
    assert found == {"first": (2, 2), "b": (3, 4)}
    with OneBar(quiet=False) as bar:
        bar("encode", 0, 2)
        bar("decode", 1, 2)
        assert [(task.description, task.completed, task.total) for task in bar._progress.tasks] == [("decode", 1, 2)]
    capsys.readouterr()


# ------------------------------------------------------------------------------- export and verify


@dataclass
class FakeModel:
    name: str
    provenance: dict[str, object]


@dataclass
class FakeReport:
    passed: bool

    def write(self, folder: Path) -> Path:
        return folder / "report.html"

    def table(self) -> str:
        return "stage  error"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, bundle: Bundle) -> dict[str, Any]:
    """Fakes of the slow library functions, which record their arguments."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "0")  # registers the variable, so that monkeypatch restores it
    noted: dict[str, Any] = {"passed": True}

    def export_bundle(model: Any, out_dir: Any, **arguments: Any) -> Bundle:
        noted["export"] = {"model": model, "out_dir": out_dir, **arguments}
        return bundle

    def verify_bundle(opened: Bundle, **arguments: Any) -> FakeReport:
        noted["verify"] = {"path": opened.path, **arguments}
        return FakeReport(noted["passed"])

    def load_model(lfae: Any, dm: Any, **arguments: Any) -> FakeModel:
        noted["load"] = {"lfae": lfae, "dm": dm, **arguments}
        return FakeModel("loaded", {})

    def load_model_folder(folder: Path) -> FakeModel:
        return FakeModel(f"from {folder}", {"frames": 12, "image_size": 96} if folder == Path("shipped") else {})

    fakes: dict[str, dict[str, Any]] = {
        "lfdm_export.export.bundle_export": {"export_bundle": export_bundle},
        "lfdm_export.parity.verify": {"verify_bundle": verify_bundle},
        "lfdm_export.checkpoints.load": {"load_model": load_model},
        "lfdm_export.checkpoints.model_folder": {"load_model_folder": load_model_folder},
        "lfdm_models.demo": {"untrained_model": lambda: FakeModel("untrained", {}), "SHIPPED": Path("shipped")},
    }
    for name, functions in fakes.items():
        module = types.ModuleType(name)
        module.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(text_files, "find_folder", lambda source: source)
    return noted


def test_export_of_nothing_is_the_shipped_model(calls: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    assert export_main([]) == 0
    export = calls["export"]
    export.pop("progress")
    assert export.pop("tuned") == TunedSampler.load(MODEL / "tuned.json")
    assert export == {
        "model": FakeModel("from shipped", {"frames": 12, "image_size": 96}),
        "out_dir": "bundle",
        "engine": "fp32",
        "dataset": None,
        "frames": None,
        "image_size": None,
        "text_encoder": None,
        "labels": None,
        "drive": True,
        "reference": True,
        "torch_weights": False,
    }
    assert calls["verify"]["model"] is None, "the reference is the model's, stored at export"
    printed = capsys.readouterr().out
    for part in ("'characters'", "bundle  ", "stage  error", "parity/report.html"):
        assert part in printed


def test_export_of_checkpoints(calls: dict[str, Any]):
    files = ["--lfae", "a.pth", "--dm", "b.pth"]
    options = ["--dataset", "natops", "--text-encoder", "bert", "--frames", "16", "--image-size", "64", "--out", "x"]
    assert export_main([*files, *options, "--residual-flow", "--no-verify", "-q"]) == 0
    assert calls["load"] == {
        "lfae": "a.pth",
        "dm": "b.pth",
        "dataset": "natops",
        "residual_flow": True,
        "region_pad": None,
    }
    export = calls["export"]
    assert (export["model"].name, export["out_dir"], export["text_encoder"]) == ("loaded", "x", "bert")
    assert (export["frames"], export["image_size"], export["dataset"]) == (16, 64, "natops")
    assert export["reference"] is False
    assert "verify" not in calls


@pytest.mark.parametrize(
    ("options", "dataset", "pad", "encoder", "labels"),
    [
        ([], None, None, None, None),
        (["--dataset", "mug"], "mug", None, "bert-base-cased", None),
        (["--dataset", "mug", "--region-pad", "0", "--text-encoder", "folder"], "mug", 0, "folder", None),
        (["--dataset", "mug", "--text-encoder", "none"], "mug", None, "none", None),
        (["--dataset", "mug", "--labels", "jump"], "mug", None, "bert-base-cased", ("jump",)),
    ],
)
def test_the_data_set_reaches_the_library(
    calls: dict[str, Any],
    options: list[str],
    dataset: str | None,
    pad: int | None,
    encoder: str | None,
    labels: tuple[str, ...] | None,
):
    assert export_main(["--lfae", "a.pth", "--dm", "b.pth", *options, "-q"]) == 0
    assert (calls["load"]["dataset"], calls["load"]["region_pad"]) == (dataset, pad)
    export = calls["export"]
    assert (export["dataset"], export["text_encoder"], export["labels"]) == (dataset, encoder, labels)


def test_export_of_a_model_folder_with_labels(calls: dict[str, Any]):
    assert export_main(["--model", "trained", "--labels", "jump, run", "-q"]) == 0
    assert calls["export"]["model"].name == "from trained"
    assert (calls["export"]["frames"], calls["export"]["image_size"]) == (None, None)
    assert calls["export"]["labels"] == ("jump", "run")


@pytest.mark.parametrize("passed", [True, False])
def test_the_parity_decides_the_status(
    calls: dict[str, Any], bundle: Bundle, capsys: pytest.CaptureFixture[str], passed: bool
):
    calls["passed"] = passed
    status = 0 if passed else 3
    assert export_main(["-q"]) == status
    assert ("differs from the model by more than its tolerance" in capsys.readouterr().err) is not passed
    assert verify_main([str(bundle.path), "--model", "trained", "--threads", "2"]) == status
    assert calls["verify"]["model"].name == "from trained"
    assert calls["verify"]["threads"] == 2
    printed = capsys.readouterr()
    assert "parity/report.html" in printed.out
    assert ("differs" in printed.err) is not passed


def test_verify_without_a_model_takes_the_stored_reference(calls: dict[str, Any], bundle: Bundle):
    assert verify_main([str(bundle.path), "-q"]) == 0
    assert calls["verify"]["model"] is None
    assert verify_main([str(bundle.path), "--lfae", "a", "--dm", "b", "--text-encoder", "bert", "-q"]) == 0
    verify = calls["verify"]
    assert (verify["model"].name, verify["text_encoder"]) == ("loaded", "bert")


def test_labels_from_a_file(tmp_path: Path):
    (tmp_path / "labels.txt").write_text("jump\n\n  turn, left \nläuft\n", encoding="utf-8")
    assert read_labels(str(tmp_path / "labels.txt")) == ("jump", "turn, left", "läuft")
    assert read_labels("jump,run ,") == ("jump", "run")
    with pytest.raises(InputError, match="does not exist"):
        read_labels(str(tmp_path / "lables.txt"))
    with pytest.raises(InputError, match="no labels"):
        read_labels(" , ")
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read"):
        read_labels(str(tmp_path / "labels.txt"))


def test_labels_as_every_editor_writes_them(tmp_path: Path):
    (tmp_path / "labels.txt").write_bytes(b"\xef\xbb\xbfjump\r\n\r\n run \r\n")
    assert read_labels(str(tmp_path / "labels.txt")) == ("jump", "run")
    for labels in DATASETS.values():  # longer than any file name
        assert read_labels(",".join(labels)) == labels
    assert read_labels("up/down,left") == ("up/down", "left")
    assert len(read_labels(",".join(map(str, range(5000))))) == 5000
    for value, words in (
        ("jump,Jump ", "is there twice"),
        ("jump,r\x1b[31mun", r"'r\\x1b\[31mun' is longer than 512 characters or holds one that is not printable"),
        ("a" * 600 + ",b", "is longer than 512"),
        ("a\0b.txt", "does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            read_labels(value)
    with (tmp_path / "labels.txt").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(InputError, match="has more than"):
        read_labels(str(tmp_path / "labels.txt"))


def test_an_encoder_that_is_not_available_shows_before_the_model_is_loaded(
    calls: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def refuse(source: str) -> Path:
        raise text_files.TextEncoderError(f"no {source}; --text-encoder none\x1b[2J")

    monkeypatch.setattr(text_files, "find_folder", refuse)
    assert export_main(["--lfae", "a", "--dm", "b", "--dataset", "mug", "-q"]) == 1
    assert "load" not in calls
    # Control characters are printed as escapes.
    assert capsys.readouterr().err == "lfdm-export: error: no bert-base-cased; --text-encoder none\\x1b[2J\n"


def test_a_misspelt_label_file_shows_before_the_model_is_loaded(calls: dict[str, Any]):
    assert export_main(["--lfae", "a.pth", "--dm", "b.pth", "--labels", "none.txt", "-q"]) == 1
    assert "load" not in calls


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a Git LFS pointer or a web page"),
        ("<!DOCTYPE html>\n<html>", "is a Git LFS pointer or a web page"),
        ('["a", 3]', "is not a list of strings"),
        ('{"0": "a"}', "is not a list of strings"),
    ],
)
def test_files_that_are_no_labels_are_refused(tmp_path: Path, content: str, message: str):
    (tmp_path / "labels.txt").write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_labels(str(tmp_path / "labels.txt"))


def test_labels_as_json_and_from_a_pipe(tmp_path: Path):
    (tmp_path / "labels.json").write_text('["jump", "run, fast"]', encoding="utf-8")
    assert read_labels(str(tmp_path / "labels.json")) == ("jump", "run, fast")
    (tmp_path / "odd.txt").write_text("[jump]\n(run)\n", encoding="utf-8")
    assert read_labels(str(tmp_path / "odd.txt")) == ("[jump]", "(run)")
    os.mkfifo(tmp_path / "pipe")
    threading.Thread(target=lambda: (tmp_path / "pipe").write_text("a\nb\n")).start()
    assert read_labels(str(tmp_path / "pipe")) == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "/"], "/ is the root of the file system; choose another place for the bundle"),
        (["--frames", "1000000000"], "expected at most 8192 of each"),
        (["--image-size", "1000000"], "expected at most 8192 of each"),
        (["--text-encoder", "~nobody-of-this-name/bert"], "there is no folder '~nobody-of-this-name/bert'"),
        (["--triton", "file"], "file exists and is not a model repository of this program"),
    ],
)
def test_an_export_that_cannot_succeed_ends_at_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    assert export_main(["--model", "untrained", "--quiet", *arguments]) == 1
    assert message in one_line(capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_list_of_gpus_is_a_usage_error(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        export_main(["--plans", "b", "--target", "tensorrt-rtx", "--gpus", ","])
    assert "',' is not a list of architectures such as SM89,SM120" in capsys.readouterr().err
