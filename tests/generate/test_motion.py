"""Motions: saving, validated reading, animation of other images; and cached clips."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lfdm_export import Bundle, Clip, Motion, Pipeline
from lfdm_export.cli import generate_main
from lfdm_export.errors import InputError
from lfdm_export.generate.clip_cache import ClipCache
from lfdm_export.pictures.clip_files import save_clip
from lfdm_export.pictures.metadata import clip_metadata
from lfdm_export.pictures.motion import MAX_VALUES, load_motion
from lfdm_export.stages import Geometry
from tests.fake_bundle import BODIES, CONFIG, FRAMES, GEOMETRY, LATENT, SIZE, fake_manifest, write_fake_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("motion") / "fake")


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Pipeline:
    return Pipeline.open(bundle, threads=1)


def photo(batch: int = 0, seed: int = 0) -> NDArray[np.uint8]:
    shape = (SIZE, SIZE, 3)
    return np.random.default_rng(seed).integers(0, 256, (batch, *shape) if batch else shape, np.uint8)


def write_archive(path: Path, **arrays: Any) -> Path:
    with path.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    return path


def metadata(**changes: object) -> NDArray[np.str_]:
    return np.array(json.dumps({"program": "lfdm-export", "residual_flow": False, "sampler": "ddim", **changes}))


def latent(frames: int = FRAMES, size: int = LATENT) -> NDArray[np.float32]:
    return np.random.default_rng(3).standard_normal((3, frames, size, size)).astype(np.float32)


# ----------------------------------------------------------------------------------- saving and reading


def test_the_same_picture_gives_the_same_bits(small_bundle: Bundle, tmp_path: Path):
    pipe = Pipeline.open(small_bundle, threads=1)
    picture = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
    made = pipe.generate(picture, text_embedding=np.linspace(-1, 1, 768), steps=2, seed=3)
    (path,) = made.save(tmp_path / "wave.motion")
    again = pipe.animate(picture, path)
    for name in ("frames", "warped", "latent", "source"):
        np.testing.assert_array_equal(getattr(again, name), getattr(made, name))
    other = pipe.animate(picture[::-1], path)
    np.testing.assert_array_equal(other.latent, made.latent)
    assert (other.frames != made.frames).any()


def test_a_motion_says_how_it_was_made(bundle: Bundle, pipe: Pipeline, tmp_path: Path):
    (path,) = pipe.generate(photo(), label="happiness", seed=7, steps=3).save(tmp_path / "happy.motion")
    found = clip_metadata(path)
    expected = {
        "label": "happiness", "seed": 7, "sampler": "ddim", "steps": 3, "made_by": "generate", "bundle": "fake",
        "bundle_id": bundle.manifest.bundle_id, "residual_flow": False,
        "geometry": {"image_size": SIZE, "latent_size": LATENT, "frames": FRAMES},
    }  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ["latent.npy", "metadata.npy"], "no pictures of anybody"
    motion = load_motion(path)
    assert repr(motion) == f"<Motion: {FRAMES} frames of {LATENT}x{LATENT}, label happiness, seed 7>"
    clip = pipe.animate(photo(), motion)
    assert (clip.labels, clip.seeds) == (("happiness",), (7,))
    told = clip.metadata(0)
    assert (told["made_by"], told["label"], told["seed"]) == ("animate", "happiness", 7)
    assert told["motion_bundle_id"] == bundle.manifest.bundle_id


def test_many_pictures_move_alike(pipe: Pipeline):
    motion = pipe.generate(photo(), label="Anger", steps=2, seed=0).motion
    pictures = photo(3)
    clip = pipe.animate(pictures, motion)
    assert clip.frames.shape[0] == 3
    for index, picture in enumerate(pictures):
        np.testing.assert_array_equal(clip.latent[index], motion.latent)
        assert np.abs(clip.frames[index].astype(int) - pipe.animate(picture, motion).frames[0]).max() <= 1


def test_several_samples_go_to_a_file_each(pipe: Pipeline, tmp_path: Path):
    clip = pipe.generate(photo(), label=["Anger", "happiness"], steps=2)
    with pytest.raises(InputError, match=r"2 samples; take the motion of one: clip.sample\(0\).motion"):
        _ = clip.motion
    paths = clip.save(tmp_path / "both.motion")
    assert [path.name for path in paths] == ["both-0.motion", "both-1.motion"]
    assert [load_motion(path).settings["label"] for path in paths] == ["Anger", "happiness"]
    np.testing.assert_array_equal(load_motion(paths[1]).latent, clip.latent[1])


def test_an_archive_of_a_clip_is_no_motion(pipe: Pipeline, tmp_path: Path):
    (path,) = pipe.generate(photo(), label="Anger", steps=2, seed=0).save(tmp_path / "one.npz")
    with pytest.raises(
        InputError, match=r"one\.npz does not say whether its grid holds offsets; save the clip as .motion"
    ):
        pipe.animate(photo(), path)


def test_a_transferred_motion_keeps_its_length_and_rate(pipe: Pipeline, tmp_path: Path):
    driven = pipe.transfer_motion(photo(), photo(FRAMES + 2, seed=5), fps=24)
    (path,) = driven.save(tmp_path / "driven.motion")
    again = pipe.animate(photo(), path)
    np.testing.assert_array_equal(again.frames, driven.frames)
    assert again.fps == 24


def test_a_clip_without_latent_has_no_motion(pipe: Pipeline, tmp_path: Path):
    clip = pipe.generate(photo(), label="Anger", steps=2, seed=0)
    with pytest.raises(InputError, match="has no latent; request it from the server"):
        replace(clip, latent=clip.latent[:, :, :0]).save(tmp_path / "none.motion")
    with pytest.raises(InputError, match="motion is a latent, found none"):
        save_clip(tmp_path / "none.motion", clip.frames[0])
    with pytest.raises(InputError, match="npz and motion files hold neither panels"):
        clip.save(tmp_path / "none.motion", scale=2)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------- compatible motions


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_size": 8}, "5 frames of 4x4, the bundle's latents have 5 of 8x8"),
        ({"frames": 9}, "5 frames of 4x4, the bundle's latents have 9 of 4x4"),
    ],
)
def test_a_motion_of_other_sizes_is_refused(change: dict[str, int], message: str):
    geometry: Geometry = replace(GEOMETRY, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=message):
        Motion(latent(), False, settings={"sampler": "ddim"}).require_fit(
            geometry.latent_size, geometry.frames, residual_flow=False
        )


def test_a_motion_of_another_kind_of_grid_is_refused(pipe: Pipeline, tmp_path: Path):
    path = write_archive(tmp_path / "offsets.motion", latent=latent(), metadata=metadata(residual_flow=True))
    with pytest.raises(InputError, match=r"holds offsets \(residual flow\), the bundle's latents hold positions"):
        pipe.animate(photo(), path)
    manifest = replace(fake_manifest(), config=replace(CONFIG, residual_flow=True))
    residual = write_fake_bundle(tmp_path / "residual", manifest)
    assert Pipeline.open(residual, threads=1).animate(photo(), path).residual_flow is True


@pytest.mark.parametrize("motion", [None, 3, np.zeros((3, 2, 4, 4), np.float32)])
def test_what_is_no_motion_is_refused(pipe: Pipeline, motion: Any):
    with pytest.raises(InputError, match=r"motion is \w+, expected a Motion"):
        pipe.animate(photo(), motion)


# ---------------------------------------------------------------------------------------- untrusted files


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"frames": np.zeros(3)}, "holds metadata, frames, expected an array named latent"),
        ({"latent": latent().astype(np.float64)}, "values of type float64, expected float32"),
        ({"latent": latent()[0]}, r"shape \(5, 4, 4\), expected float32 of shape \(3, T, h, h\)"),
        ({"latent": latent()[:, :0]}, r"shape \(3, 0, 4, 4\)"),
        ({"latent": latent()[..., :3]}, r"shape \(3, 5, 4, 3\)"),
        ({"latent": np.full((3, 5, 4, 4), np.nan, np.float32)}, "not finite"),
        ({"latent": np.full((3, 5, 4, 4), -np.inf, np.float32)}, "not finite"),
        ({"latent": latent(), "metadata": metadata(residual_flow=1)}, "does not say whether its grid holds offsets"),
        ({"latent": latent(), "metadata": np.array("{" * 100_000)}, "does not say whether"),
        ({"latent": latent(), "metadata": np.array([1, 2])}, "does not say whether"),
    ],
)
def test_an_unfit_file_is_refused(tmp_path: Path, arrays: dict[str, Any], message: str):
    path = write_archive(tmp_path / "odd.motion", **{"metadata": metadata(), **arrays})
    with pytest.raises(InputError, match=message) as caught:
        load_motion(path)
    assert "odd.motion" in str(caught.value)


def test_no_code_is_run_and_no_memory_taken_for_claims(tmp_path: Path):
    pickled = write_archive(tmp_path / "code.motion", latent=np.array([print], object), metadata=metadata())
    with pytest.raises(InputError, match="values of type object, expected float32"):
        load_motion(pickled)
    header = io.BytesIO()
    claim = {"descr": "<f4", "fortran_order": False, "shape": (3, MAX_VALUES, 1 << 20, 1 << 20)}
    np.lib.format.write_array_header_1_0(header, claim)
    for shape, message in (
        ((3, MAX_VALUES, 4, 4), "more than 122,880,000 values"),
        ((3, 5, 4, 4), "ends within latent"),
    ):
        header = io.BytesIO()
        np.lib.format.write_array_header_1_0(header, {**claim, "shape": shape})
        with zipfile.ZipFile(tmp_path / "claim.motion", "w") as archive:
            archive.writestr("latent.npy", header.getvalue())
        with pytest.raises(InputError, match=message):
            load_motion(tmp_path / "claim.motion")


def test_a_damaged_or_missing_file_is_refused(pipe: Pipeline, tmp_path: Path):
    (path,) = pipe.generate(photo(), label="Anger", steps=2, seed=0).save(tmp_path / "whole.motion")
    content = path.read_bytes()
    for size in range(0, len(content), max(1, len(content) // 40)):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match=r"whole\.motion"):
            load_motion(path)
    for at in range(0, len(content), max(1, len(content) // 80)):
        damaged = bytearray(content)
        damaged[at] ^= 0xFF
        path.write_bytes(damaged)
        try:
            assert np.isfinite(load_motion(path).latent).all()
        except InputError as error:
            assert "whole.motion" in str(error)  # noqa: PT017
    with pytest.raises(InputError, match="does not exist"):
        load_motion(tmp_path / "none.motion")
    with pytest.raises(InputError, match="is a folder"):
        load_motion(tmp_path)


# ------------------------------------------------------------------------------------------ the command


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "photo.png"
    Image.fromarray(photo()).save(path)
    return str(path)


def test_the_command_saves_and_takes_motions(bundle: Bundle, picture: str, tmp_path: Path):
    run = [str(bundle.path), "--image", picture, "-q"]
    assert generate_main([*run, "--label", "happiness", "--seed", "3", "-o", str(tmp_path / "a.motion")]) == 0
    assert generate_main([*run, "--label", "happiness", "--seed", "3", "-o", str(tmp_path / "a.npz")]) == 0
    assert generate_main([*run, "--motion", str(tmp_path / "a.motion"), "-o", str(tmp_path / "b.npz")]) == 0
    with np.load(tmp_path / "a.npz") as first, np.load(tmp_path / "b.npz") as second:
        for name in ("frames", "warped", "latent"):
            np.testing.assert_array_equal(first[name], second[name])


def test_the_command_refuses_what_means_nothing(
    bundle: Bundle, picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = [str(bundle.path), "--image", picture, "--motion", str(tmp_path / "a.motion")]
    for more, message in (
        (["--seed", "1", "-o", "x.gif"], "--motion samples nothing: leave out --seed"),
        (["--label", "Anger", "-o", "x.gif"], "not allowed with argument"),
    ):
        with pytest.raises(SystemExit):
            generate_main([*run, *more])
        assert message in capsys.readouterr().err
    remote = ["--url", "x:1", "--image", picture, "-o", "x.gif"]
    for more, message in (
        (["--motion", "a.motion", "--stream"], "--motion is decoded at once: leave out --stream"),
        (["--label", "a", "--cache", "kept"], "--cache is for a BUNDLE that runs here"),
    ):
        with pytest.raises(SystemExit):
            generate_main([*remote, *more])
        assert message in capsys.readouterr().err
    (tmp_path / "a.motion").write_bytes(b"x")
    assert generate_main([*run, "-o", str(tmp_path / "a.motion")]) == 1
    assert "the same as --motion" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- cached clips


def runs(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that run from now on."""
    found: list[str] = []
    real = pipe.stages.run

    def counting(stage: str, *tensors: Any) -> Any:
        found.append(stage)
        return real(stage, *tensors)

    monkeypatch.setattr(pipe.stages, "run", counting)
    return found


def assert_same(first: Clip, second: Clip) -> None:
    for name in ("frames", "warped", "latent", "source"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    for name in ("labels", "seeds", "fps", "settings", "residual_flow"):
        assert getattr(first, name) == getattr(second, name), name


def test_what_was_made_before_is_read(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pipe = Pipeline.open(bundle, threads=1, cache=tmp_path / "kept")
    makers: list[Any] = [
        lambda: pipe.generate(photo(), label=["Anger", "happiness"], seed=4, steps=2),
        lambda: pipe.transfer_motion(photo(), photo(3, seed=2), fps=12),
        lambda: pipe.animate(photo(), Motion(latent(), False, settings={"label": "waves", "seed": 1})),
    ]
    made = [make() for make in makers]
    again = runs(pipe, monkeypatch)
    for make, clip in zip(makers, made, strict=True):
        assert_same(make(), clip)
    assert again == []
    assert len(list((tmp_path / "kept").iterdir())) == 3


@pytest.mark.parametrize(
    "other",
    [{"seed": 5}, {"steps": 3}, {"sampler": "unipc"}, {"eta": 0.5}, {"guidance_scale": 2}, {"label": "happiness"}],
)
def test_another_setting_is_another_clip(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: dict[str, Any]
):
    pipe = Pipeline.open(bundle, threads=1, cache=tmp_path)
    wanted: dict[str, Any] = {"label": "Anger", "seed": 4, "steps": 2}
    pipe.generate(photo(), **wanted)
    ran = runs(pipe, monkeypatch)
    kept = pipe.generate(photo(), **{**wanted, **other})
    assert "decode" in ran
    assert_same(kept, Pipeline.open(bundle, threads=1).generate(photo(), **{**wanted, **other}))
    pipe.generate(photo(seed=9), **wanted)
    assert ran.count("encode") == 2, "another picture is another clip"


def test_another_bundle_is_another_clip(bundle: Bundle, tmp_path: Path):
    other = write_fake_bundle(tmp_path / "fake", decode=BODIES["decode"].replace("half = Mul", "half = Add"))
    first, second = (Pipeline.open(one, threads=1, cache=tmp_path / "kept") for one in (bundle, other))
    made = [pipe.generate(photo(), label="Anger", steps=2, seed=0) for pipe in (first, second)]
    assert (made[0].frames != made[1].frames).any()
    assert len(list((tmp_path / "kept").iterdir())) == 2


def test_noise_of_ones_own_is_kept_under_no_name(bundle: Bundle, tmp_path: Path):
    pipe = Pipeline.open(bundle, threads=1, cache=tmp_path / "kept")
    draws = [np.zeros((1, 3, FRAMES, LATENT, LATENT), np.float32)] * 9
    pipe.generate(photo(), label="Anger", steps=2, noise=iter(draws))
    assert not (tmp_path / "kept").exists()


def test_a_damaged_entry_is_made_again(bundle: Bundle, tmp_path: Path):
    pipe = Pipeline.open(bundle, threads=1, cache=tmp_path)
    clip = pipe.generate(photo(), label="Anger", steps=2, seed=0)
    (entry,) = tmp_path.iterdir()
    content = entry.read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2], b"x" * 50):
        entry.write_bytes(damaged)
        assert_same(pipe.generate(photo(), label="Anger", steps=2, seed=0), clip)
        assert len(entry.read_bytes()) > 100, "whole again"


def test_a_cache_keeps_to_its_size(bundle: Bundle, tmp_path: Path):
    pipe = Pipeline.open(bundle, threads=1, cache=ClipCache(tmp_path / "kept"))
    pipe.generate(photo(), label="Anger", steps=2, seed=0)
    (entry,) = (tmp_path / "kept").iterdir()
    pipe.cache = ClipCache(tmp_path / "kept", size=2 * entry.stat().st_size + 500)
    for seed in range(1, 6):
        pipe.generate(photo(), label="Anger", steps=2, seed=seed)
    assert len(list((tmp_path / "kept").iterdir())) == 2
    pipe.cache = ClipCache(tmp_path / "none", size=10)
    pipe.generate(photo(), label="Anger", steps=2, seed=0)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_written_costs_no_clip(
    bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_bytes(b"")
    pipe = Pipeline.open(bundle, threads=1, cache=tmp_path / "file" / "kept")
    assert pipe.generate(photo(), label="Anger", steps=2, seed=0).frames.shape[0] == 1
    assert "a clip is not kept" in caplog.text


def test_the_command_finds_a_clip_whatever_is_made_beside_it(bundle: Bundle, picture: str, tmp_path: Path):
    run = [str(bundle.path), "--image", picture, "-q", "--cache", str(tmp_path / "kept"), "--format", "npz"]
    run += ["--seed", "0"]
    assert generate_main([*run, "--labels-all", "-o", f"{tmp_path}/all/"]) == 0
    kept = {path.name for path in (tmp_path / "kept").iterdir()}
    assert len(kept) == 3
    assert generate_main([*run, "--label", "happiness", "-o", str(tmp_path / "one.npz")]) == 0
    assert {path.name for path in (tmp_path / "kept").iterdir()} == kept
