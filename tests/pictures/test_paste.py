"""A clip of a crop, put back into its photograph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lfdm_export.errors import InputError
from lfdm_export.pictures.clip import Clip, rehearse_saving
from lfdm_export.pictures.clips import load_clip
from lfdm_export.pictures.crop import Crop
from lfdm_export.pictures.paste import MAX_SIDE, paste_back, read_surroundings
from lfdm_export.pictures.preprocess import prepare_image

SIZE, FRAMES = 16, 3


def drawn(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture, whose crop survives being scaled down and up again."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.random.default_rng(seed).uniform(1, 3, (3, 2))
    return np.stack([127 + 100 * np.sin(a * y + b * x) for a, b in waves], axis=-1).round().astype(np.uint8)


def clip_of(frames: np.ndarray) -> Clip:
    """A clip of one sample (T,S,S,3), whose warped frames are white."""
    length = len(frames)
    return Clip(
        frames=frames[None],
        warped=np.full_like(frames, 255)[None],
        latent=np.zeros((1, 3, length, 4, 4), np.float32),
        source=frames[:1],
        residual_flow=True,
    )


def white(size: int = SIZE) -> np.ndarray:
    return np.full((FRAMES, size, size, 3), 255, np.uint8)


def outside(picture: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    mask = np.ones(picture.shape[:2], bool)
    mask[box[1] : box[3], box[0] : box[2]] = False
    return mask


def test_nothing_changes_outside_of_the_crop_and_the_border_is_soft():
    photo = np.zeros((90, 120, 3), np.uint8)
    photo[::2, ::3] = 37
    around = read_surroundings(photo, (20, 10, 64, 64))
    pasted = paste_back(white(), around)
    assert pasted.shape == (FRAMES, 90, 120, 3)
    mask = outside(photo, (20, 10, 84, 74))
    for frame in pasted:
        np.testing.assert_array_equal(frame[mask], photo[mask])
    row = pasted[0, 43, 20:84, 0].astype(int)
    assert (row[8:56] == 255).all(), "the clip itself, but for 1/8 of the crop on each side"
    assert (np.diff(row[:9]) >= 0).all()
    np.testing.assert_array_equal(np.diff(pasted[0, 43, 20:84, 1].astype(int))[8:54], 0)
    assert row[0] < 10, "the border begins near the photograph's own pixels"
    assert 100 < row[3:5].mean() < 155, "half in the middle of the border"


def test_edges_of_the_photograph_do_not_fade():
    photo = np.zeros((40, 100, 3), np.uint8)
    pasted = paste_back(white(), read_surroundings(photo, (60, 0, 40, 40)))
    assert (pasted[:, :, 65:] == 255).all()
    assert (pasted[:, :, 60] < 50).all()
    assert (paste_back(white(), read_surroundings(photo[:, :40], "center")) == 255).all()


@pytest.mark.parametrize("crop", ["center", (30, 5, 60, 60), (10, 20, 100, 50), (40, 3, 20, 77)])
def test_a_still_clip_gives_the_photograph_back(crop: Crop):
    photo = drawn(80, 130)
    still = np.repeat(prepare_image(photo, 64, crop=crop)[None], FRAMES, axis=0)
    pasted = paste_back(still, read_surroundings(photo, crop))
    assert np.abs(pasted.astype(int) - photo).max() <= 5, "no shift, no black bars"


def test_a_large_photograph_is_scaled_to_the_limit():
    photo = drawn(1001, 2 * MAX_SIDE)
    crop = (700, 100, 801, 801)
    around = read_surroundings(photo, crop)
    assert around.picture.shape == (1001 // 2, MAX_SIDE, 3)
    assert around.box == (350, 49, 750, 450)
    still = prepare_image(photo, 64, crop=crop)[None]
    pasted = paste_back(still, around)
    mask = outside(around.picture, around.box)
    np.testing.assert_array_equal(pasted[0][mask], around.picture[mask])
    assert np.abs(pasted[0].astype(int) - around.picture).max() <= 6


def test_files_show_the_photograph_and_panels_the_crop(tmp_path: Path):
    photo = drawn(61, 91)
    crop = (20, 10, 33, 33)
    clip = clip_of(white())
    pasted = clip.paste_back(photo, crop)
    np.testing.assert_array_equal(pasted.frames, clip.frames)
    expected = paste_back(white(), read_surroundings(photo, crop))
    pasted.save(f"{tmp_path}/frames/")
    np.testing.assert_array_equal(load_clip(tmp_path / "frames"), expected)
    pasted.save(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.size, getattr(image, "n_frames", 1)) == ((91, 61), FRAMES)
    pytest.importorskip("av", reason="the extra `video` is not installed")
    pasted.save(tmp_path / "a.mp4")
    assert load_clip(tmp_path / "a.mp4").shape == (FRAMES, 62, 92, 3), "even"
    pasted.save(f"{tmp_path}/panels/", panels=True)
    clip.save(f"{tmp_path}/own/", panels=True)
    np.testing.assert_array_equal(load_clip(tmp_path / "panels"), load_clip(tmp_path / "own"))
    assert 'width="91"' in pasted._repr_html_()


def test_a_sample_keeps_the_surroundings(tmp_path: Path):
    one = clip_of(white())
    two = replace(
        one,
        frames=np.concatenate([one.frames, one.frames // 2]), warped=np.repeat(one.warped, 2, axis=0),
        latent=np.repeat(one.latent, 2, axis=0), source=np.repeat(one.source, 2, axis=0),
    )  # fmt: skip
    photo = drawn(40, 50)
    first, second = two.paste_back(photo, "center").save(tmp_path / "a", format="png")
    assert load_clip(first).shape == load_clip(second).shape == (FRAMES, 40, 50, 3)
    two.paste_back(photo, "center").sample(1).save(tmp_path / "b", format="png")
    np.testing.assert_array_equal(load_clip(tmp_path / "b"), load_clip(second))


def test_what_makes_no_sense_is_refused(tmp_path: Path):
    photo, clip = drawn(40, 50), clip_of(white())
    with pytest.raises(InputError, match="without a crop there is nothing to paste back into"):
        clip.paste_back(photo, None)
    with pytest.raises(InputError, match="crop 0,0,60,10 is not within the picture of 50x40"):
        clip.paste_back(photo, (0, 0, 60, 10))
    pasted = clip.paste_back(photo, "center")
    for ending in ("npz", "motion"):
        with pytest.raises(InputError, match="pasted back"):
            pasted.save(tmp_path / f"a.{ending}")
        with pytest.raises(InputError, match="pasted back"):
            rehearse_saving(tmp_path / f"a.{ending}", pasted=True)
    with pytest.raises(InputError, match="leave scale out"):
        pasted.save(tmp_path / "a.gif", scale=2)
    with pytest.raises(InputError, match="too long and thin"):
        clip.paste_back(drawn(2, 50), (0, 0, 50, 1)).save(tmp_path / "a.gif")
