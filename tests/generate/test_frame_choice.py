"""Only the requested frames are decoded, and they are those of the whole clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from lfdm_export import Bundle, Pipeline
from lfdm_export.cli import generate_main
from lfdm_export.errors import InputError
from lfdm_export.generate.stage_runner import StageRunner
from lfdm_export.pictures.metadata import clip_metadata
from tests.fake_bundle import CHUNK, FRAMES, SIZE, write_fake_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_fake_bundle(tmp_path_factory.mktemp("frames") / "fake")


@pytest.fixture(scope="module")
def pipe(bundle: Bundle) -> Pipeline:
    return Pipeline.open(bundle, threads=1)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The frames of each run of `decode`."""
    counts: list[int] = []
    run = StageRunner.run

    def counting(self: StageRunner, stage: str, *tensors: Any) -> Any:
        if stage == "decode":
            counts.append(tensors[-1].shape[2])
        return run(self, stage, *tensors)

    monkeypatch.setattr(StageRunner, "run", counting)
    return counts


def photo(size: int = SIZE) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (size, size, 3), np.uint8)


def test_chosen_frames_are_those_of_the_whole_clip(small_bundle: Bundle, decoded: list[int]):
    geometry = small_bundle.manifest.geometry
    pipe, image = Pipeline.open(small_bundle, threads=1, self_check=False), photo(geometry.image_size)
    whole = pipe.generate(image, label=small_bundle.labels[0], steps=2, seed=3)
    runs = -(-geometry.frames // geometry.chunk_frames)
    assert decoded == [geometry.chunk_frames] * runs
    assert runs > 1, "the choice must save runs, or nothing is tested"
    for chosen in (slice(None, None, 3), [geometry.frames - 1], [0, 1, geometry.frames - 2]):
        decoded.clear()
        some = pipe.generate(image, label=small_bundle.labels[0], steps=2, seed=3, frames=chosen)
        positions = range(geometry.frames)[chosen] if isinstance(chosen, slice) else chosen
        np.testing.assert_array_equal(some.frames, whole.frames[:, positions])
        np.testing.assert_array_equal(some.warped, whole.warped[:, positions])
        np.testing.assert_array_equal(some.latent, whole.latent[:, :, positions])
        assert decoded == [geometry.chunk_frames] * -(-len(positions) // geometry.chunk_frames)


@pytest.mark.parametrize("chosen", [[FRAMES - 1], range(1, FRAMES, 2), np.arange(FRAMES)])
def test_a_motion_is_decoded_in_part(pipe: Pipeline, decoded: list[int], chosen: Any):
    clip = pipe.generate(photo(), label="anger", seed=1, steps=2)
    decoded.clear()
    some = pipe.animate(photo(), clip.motion, frames=chosen)
    np.testing.assert_array_equal(some.frames, clip.frames[:, chosen])
    assert decoded == [CHUNK] * -(-len(chosen) // CHUNK)


def test_the_clip_says_which_frames_it_has(pipe: Pipeline, tmp_path: Path):
    clip = pipe.generate(photo(), label="anger", seed=1, steps=2, frames=slice(0, None, 2))
    assert clip.settings["frame_indices"] == [0, 2, 4]
    assert clip.fps == 5, "twice the time per frame"
    assert clip.save(tmp_path / "a.gif", panels=True)
    assert clip_metadata(tmp_path / "a.gif")["frame_indices"] == [0, 2, 4]
    # Its motion has these frames too, and moves other pictures.
    clip.save(tmp_path / "a.motion")
    np.testing.assert_array_equal(pipe.animate(photo(), tmp_path / "a.motion").frames, clip.frames)
    assert pipe.animate(photo(), tmp_path / "a.motion", frames=[0, 2]).fps == 2.5
    whole = pipe.generate(photo(), label="anger", seed=1, steps=2)
    assert ("frame_indices" in whole.settings, whole.fps) == (False, None)
    assert pipe.generate(photo(), label="anger", seed=1, steps=2, frames=[0, 1, 4]).fps is None


def test_a_cache_holds_them_apart(bundle: Bundle, tmp_path: Path):
    pipe = Pipeline.open(bundle, threads=1, cache=tmp_path / "kept")
    for _ in range(2):
        for chosen in (None, [0, 2], [0, 4]):
            clip = pipe.generate(photo(), label="anger", seed=1, steps=2, frames=chosen)
            assert clip.frames.shape[1] == (FRAMES if chosen is None else 2)
            assert clip.settings.get("frame_indices") == chosen
    assert len(list((tmp_path / "kept").iterdir())) == 3


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [FRAMES],
        [-1],
        [1, 0],
        [1, 1],
        [0.0],
        [True],
        "0",
        3,
        slice(FRAMES, None),
        slice(None, None, -1),
        slice(0, 2, 0),
    ],
)
def test_what_is_no_choice_is_refused(pipe: Pipeline, frames: Any):
    with pytest.raises(InputError, match=rf"^frames is .*, expected ascending positions from 0 to {FRAMES - 1}, each"):
        pipe.generate(photo(), label="anger", frames=frames)


@pytest.mark.parametrize(
    ("options", "positions"),
    [(["--stride", "2"], [0, 2, 4]), (["--frames", "3", "0-1", "1"], [0, 1, 3]), (["--stride", "9"], [0])],
)
def test_the_command_decodes_the_chosen_frames(
    bundle: Bundle, tmp_path: Path, options: list[str], positions: list[int]
):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    out = tmp_path / "clip.npz"
    common = ["--image", str(tmp_path / "photo.png"), "--label", "anger", "--seed", "1", "--threads", "1", "--quiet"]
    assert generate_main([str(bundle.path), *common, *options, "-o", str(out)]) == 0
    assert clip_metadata(out)["frame_indices"] == positions
    with np.load(out) as arrays:
        assert arrays["frames"].shape[-4] == len(positions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--label", "anger", "--stride", "0"], "--stride is 0, expected a number of frames from 1"),
        (["--label", "anger", "--frames", "3-1"], "'3-1' is neither the position of a frame nor a range"),
        (["--label", "anger", "--frames", "1", "--stride", "2"], "not allowed with argument"),
        (["--drive", "a.mp4", "--stride", "2"], "--drive takes its frames from CLIP"),
        (["--jobs", "a.csv", "--stride", "2"], "are not for --jobs"),
    ],
)
def test_wrong_choices_of_the_command(options: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    image = [] if "--jobs" in options else ["--image", "a.png"]
    with pytest.raises(SystemExit) as ended:
        generate_main(["bundle", *image, *options, "-o", "a.gif"])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
